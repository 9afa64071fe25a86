"""Run the cells of a matrix, each in its own process, and store their results in one folder.

A cell of this machine's CPU exports. A cell of another CPU verifies the bundle of that export on the emulated CPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeGuard

import psutil

from export_zoo.base.errors import EnvironmentFailureError, TargetRefusalError, TargetUnavailableError
from export_zoo.base.files import replacing
from export_zoo.base.machine import available_memory, cpu_model, instruction_set, library_versions
from export_zoo.base.package import IMPORT_ROOT, __version__
from export_zoo.engines.bundle.reader import read_manifest
from export_zoo.engines.emulation import arm64_root
from export_zoo.engines.emulation.cpus import CPUS
from export_zoo.engines.emulation.engine import qemu_version
from export_zoo.exporter.matrix.inputs import fingerprints, of_emulation
from export_zoo.exporter.matrix.plan import HOST, Cell, cell_name
from export_zoo.exporter.publish import failed_place

Status = Literal["ok", "failed", "excluded", "skipped"]

BUNDLES = "bundles"
"""Folder for bundles in --out."""

_DATE = "%Y-%m-%dT%H:%M:%SZ"
_POLL_SECONDS = 0.1
_SPARE_BYTES = 1 << 30
"""Memory left to the rest of the machine if no budget is given."""

_VERSIONS = ("torch", "torchvision", "onnx", "onnxsim", "onnxruntime", "tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class CellResult:
    """Result of a cell, stored as JSON in the results folder; see docs/matrix.md.

    Attributes:
        gate: whether the cell's parity gate failed, or its engine did not reach the required state.
        status: `excluded` by the file; `skipped` if an emulated CPU cannot run the engine, or there is no engine.
        engine: the engine's entry in the manifest; empty if it was not built. On an emulated CPU: its name, the state
            `emulated`, the gate there, and under `emulation` the SQNR of this machine and the largest difference.
        nodes: number of nodes of the simplified FP32 graph.
        peak_mib: peak memory of the process and its children, in MiB, sampled ten times a second.
        random: whether the weights were random; INT8 figures then say nothing about accuracy.
        inputs: hashes of the files that the command line names, see `inputs.fingerprints` and `of_emulation`.
        cpu: `host` for this machine's CPU, else the name of the emulated CPU.
    """

    model: str
    target: str
    precision: str
    command: tuple[str, ...]
    status: Status
    reason: str = ""
    exit_code: int | None = None
    gate: bool = False
    seconds: float = 0.0
    peak_mib: int = 0
    nodes: int | None = None
    input_size: tuple[int, int] | None = None
    random: bool = False
    engine: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    machine: str = ""
    instruction_set: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    date: str = ""
    cpu: str = HOST

    @property
    def emulated(self) -> bool:
        return self.cpu != HOST

    @property
    def engine_name(self) -> str:
        return f"{self.target}-{self.precision}"

    @property
    def name(self) -> str:
        return cell_name(self.model, self.engine_name, self.cpu)

    def figure(self, *path: str) -> float | None:
        """A number in the engine's entry, or None."""
        found: Any = self.engine
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        return float(found) if isinstance(found, (int, float)) else None


def stored(folder: Path) -> dict[str, CellResult]:
    """Results in a results folder, by cell name. Files that cannot be read are left out; their cells run again."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            document = json.loads(path.read_text(encoding="utf-8"))
            for key in ("command", "warnings", "input_size"):
                document[key] = tuple(document[key]) if document[key] is not None else None
            result = CellResult(**document)
            found[result.name] = result
    return found


def _store(folder: Path, result: CellResult) -> None:
    path = folder / f"{result.name}.json"
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise EnvironmentFailureError(
            f"{path}: cannot be written: {error.strerror}", hint="free some space, or give another --out"
        ) from error


def _versions(cell: Cell) -> dict[str, str]:
    if cell.cpu != HOST:
        return _emulation_versions(cell.cpu)
    own = (*_VERSIONS, "timm") if cell.model.startswith("timm/") else _VERSIONS
    return {**library_versions(*own), "export-zoo": __version__}


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
        there = arm64_root.versions(arm64_root.default_root())
        found |= {f"ARM64 {name}": version for name, version in there.items()}
    return found


def _memory_of(process: psutil.Process) -> int:
    """Bytes that a process and its children hold."""
    total = 0
    with contextlib.suppress(psutil.Error):
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += one.memory_info().rss
    return total


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):
        for one in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.Error):
                one.kill()


def _watch(process: subprocess.Popen[bytes], seconds: float, budget: int) -> tuple[str, int]:
    """Wait for a cell's process. Returns why it was killed, empty if it was not, and its peak memory in bytes."""
    begin, peak = time.monotonic(), 0
    watched = psutil.Process(process.pid)
    try:
        while process.poll() is None:
            held = _memory_of(watched)
            peak = max(peak, held)
            if held > budget:
                return f"took more than {budget >> 20} MiB of memory", peak
            if time.monotonic() - begin > seconds:
                return f"took longer than {seconds:g} s", peak
            time.sleep(_POLL_SECONDS)
        return "", peak
    finally:
        _kill(watched)  # after Ctrl-C, too
        process.wait()


