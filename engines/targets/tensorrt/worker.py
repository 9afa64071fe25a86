"""The process that builds one TensorRT engine: a request on stdin, events on stdout. Run by `tensorrt.build`.

It is a separate process because a builder may crash or be killed when memory runs out. Its libraries also need not stay
loaded. One implementation serves `tensorrt` (11) and `tensorrt_rtx`, which share this API. The code marks the
differences.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from export_zoo.base.cuda import device_capability
from export_zoo.engines.targets.options import CURRENT

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Python modules by target."""

RTX_DEFAULT_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")
"""Compute capabilities that TensorRT-RTX builds for by default (NVIDIA, TensorRT-RTX documentation; 1.7)."""

TIMING_SUFFIX = ".timing"

FATAL_WARNINGS = ("Profile kMAX values are not self-consistent",)
"""Warnings after which an engine will misbehave."""


def _logger(trt: Any, emit: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            emit({"event": "log", "severity": severity.name, "text": text})

    return Logger()


def _monitor(trt: Any, emit: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Reports only the outermost phase: its steps are the steps of the build."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outermost = ""

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None and not self.outermost:
                self.outermost = name
                emit({"event": "steps", "total": steps})

        def step_complete(self, name: str, step: int) -> bool:
            if name == self.outermost:
                emit({"event": "step"})
            return True

        def phase_finish(self, name: str) -> None:
            pass

    return Monitor()


def _configure(trt: Any, builder: Any, network: Any, request: dict[str, Any]) -> Any:
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    fits = True
    for index in range(network.num_inputs):
        port = network.get_input(index)
        shapes = [
            [batch, *port.shape[1:]] if size is None else [batch, port.shape[1], *size]
            for batch, size in zip(request["batch"], request["sizes"] or [None] * 3, strict=True)
        ]
        fits = fits and -1 not in shapes[0]
        if fits:
            profile.set_shape(port.name, *shapes)
    if not fits or config.add_optimization_profile(profile) < 0:
        asked = request["batch"] if request["sizes"] is None else f"{request['batch']} of {request['sizes']}"
        raise ValueError(f"the optimization profile {asked} does not fit the network's input")
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default: FP32 with 10 bits of mantissa
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if request["workspace_mb"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace_mb"] << 20)
    flags = {
        "refittable": trt.BuilderFlag.REFIT,
        "strip_weights": trt.BuilderFlag.STRIP_PLAN,
        "version_compatible": trt.BuilderFlag.VERSION_COMPATIBLE,
    }
    for option, flag in flags.items():
        if request[option]:
            config.set_flag(flag)
    if request["hardware_compatible"]:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if request["compute_capabilities"]:  # RTX only
        config.num_compute_capabilities = len(request["compute_capabilities"])
        for index, text in enumerate(request["compute_capabilities"]):
            name = "CURRENT" if text == CURRENT else "SM" + text.replace(".", "")
            capability = trt.ComputeCapability.__members__.get(name)
            if capability is None or not config.set_compute_capability(capability, index):
                raise ValueError(f"--compute-capability {text}: TensorRT-RTX refused it")
    return config


def _capabilities(trt: Any) -> list[str]:
    """Compute capabilities that TensorRT-RTX knows, for example "8.9"."""
    return [f"{name[2:-1]}.{name[-1]}" for name in trt.ComputeCapability.__members__ if name.startswith("SM")]


def _write(path: Path, data: Any) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:  # a failed write does not name its file
        raise OSError(error.errno, error.strerror, str(path)) from error


def _use_timing_cache(config: Any, path: str | None) -> None:
    """Load the kernel timings of a file, or start without timings."""
    known = Path(path).read_bytes() if path else b""
    cache = config.create_timing_cache(known)
    # A cache of another GPU or version must not be used: its timings do not apply.
    if cache is None or not config.set_timing_cache(cache, False):
        raise ValueError(f"--timing-cache {path}: belongs to another GPU or TensorRT version")


def _build(request: dict[str, Any], emit: Any) -> dict[str, Any]:
    """Build the engine, or only parse its graph. Returns the final event: `done` or `error`."""
    trt = importlib.import_module(MODULES[request["target"]])
    logger = _logger(trt, emit)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request["graph"]):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        return {
            "event": "error",
            "stage": "parse",
            "errors": [
                {"node": e.node_name(), "operator": e.node_operator(), "text": e.desc()} for e in errors
            ],
        }
    if request.get("what") == "parse":
        return {"event": "done"}
    config = _configure(trt, builder, network, request)
    if request["target"] == "tensorrt":  # TensorRT-RTX times nothing
        _use_timing_cache(config, request["timing_cache"])
    config.progress_monitor = _monitor(trt, emit)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        return {"event": "error", "stage": "build", "errors": []}
    _write(Path(request["out"]), serialized)
    if request["target"] == "tensorrt":
        _write(Path(request["out"]).with_suffix(TIMING_SUFFIX), config.get_timing_cache().serialize())
    capabilities = request["compute_capabilities"] or RTX_DEFAULT_CAPABILITIES
    capabilities = [device_capability() if text == CURRENT else text for text in capabilities]
    if request["target"] == "tensorrt":
        capabilities = [device_capability()]
    return {"event": "done", "version": trt.__version__, "compute_capabilities": list(capabilities)}


def main(request: TextIO, events: TextIO) -> None:
    def emit(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    asked = json.load(request)
    try:
        if asked.get("what") == "capabilities":
            emit(
                {
                    "event": "done",
                    "capabilities": _capabilities(importlib.import_module(MODULES[asked["target"]])),
                }
            )
        else:
            emit(_build(asked, emit))
    except (ValueError, OSError) as error:
        stage = "configure" if isinstance(error, ValueError) else "write"
        text = str(error) if isinstance(error, ValueError) else f"{error.filename}: {error.strerror}"
        emit({"event": "error", "stage": stage, "errors": [{"node": "", "operator": "", "text": text}]})


if __name__ == "__main__":
    # Native libraries may print to stdout. So events go to a copy of stdout, and stdout itself goes to stderr.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as channel:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        main(sys.stdin, channel)
