"""Run the cells of a matrix, each in a process of its own, and keep their results beside each other."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import psutil

from calibration.errors import EnvironmentFailureError
from calibration.files import replacing
from calibration.machine import available_memory, cpu_model, instruction_set, library_versions
from engines.bundle import read_manifest
from exporter import __version__
from exporter.matrix_inputs import fingerprints
from exporter.matrix_plan import Cell, cell_name
from exporter.publish import failed_place

Status = Literal["ok", "failed", "excluded"]

_POLL_SECONDS = 0.1
_SPARE_BYTES = 1 << 30
"""Left to the rest of the machine where no budget is given."""

_VERSIONS = ("torch", "torchvision", "onnx", "onnxsim", "onnxruntime", "tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class CellResult:
    """What became of a cell. Stands as JSON in the results folder: field by field, docs/matrix.md.

    Attributes:
        gate: the cell's parity gate failed, or its engine did not reach the state asked for.
        engine: as the manifest describes it; empty where it was not built.
        nodes: of the simplified FP32 graph.
        peak_mib: of the process and its children, sampled ten times a second.
        random: the weights were random: INT8 figures say nothing about accuracy.
        inputs: of the files that the command line names, see `matrix_inputs.fingerprints`.
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

    @property
    def engine_name(self) -> str:
        return f"{self.target}-{self.precision}"

    @property
    def name(self) -> str:
        return cell_name(self.model, self.engine_name)

    def figure(self, *path: str) -> float | None:
        """A number of the engine's description, or None."""
        found: Any = self.engine
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        return float(found) if isinstance(found, (int, float)) else None


def stored(folder: Path) -> dict[str, CellResult]:
    """Results by name that lie in a results folder; what cannot be read is left out, and so run again."""
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
    own = (*_VERSIONS, "timm") if cell.model.startswith("timm/") else _VERSIONS
    return {**library_versions(*own), "export-zoo": __version__}


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
    """Wait for a cell's process: why it was killed, else nothing, and the most bytes that it held."""
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
        _kill(watched)  # Ctrl-C, too
        process.wait()


def _reason(document: dict[str, Any], code: int, log: str) -> str:
    error = document.get("error") or {}
    if error.get("message"):
        return str(error["message"])
    last = (log.strip().splitlines() or [""])[-1]
    if code < 0:
        return f"killed by signal {-code}" + (f": {last}" if last else "")
    return last or f"exit code {code}"


def _nodes(bundle: Path) -> int | None:
    import onnx

    try:
        manifest = read_manifest(bundle)
        return len(onnx.load(bundle / manifest.recipe.graph.path, load_external_data=False).graph.node)
    except Exception:  # of a bundle that failed there may be nothing
        return None


def _budget(memory: float | None) -> int:
    if memory is not None:
        return int(memory * 2**30)
    return max(2 * _SPARE_BYTES, available_memory() - _SPARE_BYTES)


def run_cell(cell: Cell, bundle: Path, *, seconds: float, memory: float | None) -> CellResult:
    """Export one cell in a process of its own.

    Args:
        bundle: where it is written to.
        seconds: after which it is ended.
        memory: GiB at which it is ended; None for what is free now, less one.
    """
    begin, date, inputs = time.monotonic(), datetime.now(timezone.utc), fingerprints(cell)
    with tempfile.TemporaryDirectory(prefix="export-zoo-") as directory:
        json_path, log_path = Path(directory) / "result.json", Path(directory) / "log"
        command = [sys.executable, "-m", "exporter.cli", *cell.command()]
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [*command, f"--out={bundle}", f"--json={json_path}", "--quiet"],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "TMPDIR": directory},  # gone with it, even where it is killed
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us: we end it
            )
            killed, peak = _watch(process, seconds, _budget(memory))
        document: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            document = json.loads(json_path.read_text(encoding="utf-8"))
        log_text = log_path.read_text(encoding="utf-8", errors="replace")
    code = process.returncode
    engines = [e for e in document.get("engines", []) if e.get("name") == cell.engine]
    recipe = document.get("recipe") or {}
    ok = code == 0 and not killed and bool(engines)
    return CellResult(
        model=cell.model,
        target=cell.target,
        precision=cell.precision,
        command=tuple(cell.command()),
        status="ok" if ok else "failed",
        reason="" if ok else killed or _reason(document, code, log_text),
        exit_code=None if killed else code,
        gate=not killed and code in (3, 6),
        seconds=round(time.monotonic() - begin, 1),
        peak_mib=peak >> 20,
        nodes=_nodes(Path(document["bundle"])) if document.get("bundle") else None,
        input_size=(sizes["crop_height"], sizes["crop_width"])
        if (sizes := recipe.get("preprocess"))
        else None,
        random=bool(((recipe.get("source") or {}).get("weights") or {}).get("random")),
        engine=engines[0] if engines else {},
        warnings=tuple(document.get("warnings", ())),
        machine=cpu_model(),
        instruction_set=instruction_set(),
        versions=_versions(cell),
        inputs=inputs or {},
        date=date.strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def left_out(cell: Cell) -> CellResult:
    """The result of a cell that the file excludes, with the file's reason."""
    return CellResult(
        cell.model, cell.target, cell.precision, tuple(cell.command()), "excluded", cell.excluded
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
    """Run the cells one after the other; a failing one does not stop the others.

    Results lie in `out`/results, bundles in `out`/bundles. A cell whose result is there, ok, of the same command line,
    versions and files is not run again.

    Args:
        seconds, memory: limits of a cell, as of `run_cell`.
        again: run all cells anew.
        keep_bundles: False to delete each bundle when its result is recorded.
        done: called after each cell; the flag tells that an earlier run's result was taken.

    Raises:
        EnvironmentFailureError: `out` cannot be written to.
    """
    results, bundles = out / "results", out / "bundles"
    try:
        results.mkdir(parents=True, exist_ok=True)
        bundles.mkdir(exist_ok=True)
    except OSError as error:
        raise EnvironmentFailureError(
            f"{out}: cannot be made: {error.strerror}", hint="give another --out"
        ) from error
    known, found = stored(results), []
    for cell in cells:
        bundle, earlier, cached = bundles / f"{cell.name}.bundle", known.get(cell.name), False
        if cell.excluded:
            result = left_out(cell)
        elif (
            not again
            and earlier is not None
            and earlier.status == "ok"
            and earlier.command == tuple(cell.command())
            and earlier.versions == _versions(cell)
            and earlier.inputs == fingerprints(cell)
            and (bundle.exists() or not keep_bundles)
        ):
            result, cached = earlier, True
        else:
            # Or a run that is stopped leaves an old result beside a new bundle.
            (results / f"{cell.name}.json").unlink(missing_ok=True)
            result = run_cell(cell, bundle, seconds=seconds, memory=memory)
            if not keep_bundles:
                for path in (bundle, failed_place(bundle)):
                    shutil.rmtree(path, ignore_errors=True)
            _store(results, result)
        found.append(result)
        done(result, cached)
    return found
