"""Run the cells of a matrix, each in its own process, and store their results in one folder.

A cell of this machine's CPU exports. A cell of another CPU verifies the bundle of that export on the emulated CPU.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any, TypeGuard

from export_zoo.base.errors import EnvironmentFailureError, TargetUnavailableError
from export_zoo.base.machine import cpu_model, instruction_set, library_versions
from export_zoo.base.package import __version__
from export_zoo.engines.bundle.reader import read_manifest
from export_zoo.engines.emulation import arm64
from export_zoo.engines.emulation.cpus import CPUS
from export_zoo.engines.emulation.engine import qemu_version
from export_zoo.engines.targets.registry import TARGETS
from export_zoo.exporter.matrix.inputs import fingerprints, of_emulation
from export_zoo.exporter.matrix.machine import Machine
from export_zoo.exporter.matrix.plan import HOST, Cell
from export_zoo.exporter.matrix.process import Ended, run_limited
from export_zoo.exporter.matrix.results import CellResult, store, stored
from export_zoo.exporter.model_sources import source_of
from export_zoo.exporter.publish import failed_place

BUNDLES = "bundles"
"""Folder for bundles in --out."""

_DATE = "%Y-%m-%dT%H:%M:%SZ"

_VERSIONS = ("torch", "torchvision", "onnx", "onnxsim", *(target.distribution for target in TARGETS.values()))


def _versions(cell: Cell) -> dict[str, str]:
    if cell.cpu != HOST:
        return _emulation_versions(cell.cpu)
    return {**library_versions(*_VERSIONS, *source_of(cell.model).libraries), "export-zoo": __version__}


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
            versions=_versions(cell),
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
        inputs=_inputs_on_cpu(cell, exported) or {},
        cpu=cell.cpu,
    )


def _inputs_on_cpu(cell: Cell, exported: CellResult) -> dict[str, str] | None:
    return of_emulation(cell, exported.command, exported.inputs, exported.versions, exported.engine)


def _is_current(
    result: CellResult | None, cell: Cell, inputs: dict[str, str] | None
) -> TypeGuard[CellResult]:
    """Whether an earlier result is ok and has the same command line, versions and inputs."""
    return (
        result is not None
        and result.status == "ok"
        and result.command == tuple(cell.command())
        and result.versions == _versions(cell)
        and result.inputs == inputs
    )


def left_out(cell: Cell, reason: str = "") -> CellResult:
    """The result of a cell that is not run: excluded with the file's reason, else skipped with `reason`."""
    return CellResult(
        cell.model,
        cell.target,
        cell.precision,
        tuple(cell.command()),
        "excluded" if cell.excluded else "skipped",
        cell.excluded or cell.skipped or reason,
        cpu=cell.cpu,
    )


def run(
    cells: Sequence[Cell],
    out: Path,
    *,
    seconds: float,
    memory: float | None = None,
    jobs: int = 1,
    expected: Callable[[Cell], int] = lambda cell: 0,
    again: bool = False,
    keep_bundles: bool = True,
    done: Callable[[CellResult, bool], None] = lambda result, cached: None,
) -> list[CellResult]:
    """Run the cells, and return their results in the same order. A failing cell does not stop the others.

    Results lie in `out`/results, bundles in `out`/bundles. A cell is not run again if it has a result that is ok and
    has the same command line, versions and files. A cell of an emulated CPU follows the cell that exports its bundle.

    Args:
        seconds, memory: limits of a cell, see `Limits`.
        jobs: number of cells that run at once, if their memory allows. Each gets its part of the cores.
        expected: bytes of memory that a cell is expected to take; only asked if no earlier run measured it.
        again: run all cells again.
        keep_bundles: False to delete each bundle when its results are recorded.
        done: called after each cell; the flag is True if the result of an earlier run was used.

    Raises:
        EnvironmentFailureError: `out` cannot be written to.
    """
    results, bundles = out / "results", out / BUNDLES
    try:
        results.mkdir(parents=True, exist_ok=True)
        bundles.mkdir(exist_ok=True)
    except OSError as error:
        raise EnvironmentFailureError(
            f"{out}: cannot be created: {error.strerror}", hint="give another --out"
        ) from error
    measured = stored(results)
    known = {} if again else measured
    machine, telling = Machine(jobs), threading.Lock()

    def run_one(cell: Cell, exported: CellResult | None, bundle: Path) -> CellResult:
        earlier = measured.get(cell.name)
        bytes_expected = earlier.peak_mib << 20 if earlier is not None else 0
        if jobs > 1 and not bytes_expected:
            bytes_expected = expected(cell)
        with machine.room(bytes_expected) as cores:
            limits = Limits(seconds, memory, cores, machine.stopped)
            if exported is None:
                return run_cell(cell, bundle, limits)
            return run_on_cpu(cell, exported, bundle, limits)

    def run_group(own: list[Cell]) -> list[CellResult]:
        bundle, exported, ran = bundles / own[0].bundle, None, False
        found = []
        for cell in own:
            earlier, cached, path = known.get(cell.name), False, results / f"{cell.name}.json"
            if exported is None:
                why_not = cell.excluded
                inputs = fingerprints(cell)
            else:
                failed = "" if exported.status == "ok" else f"not run on {cell.cpu}: the export failed"
                why_not = cell.excluded or cell.skipped or failed
                inputs = _inputs_on_cpu(cell, exported)
            if why_not:
                if not cell.excluded:
                    path.unlink(missing_ok=True)
                result = left_out(cell, why_not)
            elif _is_current(earlier, cell, inputs) and (
                exported is not None
                or bundle.exists()
                or not (keep_bundles or _lacks_emulation(own, earlier, known))
            ):
                result, cached = earlier, True
            else:
                # Deleted first: a run that is stopped would leave an old result beside a new bundle.
                path.unlink(missing_ok=True)
                result = run_one(cell, exported, bundle)
                store(results, result)
                ran = True
            exported = exported or result
            found.append(result)
            with telling:
                done(result, cached)
        if ran and not keep_bundles:
            for path in (bundle, failed_place(bundle)):
                shutil.rmtree(path, ignore_errors=True)
        return found

    groups = [list(group) for _, group in groupby(cells, key=lambda cell: cell.bundle)]
    return machine.run_all(groups, run_group)


def _lacks_emulation(own: Sequence[Cell], exported: CellResult, known: Mapping[str, CellResult]) -> bool:
    """Whether an emulated CPU has yet to run the bundle of an earlier export."""
    return any(
        not _is_current(known.get(cell.name), cell, _inputs_on_cpu(cell, exported))
        for cell in own
        if cell.cpu != HOST and not cell.excluded and not cell.skipped
    )
