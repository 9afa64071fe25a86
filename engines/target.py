"""The targets: what each builds, and whether it is available here."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from calibration.errors import TargetUnavailableError, UsageError
from calibration.machine import library_versions

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
TARGETS = ("onnxruntime", "tensorrt", "tensorrt-rtx")
AUTO = "auto"
AUTOMATIC = TARGETS
"""What `auto` chooses from."""


DISTRIBUTIONS = {"onnxruntime": "onnxruntime", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx"}
"""The package that builds a target's engines."""


@dataclass(frozen=True)
class Target:
    """A backend that engines are built for."""

    name: str
    unavailable: str = ""
    """Why it cannot be built here; empty where it can."""


def targets() -> dict[str, Target]:
    """All targets by name, as they stand on this machine."""
    installs = {
        "onnxruntime": "install onnxruntime or onnxruntime-gpu",
        "tensorrt": "install it with `pip install 'export-zoo[tensorrt]'`",
        "tensorrt-rtx": "install it with `pip install 'export-zoo[tensorrt-rtx]'`",
    }
    versions = library_versions(*DISTRIBUTIONS.values())
    reasons = {
        name: installs[name] if versions[package] == "absent" else ""
        for name, package in DISTRIBUTIONS.items()
    }
    if not reasons["tensorrt"] and not has_cuda_device():
        reasons["tensorrt"] = "it builds on the GPU that it builds for, and there is no CUDA device here"
    return {name: Target(name, reasons[name]) for name in TARGETS}


def has_cuda_device() -> bool:
    """Whether the CUDA driver is here and finds a device. Asks the driver itself: nothing else need be installed."""
    for library in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(library)
        except OSError:
            continue
        count = ctypes.c_int(0)
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    return False


def _automatic(known: Mapping[str, Target]) -> list[Target]:
    """ONNX Runtime always; TensorRT where it can be built, else TensorRT-RTX, which needs no GPU to build."""
    available = [known[name] for name in AUTOMATIC if not known[name].unavailable]
    names = [target.name for target in available]
    return [t for t in available if t.name != "tensorrt-rtx" or "tensorrt" not in names]


def choose(names: Sequence[str]) -> list[Target]:
    """The targets asked for, each once; `auto` is every one that is available here.

    Raises:
        UsageError: unknown name, or `auto` beside others.
        TargetUnavailableError: one that was named is not available here.
    """
    known = targets()
    for name in names:
        if name not in known and name != AUTO:
            raise UsageError(f"--target {name}: unknown", hint=f"choose from {', '.join([*known, AUTO])}")
    if AUTO in names:
        if set(names) != {AUTO}:
            raise UsageError("--target auto cannot be combined with other targets", hint="name them all")
        available = _automatic(known)
        if not available:
            reasons = "; ".join(f"{t.name}: {t.unavailable}" for t in known.values())
            raise TargetUnavailableError(
                f"--target auto: none is available here: {reasons}", hint="install one"
            )
        return available
    chosen = [known[name] for name in dict.fromkeys(names)]
    for target in chosen:
        if target.unavailable:
            raise TargetUnavailableError(
                f"--target {target.name} is not available here: {target.unavailable}",
                hint="use --target onnxruntime, or --target auto for what this machine can build",
            )
    return chosen
