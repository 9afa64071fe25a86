"""All targets. To add one, add a folder beside this file and a line here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING

from export_zoo.base.errors import TargetUnavailableError, UsageError
from export_zoo.engines.precision.registry import PRECISIONS
from export_zoo.engines.targets.base import Target
from export_zoo.engines.targets.onnxruntime.target import OnnxRuntime
from export_zoo.engines.targets.openvino.target import OpenVino
from export_zoo.engines.targets.options import BuildOptions
from export_zoo.engines.targets.tensorrt.target import TensorRT, TensorRTRTX

if TYPE_CHECKING:
    import onnx_ir as ir

TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        OnnxRuntime(),
        OpenVino(),
        TensorRT(),
        TensorRTRTX(),
    )
}
"""Targets by name."""

BASELINE_TARGET = TARGETS["onnxruntime"]
"""Runs the FP32 graph that engines are timed beside."""

AUTO = "auto"
AUTOMATIC: Sequence[str] = tuple(TARGETS)
"""Names of the targets that `auto` chooses from."""


def why_not(target: Target, precision: str) -> str:
    """Why a target does not support a precision; empty if it does."""
    return target.unsupported.get(precision, "") or PRECISIONS[precision].unsupported.get(target.name, "")


def _automatic() -> list[Target]:
    """Targets that are available here, except those whose preferred target is available too."""
    available = [TARGETS[name] for name in AUTOMATIC if not TARGETS[name].unavailable]
    names = [target.name for target in available]
    return [target for target in available if target.preferred not in names]


def choose(names: Sequence[str]) -> list[Target]:
    """The requested targets, each once. `auto` stands for the targets that are available here.

    Raises:
        UsageError: unknown name, or `auto` together with others.
        TargetUnavailableError: a named target is not available here, or `auto` finds none.
    """
    for name in names:
        if name not in TARGETS and name != AUTO:
            raise UsageError(f"--target {name}: unknown", hint=f"choose from {', '.join([*TARGETS, AUTO])}")
    if AUTO in names:
        if set(names) != {AUTO}:
            raise UsageError(
                "--target auto cannot be combined with other targets",
                hint="use --target auto alone, or name each target",
            )
        available = _automatic()
        if not available:
            reasons = "; ".join(f"{t.name}: {t.unavailable}" for t in TARGETS.values())
            raise TargetUnavailableError(
                f"--target auto: no target is available here: {reasons}", hint="install one of them"
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
    """Refuse build options that no chosen target supports, or that this machine does not support.

    Raises:
        UsageError: no chosen target supports an option; names the option and the targets it is for.
        TargetUnavailableError: an option needs a GPU, and there is none.
    """
    for target in chosen:
        target.check(options)
    for field, flag in options.given().items():
        if not any(field in target.build_options for target in chosen):
            owners = [target.name for target in TARGETS.values() if field in target.build_options]
            raise UsageError(
                f"{flag} has no effect on {', '.join(target.name for target in chosen)}",
                hint=f"leave it out, or use --target {' or '.join(owners)}",
            )


def check_precisions(precisions: Sequence[str], chosen: Sequence[Target]) -> None:
    """Refuse a precision that a chosen target does not support. Raises UsageError."""
    for target in chosen:
        for precision in precisions:
            if reason := why_not(target, precision):
                raise UsageError(
                    f"--precision {precision}: {target.name} cannot build it: {reason}",
                    hint="leave out this precision or this target",
                )


def choose_for(names: Sequence[str], options: BuildOptions, precisions: Sequence[str]) -> list[Target]:
    """The targets of `choose`, if they can have these options and precisions; raises what the three checks raise."""
    chosen = choose(names)
    check_options(options, chosen)
    check_precisions(precisions, chosen)
    return chosen


def quantized_tensors(graph: ir.Graph, kept: Set[str] = frozenset()) -> frozenset[str]:
    """Activations that any target quantizes, so that one calibration serves all targets."""
    policies = {target.int8.place for target in TARGETS.values()}
    return frozenset(name for place in policies for name in place(graph, kept).activations)
