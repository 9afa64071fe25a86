"""The targets: what each builds, and whether it is available here."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from export_zoo.base.errors import TargetUnavailableError, UsageError
from export_zoo.base.machine import library_versions

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
TargetName = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]
TARGETS: tuple[TargetName, ...] = ("onnxruntime", "tensorrt", "tensorrt-rtx")
AUTO = "auto"
MAX_BATCH = 4096
"""A batch is run and compared at its largest: 2.5 GB of input at 224x224."""
MAX_WORKSPACE_MB = 1 << 20
CUDA = 13
"""Major version of CUDA that the driver must support: TensorRT's since 11, TensorRT-RTX's since 1.7."""
AUTOMATIC = TARGETS
"""What `auto` chooses from."""


CURRENT = "current"
"""The compute capability of the GPU that is here, whatever TensorRT-RTX calls it."""

DISTRIBUTIONS = {"onnxruntime": "onnxruntime", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx"}
"""The package that builds a target's engines."""


MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""The Python module of those that TensorRT builds and runs."""


@dataclass(frozen=True)
class Target:
    """A backend that engines are built for."""

    name: TargetName
    unavailable: str = ""
    """Why it cannot be built here; empty where it can."""


@dataclass(frozen=True)
class BuildOptions:
    """How TensorRT builds an engine. Each is off, or TensorRT's default, unless asked for.

    `workspace_mb` bounds the scratch memory that layers may take on the device, in MiB. `hardware_compatible` (GPUs
    from Ampere on) and `version_compatible` are for `tensorrt` only. `compute_capabilities` ("8.9"; "current": the GPU
    that is here) is for `tensorrt-rtx` only, which builds for GPUs that are not there; it refits and strips weights
    only where there is one. `timing_cache` is a file of an earlier bundle, for `tensorrt` only: kernels that it holds
    are not timed again, so that the same ones are chosen.
    """

    workspace_mb: int | None = None
    hardware_compatible: bool = False
    version_compatible: bool = False
    refittable: bool = False
    strip_weights: bool = False
    compute_capabilities: tuple[str, ...] = ()
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        if self.workspace_mb is not None and not 1 <= self.workspace_mb <= MAX_WORKSPACE_MB:
            raise UsageError(
                f"--workspace {self.workspace_mb}: must be 1 to {MAX_WORKSPACE_MB} (MiB)", hint="leave it out"
            )
        for text in self.compute_capabilities:
            if text != CURRENT and not re.fullmatch(r"[1-9][0-9]?\.[0-9]", text):
                raise UsageError(
                    f"--compute-capability {text!r}: not MAJOR.MINOR",
                    hint="for example 8.9, or `current` for the GPU that is here",
                )
        if self.timing_cache is not None and not self.timing_cache.is_file():
            raise UsageError(
                f"--timing-cache {self.timing_cache}: no such file",
                hint="give the `.timing` file of an earlier bundle that has a tensorrt engine, or leave it out",
            )

    def check(self, names: Collection[str]) -> None:
        """Refuse options that none of the chosen targets has.

        Raises:
            UsageError: names the option and the target it is for.
            TargetUnavailableError: needs a GPU, and there is none.
        """
        if (self.refittable or self.strip_weights) and "tensorrt-rtx" in names and not has_cuda_device():
            # Its builder ends in an internal error (1.7.1, any convolution).
            raise TargetUnavailableError(
                "--refittable and --strip-weights: tensorrt-rtx does this only where there is a GPU",
                hint="leave them out, or build where the GPU is",
            )
        if CURRENT in self.compute_capabilities and "tensorrt-rtx" in names and not has_cuda_device():
            raise TargetUnavailableError(
                f"--compute-capability {CURRENT}: there is no CUDA device here",
                hint="name what to build for, 8.9 for example, or build where the GPU is",
            )
        for option, given, owners in (
            ("--workspace", self.workspace_mb is not None, ("tensorrt", "tensorrt-rtx")),
            ("--refittable", self.refittable, ("tensorrt", "tensorrt-rtx")),
            ("--strip-weights", self.strip_weights, ("tensorrt", "tensorrt-rtx")),
            ("--hardware-compatible", self.hardware_compatible, ("tensorrt",)),
            ("--version-compatible", self.version_compatible, ("tensorrt",)),
            ("--timing-cache", self.timing_cache is not None, ("tensorrt",)),
            ("--compute-capability", bool(self.compute_capabilities), ("tensorrt-rtx",)),
        ):
            if given and not set(owners) & set(names):
                raise UsageError(
                    f"{option} has no effect on {', '.join(names)}",
                    hint=f"it is for --target {' and '.join(owners)}",
                )

    def of(self, name: str) -> BuildOptions:
        """Those that a target has."""
        if name == "tensorrt-rtx":
            capabilities = tuple(dict.fromkeys(self.compute_capabilities))
            return replace(
                self,
                hardware_compatible=False,
                version_compatible=False,
                timing_cache=None,
                compute_capabilities=capabilities,
            )
        return replace(self, compute_capabilities=())


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
    if not reasons["tensorrt"]:
        reasons["tensorrt"] = driver_too_old()
    return {name: Target(name, reasons[name]) for name in TARGETS}


def _driver() -> ctypes.CDLL | None:
    """The CUDA driver, if it is here and finds a device."""
    for library in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(library)
        except OSError:
            continue
        count = ctypes.c_int(0)
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0:
            return driver
    return None


def driver_too_old() -> str:
    """Why the driver cannot run TensorRT; empty where it can, or where there is none."""
    driver, version = _driver(), ctypes.c_int(0)
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return ""
    major, minor = version.value // 1000, version.value % 1000 // 10
    return f"the NVIDIA driver supports CUDA {major}.{minor}, {CUDA}.0 is needed" if major < CUDA else ""


def has_cuda_device() -> bool:
    """Whether the CUDA driver is here and finds a device. Asks the driver itself: nothing else need be installed."""
    return _driver() is not None


def device_capability() -> str | None:
    """Compute capability of the first CUDA device, "9.0" say; None without one.

    Attributes 75 and 76 of the driver API (CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR).
    """
    driver = _driver()
    if driver is None:
        return None
    values = []
    for attribute in (75, 76):
        value = ctypes.c_int(0)
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0) != 0:
            return None
        values.append(value.value)
    return f"{values[0]}.{values[1]}"


def device_name() -> str | None:
    """The first CUDA device's name and compute capability, "NVIDIA H100 80GB HBM3, 9.0" say; None without one."""
    driver, capability, name = _driver(), device_capability(), ctypes.create_string_buffer(256)
    if driver is None or capability is None or driver.cuDeviceGetName(name, len(name), 0) != 0:
        return None
    return f"{name.value.decode()}, {capability}"


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
