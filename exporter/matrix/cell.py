"""One cell, in its own process: it exports, or verifies an exported bundle on the emulated CPU of another kind."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from export_zoo.base.errors import TargetUnavailableError
from export_zoo.base.machine import cpu_model, instruction_set, library_versions
from export_zoo.base.package import __version__
from export_zoo.engines.bundle.reader import read_manifest
from export_zoo.engines.emulation import arm64
from export_zoo.engines.emulation.cpus import CPUS
from export_zoo.engines.emulation.engine import qemu_version
from export_zoo.engines.targets.registry import TARGETS
from export_zoo.exporter.matrix.inputs import fingerprints, of_emulation
from export_zoo.exporter.matrix.plan import HOST, Cell
from export_zoo.exporter.matrix.process import Ended, run_limited
from export_zoo.exporter.matrix.results import CellResult
from export_zoo.exporter.model_sources import source_of

_DATE = "%Y-%m-%dT%H:%M:%SZ"

_VERSIONS = ("torch", "torchvision", "onnx", "onnxsim", *(target.distribution for target in TARGETS.values()))


def libraries(cell: Cell) -> tuple[str, ...]:
    """Distributions that a cell of this machine's CPU depends on."""
    return (*_VERSIONS, *source_of(cell.model).libraries)


def versions(cell: Cell) -> dict[str, str]:
    """Versions, on this machine, of what a cell depends on."""
    if cell.cpu != HOST:
        return _emulation_versions(cell.cpu)
    return {**library_versions(*libraries(cell)), "export-zoo": __version__}


def _emulation_versions(name: str) -> dict[str, str]:
    cpu = CPUS[name]
    found = {
        **library_versions("onnxruntime", "numpy"),
        "export-zoo": __version__,
        "qemu": "absent",
    }
    with contextlib.suppress(TargetUnavailableError):
        found["qemu"] = qemu_version(cpu)
    if cpu.machine == "aarch64":
        there = arm64.versions(arm64.default_root())
        found |= {f"ARM64 {name}": version for name, version in there.items()}
    return found


def _nodes(bundle: Path) -> int | None:
    import onnx

    try:
        manifest = read_manifest(bundle)
        return len(onnx.load(bundle / manifest.recipe.graph.path, load_external_data=False).graph.node)
    except Exception:  # a failed bundle may have no files
        return None


class _Started:
    """A started cell: its start time, and the fields that all results share."""

    def __init__(self) -> None:
        self._begin, self._date = time.monotonic(), datetime.now(timezone.utc)

    def result(self, cell: Cell, ended: Ended, *, engine: dict[str, Any], **fields: Any) -> CellResult:
        """The result of a cell: ok if its process exited with 0 and has the cell's engine; {} means no engine."""
        ok = ended.exit_code == 0 and bool(engine)
        return CellResult(
            model=cell.model,
            target=cell.target,
            precision=cell.precision,
            command=tuple(cell.command()),
            status="ok" if ok else "failed",
            reason="" if ok else ended.reason,
            exit_code=ended.exit_code,
            gate=ended.gate,
            seconds=round(time.monotonic() - self._begin, 1),
            peak_mib=ended.peak >> 20,
            engine=engine,
            warnings=tuple(ended.document.get("warnings", ())),
            versions=versions(cell),
            date=self._date.strftime(_DATE),
            **fields,
        )


def arguments(cell: Cell, bundle: Path) -> list[str]:
    """Arguments of `export-zoo` for a cell whose bundle is at `bundle`."""
    if cell.cpu == HOST:
        return [*cell.command(), f"--out={bundle}"]
    command, _, *options = cell.command()
    return [command, str(bundle), *options]


@dataclass(frozen=True)
class Limits:
    """Limits of a cell."""

    seconds: float
    """Time limit; the process is then killed."""
    memory: float | None = None
    """Memory limit in GiB; the process is then killed. None for the memory that is free when the cell starts, less
    1 GiB, but at least 2 GiB."""
    cores: frozenset[int] | None = None
    """Cores that it may use; None for all."""
    stopped: threading.Event | None = None
    """Ends the process when set."""


def _end(cell: Cell, bundle: Path, limits: Limits) -> Ended:
    return run_limited(
        arguments(cell, bundle),
        seconds=limits.seconds,
        memory=limits.memory,
        cores=limits.cores,
        stopped=limits.stopped,
    )


def run_cell(cell: Cell, bundle: Path, limits: Limits) -> CellResult:
    """Export one cell in its own process.

    Args:
        bundle: path that the bundle is written to.
    """
    started, inputs = _Started(), fingerprints(cell)
    ended = _end(cell, bundle, limits)
    document = ended.document
    engines = [e for e in document.get("engines", []) if e.get("name") == cell.engine]
    recipe = document.get("recipe") or {}
    sizes = recipe.get("preprocess")
    return started.result(
        cell,
        ended,
        engine=engines[0] if engines else {},
        nodes=_nodes(Path(document["bundle"])) if document.get("bundle") else None,
        input_size=(sizes["crop_height"], sizes["crop_width"]) if sizes else None,
        random=bool(((recipe.get("source") or {}).get("weights") or {}).get("random")),
        machine=cpu_model(),
        instruction_set=instruction_set(),
        inputs=inputs or {},
    )


def run_on_cpu(cell: Cell, exported: CellResult, bundle: Path, limits: Limits) -> CellResult:
    """Verify a cell's bundle on its emulated CPU, in its own process.

    Args:
        exported: the result of the export, which succeeded.
        bundle: path of the exported bundle.
    """
    started = _Started()
    ended = _end(cell, bundle, limits)
    attestation: dict[str, Any] = next(iter(ended.document.get("emulated", [])), {})
    engine: dict[str, Any] = {}
    if gate := attestation.get("engines", {}).get(cell.engine):
        emulation = attestation["emulation"]
        engine = {
            "name": cell.engine,
            "target": cell.target,
            "precision": cell.precision,
            "state": "emulated",
            "gate": gate,
            "emulation": {**emulation, "host": emulation["host"][cell.engine]},
        }
    return started.result(
        cell,
        ended,
        engine=engine,
        input_size=exported.input_size,
        random=exported.random,
        machine=attestation.get("machine") or cpu_model(),
        instruction_set=attestation.get("instruction_set") or instruction_set(),
        inputs=inputs_on_cpu(cell, exported) or {},
        cpu=cell.cpu,
    )


def inputs_on_cpu(cell: Cell, exported: CellResult) -> dict[str, str] | None:
    return of_emulation(cell, exported.command, exported.inputs, exported.versions, exported.engine)