def _reason(document: dict[str, Any], code: int, log: str) -> str:
    error = document.get("error") or {}
    if error.get("message"):
        hint = error.get("hint") if error.get("kind") == TargetUnavailableError.kind else ""
        return f"{error['message']}; next: {hint}" if hint else str(error["message"])
    last = (log.strip().splitlines() or [""])[-1]
    if code < 0:
        return f"killed by signal {-code}" + (f": {last}" if last else "")
    return last or f"exit code {code}"


def _nodes(bundle: Path) -> int | None:
    import onnx

    try:
        manifest = read_manifest(bundle)
        return len(onnx.load(bundle / manifest.recipe.graph.path, load_external_data=False).graph.node)
    except Exception:  # a failed bundle may have no files
        return None


def _budget(memory: float | None) -> int:
    if memory is not None:
        return int(memory * 2**30)
    return max(2 * _SPARE_BYTES, available_memory() - _SPARE_BYTES)


@dataclass(frozen=True)
class _Ended:
    """A finished process of a cell.

    Attributes:
        document: contents of the --json file; empty if none was written.
        killed: the exceeded limit for which the process was killed, else empty.
        peak: peak memory in bytes.
    """

    document: dict[str, Any]
    code: int
    killed: str
    peak: int
    log: str

    @property
    def exit_code(self) -> int | None:
        return None if self.killed else self.code

    @property
    def gate(self) -> bool:
        refused = (self.document.get("error") or {}).get("kind") == TargetRefusalError.kind
        return not self.killed and self.code in (3, 6) and not refused

    @property
    def reason(self) -> str:
        return self.killed or _reason(self.document, self.code, self.log)


_COMMAND = f"""
import importlib.util, sys
sys.path = [*filter(None, sys.path)]
if importlib.util.find_spec("export_zoo") is None:
    sys.path.append({str(IMPORT_ROOT)!r})
from export_zoo.exporter.cli.app import run
run()
"""
"""Runs `export-zoo` without the current directory on sys.path; `python -m` would put it first."""


def _process(arguments: Sequence[str], *, seconds: float, memory: float | None) -> _Ended:
    """Run `export-zoo` with these arguments, --json and --quiet, within the limits."""
    with tempfile.TemporaryDirectory(prefix="export-zoo-") as directory:
        json_path, log_path = Path(directory) / "result.json", Path(directory) / "log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, *arguments, f"--json={json_path}", "--quiet"],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "TMPDIR": directory},  # removed with it, even if the process is killed
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches only this process, which kills the cell's
            )
            killed, peak = _watch(process, seconds, _budget(memory))
        document: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            document = json.loads(json_path.read_text(encoding="utf-8"))
        log_text = log_path.read_text(encoding="utf-8", errors="replace")
    return _Ended(document, process.returncode, killed, peak, log_text)


class _Started:
    """A started cell: its start time, and the fields that all results share."""

    def __init__(self) -> None:
        self._begin, self._date = time.monotonic(), datetime.now(timezone.utc)

    def result(self, cell: Cell, ended: _Ended, *, engine: dict[str, Any], **fields: Any) -> CellResult:
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


def run_cell(cell: Cell, bundle: Path, *, seconds: float, memory: float | None) -> CellResult:
    """Export one cell in its own process.

    Args:
        bundle: path that the bundle is written to.
        seconds: time limit; the process is then killed.
        memory: memory limit in GiB; the process is then killed. None for the memory that is free now,
            less 1 GiB, but at least 2 GiB.
    """
    started, inputs = _Started(), fingerprints(cell)
    ended = _process(arguments(cell, bundle), seconds=seconds, memory=memory)
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


def run_on_cpu(
    cell: Cell, exported: CellResult, bundle: Path, *, seconds: float, memory: float | None
) -> CellResult:
    """Verify a cell's bundle on its emulated CPU, in its own process.

    Args:
        exported: the result of the export, which succeeded.
        bundle: path of the exported bundle.
        seconds, memory: as in `run_cell`.
    """
    started = _Started()
    ended = _process(arguments(cell, bundle), seconds=seconds, memory=memory)
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
    again: bool = False,
    keep_bundles: bool = True,
    done: Callable[[CellResult, bool], None] = lambda result, cached: None,
) -> list[CellResult]:
    """Run the cells one after the other. A failing cell does not stop the others.

    Results lie in `out`/results, bundles in `out`/bundles. A cell is not run again if it has a result that is ok and
    has the same command line, versions and files. A cell of an emulated CPU follows the cell that exports its bundle.

    Args:
        seconds, memory: limits of a cell, as in `run_cell`.
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
    known = {} if again else stored(results)
    found = []
    for _, group in groupby(cells, key=lambda cell: cell.bundle):
        own = list(group)
        bundle, exported, ran = bundles / own[0].bundle, None, False
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
                if exported is None:
                    result = run_cell(cell, bundle, seconds=seconds, memory=memory)
                else:
                    result = run_on_cpu(cell, exported, bundle, seconds=seconds, memory=memory)
                _store(results, result)
                ran = True
            exported = exported or result
            found.append(result)
            done(result, cached)
        if ran and not keep_bundles:
            for path in (bundle, failed_place(bundle)):
                shutil.rmtree(path, ignore_errors=True)
    return found


def _lacks_emulation(own: Sequence[Cell], exported: CellResult, known: Mapping[str, CellResult]) -> bool:
    """Whether an emulated CPU has yet to run the bundle of an earlier export."""
    return any(
        not _is_current(known.get(cell.name), cell, _inputs_on_cpu(cell, exported))
        for cell in own
        if cell.cpu != HOST and not cell.excluded and not cell.skipped
    )
