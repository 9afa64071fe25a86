"""Stage: tune INT8 of each target on the *select* images, which are not used to calibrate or verify."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np

from export_zoo.base import graph_io
from export_zoo.base.machine import instruction_set
from export_zoo.calibration.images import ImageStream
from export_zoo.calibration.methods import METHODS
from export_zoo.calibration.preprocess import Preprocess
from export_zoo.calibration.ranges import Ranges
from export_zoo.engines.bundle.manifest import StepName, Tuning, TuningStep
from export_zoo.engines.precision.int8.equalize import STRENGTHS
from export_zoo.engines.precision.int8.keep_float import kept_float
from export_zoo.engines.precision.int8.names import APPROXIMATE, GATES, OFF
from export_zoo.engines.precision.int8.precision import INT8
from export_zoo.engines.targets.base import Target
from export_zoo.engines.targets.float_for_speed import FloatForSpeed
from export_zoo.engines.targets.registry import TARGETS
from export_zoo.exporter.run.context import IMAGE_BATCH, Context
from export_zoo.exporter.stages.images import ChosenImages
from export_zoo.exporter.stages.tuning.candidates import Candidate, Evaluator, Store
from export_zoo.exporter.stages.tuning.gain import gain
from export_zoo.exporter.stages.tuning.int8_parts import Int8Parts

WANTED: dict[StepName, tuple[float, float]] = {
    "equalize": (2.0, 0.0),
    "relu6": (2.0, 0.0),
    "round": (-1.0, 0.0),
    "bias": (0.0, 0.0),
    "method": (3.0, 0.0),
    "float": (1.0, 0.5),
}
"""Least gain of each step: a number of standard errors plus a number of decibels. Other scales round other values, with
better or worse results by chance, and the best of ten methods is better by luck. A bias correction removes a known
error. Rounding's gain is large and known in advance; the few select images only must not contradict it. Layers in float
cost time (`int8.md`)."""

MOST_LOST = 1.5
"""Largest loss of a step in decibels, whatever its standard error."""

FAR_BEHIND = 3.0
"""Distance from the best candidate of a step, in decibels, at which a candidate is not tried again in a later one."""

DROWNED = 6.0
"""SQNR in decibels below which comparing candidates tells nothing. MobileNetV2 with ImageNet weights has 8."""

CLEAR = 2.0
"""Distance from the least gain, in standard errors, at which no more images are tried."""

MIN_SELECT, MAX_SELECT, MAX_PIXELS = 32, 128, 128 * 64 * 64
"""Limits of the images that candidates are tried on. Large images are limited by their pixels, since TensorRT's graphs
run unfused here. A close decision is tried on up to MAX_SELECT images."""

ON = "on"


@dataclass(frozen=True)
class Effort:
    """How much is tried."""

    strengths: tuple[str, ...]
    """Strengths of equalization."""
    statistics: int
    """Number of images for the statistics of layers' inputs."""
    thorough: bool
    """Whether the method is tried for single tensors, too, and exact equalization beside that through ReLU6."""


EFFORT = {
    "default": Effort((str(STRENGTHS[0]),), 128, thorough=False),
    "high": Effort((*map(str, STRENGTHS), GATES), 256, thorough=True),
}
"""By the names of `options.EFFORTS`. docs/int8.md shows what they reach in what time."""


@dataclass(frozen=True)
class Tuned:
    """The parts of the INT8 graph of one target, and the tuning that chose them."""

    parts: Int8Parts
    tuning: Tuning | None
    float_for_speed: FloatForSpeed | None = None


@dataclass(frozen=True)
class Choices:
    """The candidate of each target, with the steps that led to it."""

    images: int
    """Number of select images that candidates were compared on."""
    targets: dict[str, tuple[Candidate, list[TuningStep]]]


