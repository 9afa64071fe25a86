"""Build TensorRT and TensorRT-RTX engines from precision graphs, each in its own process."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any

from export_zoo.base import graph_io
from export_zoo.base.errors import BuilderCrashError, EnvironmentFailureError, TargetRefusalError, UsageError
from export_zoo.base.package import IMPORT_ROOT
from export_zoo.engines.parity.checked_sizes import Size
from export_zoo.engines.targets.options import CURRENT, BuildOptions
from export_zoo.engines.targets.tensorrt.worker import FATAL_WARNINGS, TIMING_SUFFIX

log = logging.getLogger("export_zoo.tensorrt")
log.addHandler(logging.NullHandler())

_LEVELS = {
    "INTERNAL_ERROR": logging.ERROR,
    "ERROR": logging.ERROR,
    "WARNING": logging.WARNING,
    "INFO": logging.INFO,
    "VERBOSE": logging.DEBUG,
}

WORKER: Sequence[str] = (sys.executable, "-m", "export_zoo.engines.targets.tensorrt.worker")

_SHOWN = 3
"""Maximum number of errors that a message names."""

Steps = Callable[[int, int], None]
"""Called with the builder's finished steps and their total."""


@dataclass(frozen=True)
class Built:
    """A finished engine file."""

    version: str
    """Version of the TensorRT that built the engine. The engine runs only with this version, unless built otherwise."""
    compute_capabilities: list[str] = field(default_factory=list)
    """Compute capabilities of the GPUs that the engine is for."""
    warnings: dict[str, int] = field(default_factory=dict)
    """TensorRT's warnings, with the number of times each came."""


def _describe(stage: str, errors: list[dict[str, str]], logged: list[str], graph: Path) -> str:
    """Describe what failed, with the module path of each node that is named."""
    nodes = {}
    if stage == "build" or any(error["node"] for error in errors):  # otherwise, the file may not be a graph
        nodes = {node.name: node for node in graph_io.load(graph).graph}
    parts = []
    for error in errors[:_SHOWN]:
        node = nodes.get(error["node"])
        where = graph_io.describe(node) if node is not None else error["node"]
        parts.append(f"{where}: {error['text']}" if where else error["text"])
    if len(errors) > _SHOWN:
        parts.append(f"and {len(errors) - _SHOWN} more")
    if not parts:
        parts = logged[-_SHOWN:] or ["TensorRT gave no reason"]
        named = [nodes[word] for word in re.findall(r"\w+", " ".join(parts)) if word in nodes]
        parts += [graph_io.describe(node) for node in list(dict.fromkeys(named))[:_SHOWN]]
    return f"{stage}: " + "; ".join(parts)


def _ended(code: int, tail: str) -> str:
    """How a builder process that reported no result ended."""
    if code == -signal.SIGKILL:
        return "the builder was killed, most likely because memory ran out"
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"the builder crashed ({name})" + (f": {tail}" if tail else "")


def _worker(
    request: dict[str, Any], steps: Steps
) -> tuple[dict[str, Any], Counter[str], list[str], int, str]:
    """Run the builder's process. Returns its last event, warnings, logged errors, exit code and end of stderr."""
    pipe = subprocess.PIPE
    with tempfile.TemporaryFile() as stderr:
        with subprocess.Popen(
            WORKER, cwd=IMPORT_ROOT, stdin=pipe, stdout=pipe, stderr=stderr, text=True
        ) as process:
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                with process.stdin:
                    process.stdin.write(json.dumps(request))
                final, warnings, logged = _follow(process.stdout, steps)
                code = process.wait()
            finally:
                process.kill()
        stderr.seek(0)
        tail = " ".join(stderr.read().decode(errors="replace").strip().splitlines()[-2:])
    return final, warnings, logged, code, tail


def check_capabilities(options: BuildOptions) -> None:
    """Check, before any work, that TensorRT-RTX knows the requested compute capabilities.

    Raises:
        UsageError: a compute capability is unknown; the hint names the known ones.
        EnvironmentFailureError: TensorRT-RTX cannot be loaded.
    """
    known = _capabilities()
    for text in options.compute_capabilities:
        if text not in (*known, CURRENT):
            raise UsageError(
                f"--compute-capability {text}: unknown to this tensorrt-rtx",
                hint=f"choose from {', '.join(known)}",
            )


