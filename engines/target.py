"""The targets: what each builds, where it runs, and whether it is available here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from calibration.errors import TargetUnavailableError, UsageError
from calibration.machine import library_versions

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
TARGETS = ("onnxruntime", "tensorrt", "tensorrt-rtx")
AUTO = "auto"


@dataclass(frozen=True)
class Target:
    """A backend that engines are built for."""

    name: str
    unavailable: str = ""
    """Why it cannot be built here; empty where it can."""


def targets() -> dict[str, Target]:
    """All targets by name, as they stand on this machine."""
    absent = library_versions("onnxruntime")["onnxruntime"] == "absent"
    later = "this version of export-zoo cannot build it yet; only onnxruntime is supported"
    reasons = {"onnxruntime": "install onnxruntime or onnxruntime-gpu" if absent else ""}
    return {name: Target(name, reasons.get(name, later)) for name in TARGETS}


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
        available = [target for target in known.values() if not target.unavailable]
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