class _Choosing:
    """Runs the steps for one target. Each starts from the result of the previous one."""

    def __init__(self, evaluator: Evaluator, target: Target, candidate: Candidate) -> None:
        self._evaluator, self._target = evaluator, target
        self.candidate = candidate
        self.steps: list[TuningStep] = []

    def far_behind(self, name: StepName, candidate: str) -> bool:
        """Whether a candidate was too far behind the best one of an earlier step of this name to be tried again."""
        return any(
            step.sqnr.get(candidate, math.inf) < max(step.sqnr.values()) - FAR_BEHIND
            for step in self.steps
            if step.name == name
        )

    def step(self, name: StepName, default: str, candidates: Mapping[str, Candidate]) -> None:
        """Choose the best candidate if it is better than the default by more than chance, otherwise the default.

        If there is none but the default (all others were far behind before), no step is recorded.
        """
        if candidates.keys() == {default}:
            return
        figures = {what: self._evaluator.sqnr(c, self._target) for what, c in candidates.items()}
        best = max((what for what in figures if what != default), key=lambda what: figures[what])
        errors, decibels = WANTED[name]
        count = self._evaluator.few
        while True:
            before, after = (
                self._evaluator.noise(candidates[what], self._target, count) for what in (default, best)
            )
            found = gain(before, after)
            above = found.decibels - decibels - errors * found.error
            if abs(above) > CLEAR * found.error or count == self._evaluator.images:
                break
            count = min(2 * count, self._evaluator.images)
        # One image that is far worse makes the standard error large, and equal candidates have none.
        worthy = bool(np.isfinite(after).all()) and found.decibels > (0 if errors > 0 else -MOST_LOST)
        # Of a drowned signal, a method shows what it does to the worst layers only, which --aim may leave float.
        blind = name == "method" and figures[best] < DROWNED
        chosen = best if above >= 0 and worthy and not blind else default
        self.candidate = candidates[chosen]
        kept = [layer for layer in self.candidate.kept if layer not in candidates[default].kept]
        concerned = {"method": self.candidate.clipped, "float": kept}.get(name, ())
        self.steps.append(
            TuningStep(
                name=name,
                chosen=chosen,
                sqnr=figures,
                names=[*concerned],
                best=best,
                gain=found.decibels,
                standard_error=found.error,
                images=count,
            )
        )


def _tune(
    evaluator: Evaluator,
    target: Target,
    steps: Sequence[str],
    method: str,
    effort: Effort,
    kept: tuple[str, ...] = (),
) -> _Choosing:
    """Run the steps for one target; returns the choices with the figures of all candidates.

    Args:
        kept: patterns of layers that stay float whatever is chosen.
    """
    start = Candidate(method="minmax" if method == "auto" else method, kept=kept)
    choosing = _Choosing(evaluator, target, start)

    def now(**change: Any) -> Candidate:
        return choosing.candidate.model_copy(update=change)

    def methods(default: str, more: Mapping[str, Candidate]) -> None:
        names = [name for name in METHODS if name == default or not choosing.far_behind("method", name)]
        candidates = {name: now(method=name, clipped=()) for name in names}
        choosing.step("method", default, {**candidates, **more})

    if method == "auto" and steps:  # while ranges are far too wide, their errors hide what other steps gain
        methods("minmax", {})

    def equalize() -> None:
        if strengths := evaluator.equalized:
            choosing.step("equalize", OFF, {s: now(strength=s) for s in (OFF, *strengths)})

    # Equalization through ReLU6 includes the other. Where channels differ so much that errors drown the signal, they
    # hide what all steps before it would gain.
    first = "equalize" in steps and (
        effort.thorough
        or evaluator.sqnr(choosing.candidate, target) < DROWNED
        or not evaluator.approximated(choosing.candidate, target)
    )
    if first:
        equalize()
    if "round" in steps:
        choosing.step("round", OFF, {OFF: now(), ON: now(rounded=True)})
    if "bias" in steps:  # corrects the error that rounding leaves
        choosing.step("bias", OFF, {OFF: now(), ON: now(bias=True)})

    def methods_again() -> None:
        if choosing.steps and choosing.steps[-1].name == "method":  # nothing has changed since
            return
        clipped = tuple(evaluator.clipped(choosing.candidate.strength, target)) if effort.thorough else ()
        counts = [2**i for i in range(len(clipped).bit_length()) if 2**i < len(clipped)]
        some = {f"mse on {count}": now(method="minmax", clipped=clipped[:count]) for count in counts}
        methods(choosing.candidate.method, some)

    if method == "auto":
        methods_again()
    if "equalize" in steps:
        if evaluator.approximated(choosing.candidate, target):
            # Last: its gain shows only once weights are rounded and outliers clipped, which hide it otherwise.
            choosing.step("relu6", OFF, {OFF: now(), ON: now(strength=APPROXIMATE)})
        if choosing.candidate.strength == OFF and not first:
            equalize()

    def in_float(end: str, choices: Sequence[Sequence[str]]) -> bool:
        """Whether one of the choices of layers at an end of the network stays float."""
        before = choosing.candidate.kept
        some = {_at(end, layers): (*before, *(la for la in layers if la not in before)) for layers in choices}
        possible = {
            what: now(kept=layers) for what, layers in some.items() if evaluator.leaves_some(layers, target)
        }
        if possible:
            choosing.step("float", OFF, {OFF: now(), **possible})
        return choosing.candidate.kept != before

    if "float" in steps:
        begin = [evaluator.first] if any(layer not in kept for layer in evaluator.first) else []
        if in_float("first", begin) and method == "auto":
            methods_again()
        if target.int8.half:  # on the CPU they would cost four times the memory traffic
            in_float("last", evaluator.classifiers())
    return choosing