@cache
def _capabilities() -> tuple[str, ...]:
    """Compute capabilities that TensorRT-RTX knows. Asked once: it takes a process."""
    request = {"what": "capabilities", "target": "tensorrt-rtx"}
    final, _, _, code, tail = _worker(request, lambda done, total: None)
    if "capabilities" not in final:
        raise EnvironmentFailureError(f"tensorrt-rtx: {_ended(code, tail)}", hint="reinstall tensorrt-rtx")
    return tuple(final["capabilities"])


def build_engine(
    graph: Path,
    out: Path,
    *,
    target: str,
    batch: tuple[int, int, int],
    sizes: tuple[Size, Size, Size] | None = None,
    options: BuildOptions | None = None,
    steps: Steps = lambda done, total: None,
) -> Built:
    """Build a strongly typed engine of an ONNX precision graph.

    It has one optimization profile over the batch and, if they are dynamic, height and width.

    Args:
        graph: ONNX file. The engine has its types.
        out: the engine file to write. On failure, no file is left. `tensorrt` writes its timing cache beside it, with
            the suffix `.timing`.
        target: `tensorrt` (needs the GPU it builds for) or `tensorrt-rtx` (needs none).
        batch: min, opt and max of the first dimension of every input.
        sizes: min, opt and max (height, width) of every input; None if the graph fixes them.

    Raises:
        UsageError: an option, the batch or the sizes do not fit this TensorRT or this graph.
        TargetRefusalError: the parser or the builder rejects the graph; the message names node and module.
        BuilderCrashError: the builder crashed or was killed.
        EnvironmentFailureError: the engine cannot be written.
    """
    options = options or BuildOptions()
    request = {
        **asdict(options),
        "timing_cache": str(options.timing_cache.absolute()) if options.timing_cache is not None else None,
        "graph": str(graph.absolute()),
        "out": str(out.absolute()),
        "target": target,
        "batch": batch,
        "sizes": sizes,
    }
    final, warnings, logged, code, tail = _worker(request, steps)
    fatal = [text for text in warnings if any(bad in text for bad in FATAL_WARNINGS)]
    if final.get("event") == "done" and not fatal:
        return Built(final["version"], final["compute_capabilities"], dict(warnings))
    for left in (out, out.with_suffix(TIMING_SUFFIX)):
        left.unlink(missing_ok=True)
    if not final:
        raise BuilderCrashError(
            f"{target}: {_ended(code, tail)}",
            hint="try a smaller --batch or --workspace, or another --target",
        )
    if final["event"] == "error" and final["stage"] == "write":
        raise EnvironmentFailureError(
            f"{target}: {final['errors'][0]['text']}",
            hint="free some space, or move the cache (EXPORT_ZOO_CACHE; with --no-cache, TMPDIR)",
        )
    if final["event"] == "error" and final["stage"] == "configure":
        raise UsageError(f"{target}: {final['errors'][0]['text']}", hint="see `export-zoo export --help`")
    reason = f"build: {fatal[0]}" if fatal else _describe(final["stage"], final["errors"], logged, graph)
    raise _refusal(target, graph, reason)


def _refusal(target: str, graph: Path, reason: str) -> TargetRefusalError:
    return TargetRefusalError(
        f"{target}: cannot build {graph.name}: {reason}",
        hint="use -v to see TensorRT's log, or --target onnxruntime to build without TensorRT",
    )


def check_graph(graph: Path, target: str) -> None:
    """Let TensorRT's parser read a graph, which takes seconds. Building takes longer.

    Raises:
        TargetRefusalError: the parser rejects the graph; the message names node and module.
    """
    request = {"what": "parse", "target": target, "graph": str(graph.absolute())}
    final, _, logged, _, _ = _worker(request, lambda done, total: None)
    if final.get("event") == "error":  # a crash shows again, with its reason, when the engine is built
        raise _refusal(target, graph, _describe(final["stage"], final["errors"], logged, graph))


def _follow(events: IO[str], steps: Steps) -> tuple[dict[str, Any], Counter[str], list[str]]:
    """Read all events of a worker. Returns the final event, warnings with their number, and logged errors."""
    final: dict[str, Any] = {}
    warnings: Counter[str] = Counter()
    logged: list[str] = []
    done, total = 0, 0
    for line in events:
        event = json.loads(line)
        match event["event"]:
            case "log":
                level = _LEVELS.get(event["severity"], logging.INFO)
                log.log(level, event["text"])
                if level == logging.WARNING:
                    warnings[event["text"]] += 1
                elif level == logging.ERROR:
                    logged.append(event["text"])
            case "steps":
                total = event["total"]
            case "step":
                done += 1
                steps(done, total)
            case _:
                final = event
    return final, warnings, logged
