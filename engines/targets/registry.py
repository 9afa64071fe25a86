"""All targets. A new one is a folder beside this file, and a line here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING

from export_zoo.base.errors import TargetUnavailableError, UsageError
from export_zoo.engines.precision.registry import PRECISIONS
from export_zoo.engines.targets.base import Target
from export_zoo.engines.targets.onnxruntime.target import OnnxRuntime
from export_zoo.engines.targets.options import BuildOptions
from export_zoo.engines.targets.tensorrt.target import TensorRT, TensorRTRTX

if TYPE_CHECKING:
    import onnx_ir as ir

TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        OnnxRuntime(),
        TensorRT(),
        TensorRTRTX(),
    )
}
"""By name."""

AUTO = "auto"
AUTOMATIC: Sequence[str] = tuple(TARGETS)
"""What `auto` chooses from."""


def why_not(target: Target, precision: str) -> str:
    """Why a target cannot have a precision; empty where it can."""
    return target.unsupported.get(precision, "") or PRECISIONS[precision].unsupported.get(target.name, "")


def _automatic() -> list[Target]:
    """Those that are available here, less those that another one takes the place of."""
    available = [TARGETS[name] for name in AUTOMATIC if not TARGETS[name].unavailable]
    names = [target.name for target in available]
    return [target for target in available if target.preferred not in names]


def choose(names: Sequence[str]) -> list[Target]:
    """The targets asked for, each once; `auto` is every one that is available here.

    Raises:
        UsageError: unknown name, or `auto` beside others.
        TargetUnavailableError: one that was named is not available here.
    """
    for name in names:
        if name not in TARGETS and name != AUTO:
            raise UsageError(f"--target {name}: unknown", hint=f"choose from {', '.join([*TARGETS, AUTO])}")
    if AUTO in names:
        if set(names) != {AUTO}:
            raise UsageError("--target auto cannot be combined with other targets", hint="name them all")
        available = _automatic()
        if not available:
            reasons = "; ".join(f"{t.name}: {t.unavailable}" for t in TARGETS.values())
            raise TargetUnavailableError(
                f"--target auto: none is available here: {reasons}", hint="install one"
            )
        return available
    chosen = [TARGETS[name] for name in dict.fromkeys(names)]
    for target in chosen:
        if reason := target.unavailable:
            raise TargetUnavailableError(
                f"--target {target.name} is not available here: {reason}",
                hint="use --target onnxruntime, or --target auto for what this machine can build",
            )
    return chosen


def check_options(options: BuildOptions, chosen: Sequence[Target]) -> None:
    """Refuse build options that none of the chosen targets has, or that cannot be had here.

    Raises:
        UsageError: names the option and the targets it is for.
        TargetUnavailableError: needs a GPU, and there is none.
    """
    for target in chosen:
        target.check(options)
    for field, flag in options.given().items():
        if not any(field in target.build_options for target in chosen):
            owners = [target.name for target in TARGETS.values() if field in target.build_options]
            raise UsageError(
                f"{flag} has no effect on {', '.join(target.name for target in chosen)}",
                hint=f"it is for --target {' and '.join(owners)}",
            )


def check_precisions(precisions: Sequence[str], chosen: Sequence[Target]) -> None:
    """Refuse a precision that a chosen target cannot have. Raises UsageError."""
    for target in chosen:
        for precision in precisions:
            if reason := why_not(target, precision):
                raise UsageError(
                    f"--precision {precision}: {target.name} cannot build it: {reason}",
                    hint="leave one of the two out",
                )


def quantized_tensors(graph: ir.Graph, kept: Set[str] = frozenset()) -> frozenset[str]:
    """Activations that any target quantizes: one calibration serves them all."""
    policies = {target.int8.place for target in TARGETS.values()}
    return frozenset(name for place in policies for name in place(graph, kept).activations)