def tune(
    context: Context,
    graph: Path,
    ranges: Ranges,
    chosen: ChosenImages,
    preprocess: Preprocess,
    targets: Sequence[Target],
    *,
    random: bool,
) -> dict[str, Tuned]:
    """Tune INT8 of each target; returns the parts by target name.

    With random weights, nothing is tried: the figures would only show rounding errors in chaotic networks.
    """
    options = context.options
    model = graph_io.load(graph).graph
    given = kept_float(model, options.keep_float)
    fast = {target.name: target.float_for_speed(model, given, options.costs) for target in targets}
    kept = {name: tuple(map(escape, found.layers if found else ())) for name, found in fast.items()}
    looked_up = [found for found in fast.values() if found is not None]
    if options.costs is not None and looked_up and not any(found.layers for found in looked_up):
        context.reporter.warn(f"--costs {options.costs}: has no region of this network at this input size")
    wanted = options.steps or options.method == "auto"
    if random or not wanted or options.calib is None:
        if wanted and not random:
            context.reporter.warn(
                "without --calib there are no images to select on: INT8 is not tuned (--steps, --method auto)"
            )
        method = "minmax" if options.method == "auto" else options.method
        return {
            name: Tuned(Int8Parts(graph, ranges, method, kept=kept[name]), None, found)
            for name, found in fast.items()
        }
    affordable = MAX_PIXELS // (preprocess.crop_height * preprocess.crop_width)
    files = chosen.splits["select"][:MAX_SELECT]
    few = min(MAX_SELECT, max(MIN_SELECT, affordable))

    def make(directory: Path) -> Choices:
        assert options.calib is not None
        store = Store(directory, graph, ranges)
        pixels = ImageStream(files, preprocess, IMAGE_BATCH, options.calib).all()
        effort = EFFORT[options.effort]
        evaluator = Evaluator(
            context, store, chosen, preprocess, pixels, few, effort.strengths, effort.statistics
        )
        found = {t: _tune(evaluator, t, options.steps, options.method, effort, kept[t.name]) for t in targets}
        store.keep([(choosing.candidate, target) for target, choosing in found.items()])
        return Choices(
            evaluator.few,
            {target.name: (choosing.candidate, choosing.steps) for target, choosing in found.items()},
        )

    with context.reporter.stage("tune") as stage:
        key = context.key(
            "onnxruntime",
            "onnx_ir",
            "numpy",
            "pillow",
            graph=graph_io.sha256_of(graph),
            ranges=ranges.digest(),
            calibrate=[file.sha256 for file in chosen.splits["calibrate"]],
            select=[file.sha256 for file in files],
            targets=[target.name for target in targets],
            options=[options.steps, options.method, options.effort, options.keep_float],
            kept=kept,
            isa=instruction_set(),
        )
        result = context.cache.run("tune", key, make, Choices)
        stage.cached = result.cached
        store = Store(result.directory, graph, ranges)
        tuned = {}
        for name, (candidate, steps) in result.data.targets.items():
            tuning = Tuning(images=result.data.images, steps=steps)
            tuned[name] = Tuned(store.parts(candidate, TARGETS[name]), tuning, fast[name])
        stage.detail = "; ".join(
            f"{name}-{INT8.name} {_describe(found.tuning)}" for name, found in tuned.items() if found.tuning
        )
        asked = {step.images or 0 for found in tuned.values() if found.tuning for step in found.tuning.steps}
        few, most = result.data.images, max(asked, default=0)
        stage.detail += "".join(
            f"; {name}-{INT8.name}: {_count(found.layers)} float for speed"
            for name, found in fast.items()
            if found is not None and found.layers
        )
        stage.detail += f", on {few} images" if most <= few else f", on {few} to {most} images"
    return tuned


def _at(end: str, layers: Sequence[str]) -> str:
    """Name of layers at an end of the network: `last layer`, `first 2 layers`."""
    return f"{end} layer" if len(layers) == 1 else f"{end} {_count(layers)}"


def _count(layers: Sequence[str]) -> str:
    return f"{len(layers)} layer{'s' if len(layers) != 1 else ''}"


def _describe(tuning: Tuning) -> str:
    parts: list[str] = []
    method = "minmax"
    for step in tuning.steps:
        before = method if step.name == "method" else OFF
        what = {
            "equalize": f"equalized {step.chosen}",
            "relu6": "equalized through ReLU6",
            "bias": "biases corrected",
            "method": step.chosen,
            "round": "weights rounded",
            "float": f"{step.chosen} float",
        }
        if step.chosen != before:
            parts.append(f"{what[step.name]} {step.gain or 0.0:+.1f} dB")
        if step.name == "method":
            method = step.chosen
    if any(step.name == "method" for step in tuning.steps) and method == "minmax":
        parts.append(method)
    return ", ".join(parts) or "unchanged"
