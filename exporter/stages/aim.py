"""Stage: leave float the layers that an accuracy needs, at the least time (`--aim`).

Layers are chosen on the select images. The verify images confirm the result once, in the gate.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from export_zoo.base import graph_io
from export_zoo.base.errors import UsageError
from export_zoo.base.machine import cpu_model, instruction_set
from export_zoo.calibration.images import ImageStream
from export_zoo.calibration.preprocess import Pixels, Preprocess, normalize
from export_zoo.calibration.ranges import Ranges
from export_zoo.engines.bundle.bench import Effort, run_in_turn
from export_zoo.engines.bundle.manifest import Aim, AimStep
from export_zoo.engines.diagnosis.counterparts import of_graphs, of_half
from export_zoo.engines.diagnosis.layers import PARTS, HalfLayers, Layers, QuantizedLayers
from export_zoo.engines.diagnosis.mixtures import Float32Array, Mixtures
from export_zoo.engines.diagnosis.ranking import Float64Array, effect, outputs
from export_zoo.engines.parity.limits import Limit, fitting, limits_of
from export_zoo.engines.parity.metrics import compare
from export_zoo.engines.parity.tasks import Head
from export_zoo.engines.precision.base import Precision
from export_zoo.engines.precision.fp16.precision import FP16
from export_zoo.engines.precision.int8.precision import INT8
from export_zoo.engines.precision.int8.saturation.channel_order import ChannelOrder, choose_order
from export_zoo.engines.precision.registry import BASELINE
from export_zoo.engines.precision.twin import write_twin
from export_zoo.engines.targets.base import Opening, Runner, Target
from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine
from export_zoo.engines.verification.gate import run_in_batches
from export_zoo.exporter import option_values
from export_zoo.exporter.options import ExportOptions, keep_float_option
from export_zoo.exporter.run.context import IMAGE_BATCH, Context
from export_zoo.exporter.stages.images import ChosenImages
from export_zoo.exporter.stages.tuning.tune import MAX_SELECT, Tuned
from export_zoo.exporter.stages.verify import limits_for

RANKED = 32
"""Number of select images on which layers are rounded alone."""

LEAST_COST = 0.002
"""Least cost of a layer, as a share of the engine's time: times of small layers are not as exact."""


def check_aim(wanted: option_values.Aim, head: Head, chosen: ChosenImages) -> None:
    """Refuse an aim that the outputs do not have, or that the images cannot tell from a perfect engine.

    Raises:
        UsageError: see above.
    """
    if not fitting({wanted.metric: wanted.value}, head):
        raise UsageError(
            f"--aim {wanted}: outputs of {head.task} have no {wanted.metric}",
            hint="give another metric, for example sqnr=30; docs/parity.md says which task has which",
        )
    if wanted.metric == "accuracy_drop" and (chosen.labels is None or chosen.select_labels is None):
        raise UsageError(f"--aim {wanted}: the images have no labels", hint="divide them into class folders")
    for name in ("select", "verify"):
        if (have := len(chosen.splits[name])) < wanted.images:
            raise UsageError(
                f"--aim {wanted}: {have} {name} images cannot tell it from a perfect engine: {wanted.images} are "
                "needed",
                hint="give more images (--calib, --verify-images), or an aim that is less fine, or sqnr=DECIBELS",
            )


_EFFORT = Effort(seconds=0.5, rounds_min=5, rounds_max=100)
"""For one engine: tens of them are timed."""

SAME_TIME = 0.03
"""Difference of times, as a share of the engine's time, that says nothing: medians vary by it."""


class Rounded(Protocol):
    """Writes the graphs of an engine, with more layers in float."""

    precision: Precision

    def write(self, out: Path, layers: frozenset[str]) -> object:
        """Write the precision graph with these layers in float."""

    def layers(self, graph: Path) -> tuple[Mixtures, Layers]:
        """The layers of the graph that `write` writes without layers in float, and mixtures of it."""

    def key(self) -> Mapping[str, Any]:
        """Everything that graphs depend on, but for versions of libraries."""


class Int8Graphs:
    """INT8 graphs of a target."""

    precision: Precision = INT8

    def __init__(self, options: ExportOptions, target: Target, tuned: Tuned) -> None:
        self._options, self._target, self._parts = options, target, tuned.parts

    @cached_property
    def _order(self) -> ChannelOrder | None:
        if not self._target.int8.sums_in_16_bits:
            return None
        return choose_order(graph_io.load(self._parts.graph).graph)

    def write(self, out: Path, layers: frozenset[str]) -> None:
        self._parts.with_float(layers).write(out, self._target, self._options, self._order)

    def layers(self, graph: Path) -> tuple[Mixtures, Layers]:
        keep_float = [*self._options.keep_float, *self._parts.kept]
        exact, rules = graph_io.load(self._parts.graph), self._target.int8
        pair = of_graphs(graph_io.load(graph), exact, rules, keep_float)
        mixtures = Mixtures(pair, integers=not self._target.compiled)
        return mixtures, QuantizedLayers(pair, rules, mixtures.roundings)

    def key(self) -> Mapping[str, Any]:
        return self._parts.key(self._target, self._options)


class HalfGraphs:
    """FP16 graphs, which are the same for all targets."""

    precision: Precision = FP16

    def __init__(self, graph: Path, ranges: Ranges | None, kept: frozenset[str]) -> None:
        self._graph, self._ranges, self._given = graph, ranges, kept
        self.nodes: Mapping[str, frozenset[str]] = {}
        """Names of the nodes of each layer."""

    def write(self, out: Path, layers: frozenset[str]) -> None:
        kept = self._given.union(*(self.nodes[layer] for layer in layers))
        FP16.write(self._graph, out, self._ranges, kept)

    def layers(self, graph: Path) -> tuple[Mixtures, Layers]:
        pair = of_half(graph_io.load(graph), graph_io.load(self._graph))
        mixtures = Mixtures(pair, integers=False)
        found = HalfLayers(pair, mixtures.roundings)
        self.nodes = found.nodes
        return mixtures, found

    def key(self) -> Mapping[str, Any]:
        digest = self._ranges.digest() if self._ranges is not None else None
        return {"ranges": digest, "kept": sorted(self._given)}


@dataclasses.dataclass(frozen=True)
class _Tried:
    """An engine with some layers in float.

    Attributes:
        value: the metric on the select images; an SQNR less the margin for other images.
        holds: whether the aim and the gate's limits hold.
        bytes: size of its graph.
        added_ms: see `_Clock`; None if the target cannot tell.
    """

    value: float
    holds: bool
    bytes: int
    added_ms: float | None


class _Search:
    """Engines of a target with some more layers in float, judged on the select images."""

    def __init__(
        self,
        context: Context,
        graph: Path,
        target: Target,
        graphs: Rounded,
        preprocess: Preprocess,
        head: Head,
        pixels: Pixels,
        labels: Sequence[int] | None,
        verified: int,
        limits: Mapping[str, float],
    ) -> None:
        options = context.options
        assert options.aim is not None
        self._target, self.graphs = target, graphs
        self._preprocess, self._head, self.pixels, self._labels = preprocess, head, pixels, labels
        self._verified = verified
        self.limit = Limit(options.aim.metric, options.aim.value)
        self._limits = [self.limit, *limits_of(limits)]
        """The aim, and the gate's own limits: it has to pass those, too."""
        self._reference = self._outputs(OnnxRuntimeEngine(graph, saturating_session={}))
        self._clock = _Clock(graph, normalize(pixels[:1], preprocess))
        self.tried: dict[frozenset[str], _Tried] = {}
        """By the layers in float."""
        self.ends = time.monotonic() + options.aim_seconds

    @property
    def late(self) -> bool:
        return time.monotonic() > self.ends

    def _outputs(self, engine: Runner) -> Float32Array:
        return run_in_batches(engine, self.pixels, self._preprocess, IMAGE_BATCH)[0]

    def __getitem__(self, layers: frozenset[str]) -> _Tried:
        """The engine with these layers in float, too."""
        if layers not in self.tried:
            self.tried[layers] = self._try(layers)
        return self.tried[layers]

    def _try(self, layers: frozenset[str]) -> _Tried:
        added_ms = None
        with tempfile.TemporaryDirectory(prefix="export-zoo-") as directory:
            graph = Path(directory) / "rounded.onnx"
            self.graphs.write(graph, layers)
            size = graph.stat().st_size
            engine: Runner
            if self._target.compiled:
                engine = OnnxRuntimeEngine(write_twin(graph, graph.with_name("twin.onnx")), fused=False)
            else:
                engine = self._target.open(Opening(graph, self.graphs.precision))
                timed = self._target.open(Opening(graph, self.graphs.precision, threads=1))
                added_ms = self._clock.added_ms(timed)
            found = self._outputs(engine)
        rows = self._head.rows
        metrics = compare(rows(self._reference), rows(found), self._labels, self._head)
        margin = _margin(effect(self._reference, found).noise, self._verified)
        metrics = dataclasses.replace(metrics, sqnr=metrics.sqnr - margin)
        return _Tried(
            value=float(getattr(metrics, self.limit.metric)),
            holds=all(limit.holds(metrics) is not False for limit in self._limits),
            bytes=size,
            added_ms=added_ms,
        )

    @property
    def ms(self) -> tuple[float | None, float | None]:
        """Time of the engine without layers of the aim in float, and of FP32; see `_Clock`."""
        return self._clock.ms

    def cheapest(self) -> frozenset[str] | None:
        """Of what was tried and holds, the fewest layers among those that add least time; None if nothing holds."""
        added = {layers: one.added_ms or 0.0 for layers, one in self.tried.items() if one.holds}
        most = min(added.values(), default=0.0) + SAME_TIME * (self.ms[0] or 0.0)
        return min((x for x in added if added[x] <= most), key=lambda x: (len(x), added[x]), default=None)

    def nearest(self) -> frozenset[str]:
        """Of what was tried, the layers with which the metric is nearest to the aim."""
        sign = 1 if self.limit.at_least else -1
        return max(self.tried, key=lambda layers: sign * self.tried[layers].value)


class _Clock:
    """Times engines on one image and one thread, in turn with the first one and with FP32.

    Engines are timed as they are: layers that are float alone cost conversions between float and 8 bits, too.
    """

    def __init__(self, graph: Path, image: Float32Array) -> None:
        self._fp32 = OnnxRuntimeEngine(graph, threads=1, saturating_session={})
        self._image = image
        self._first: Runner | None = None
        self.ms: tuple[float | None, float | None] = None, None
        """Of the first engine, and of FP32, in milliseconds."""

    def added_ms(self, engine: Runner) -> float:
        """Milliseconds that an engine takes longer than the first one, whose own time is the unit of the ratio."""
        if self._first is None:
            self._first = engine
            times = run_in_turn({"first": engine, "fp32": self._fp32}, self._image, _EFFORT)
            self.ms = (float(np.median(times["first"])) * 1e3, float(np.median(times["fp32"])) * 1e3)
            return 0.0
        times = run_in_turn({"first": self._first, "this": engine}, self._image, _EFFORT)
        assert self.ms[0] is not None
        return self.ms[0] * (float(np.median(times["this"] / times["first"])) - 1)


CONFIDENCE = 2.13
"""One-sided quantile of the normal distribution for 1 - 0.05 / 3: so 19 of 20 aims hold on the verify images, too,
though the cheapest of three orders' results is taken (Bonferroni's inequality)."""


def _margin(noise: Float64Array, verified: int) -> float:
    """Decibels that an SQNR must be better by here, so that it holds on other images.

    Args:
        noise: by image, float64 [N].
        verified: number of the other images.
    """
    mean = float(noise.mean())
    if not np.isfinite(mean) or mean == 0:
        return 0.0
    error = float(noise.std(ddof=1)) * math.sqrt(1 / len(noise) + 1 / verified)
    return 10 * math.log10(1 + CONFIDENCE * error / mean)


def aim(
    context: Context,
    graph: Path,
    chosen: ChosenImages,
    preprocess: Preprocess,
    head: Head,
    target: Target,
    graphs: Rounded,
) -> Aim:
    """The layers of an engine that `--aim` needs in float.

    Args:
        graph: the FP32 graph.
        head: meaning of the first output.
    """
    options, wanted = context.options, context.options.aim
    assert wanted is not None
    assert options.calib is not None
    files = chosen.splits["select"][: max(MAX_SELECT, wanted.images)]
    labelled = len(files) if chosen.select_labels is not None else 0
    limits = limits_for(options.tolerances, target.name, graphs.precision.name, head, labelled)

    def make(_: Path) -> Aim:
        assert options.calib is not None
        pixels = ImageStream(files, preprocess, IMAGE_BATCH, options.calib).all()
        labels = chosen.select_labels[: len(files)] if chosen.select_labels is not None else None
        verified = len(chosen.splits["verify"])
        search = _Search(context, graph, target, graphs, preprocess, head, pixels, labels, verified, limits)
        return _aim(context, search, graph, target, normalize(pixels[:RANKED], preprocess), wanted)

    name = f"{target.name}-{graphs.precision.name}"
    with context.reporter.stage("aim") as stage:
        key = context.key(
            "onnxruntime",
            "onnx_ir",
            "numpy",
            graph=graph_io.sha256_of(graph),
            engine=name,
            parts=graphs.key(),
            select=[file.sha256 for file in files],
            labels=chosen.select_labels,
            preprocess=preprocess.model_dump(),
            head=dataclasses.asdict(head),
            aim=str(wanted),
            limits=limits,
            seconds=options.aim_seconds,
            isa=instruction_set(),
            machine=cpu_model(),  # times decide, too
        )
        result = context.cache.run("aim", key, make, Aim)
        found, stage.cached = result.data, result.cached
        option = keep_float_option(quantized=graphs.precision.quantized)
        stage.detail = f"{name}: {_described(found, option)}"
    if found.slower_than_fp32:
        context.reporter.warn(
            f"--aim {wanted}: {name} takes {found.ms_with(found):.2f} ms for one image on one thread, FP32 "
            f"{found.fp32_ms:.2f} ms: use FP32 on this machine"
        )
    if not found.reached:
        context.reporter.warn(
            f"--aim {wanted}: not reached by {name} on the select images; nearest: {found.select:.4g} with "
            f"{len(found.modules)} layers in float (one at least stays as it is)"
        )
    return found


def _described(found: Aim, option: str) -> str:
    """An aim for people.

    Args:
        option: which names its layers.
    """
    if not found.layers:
        return f"{found.metric} {found.select:.4g} on the select images, no layer in float for it"
    ms, time_text = found.ms_with(found), ""
    if ms is not None:
        time_text = f", {found.added_ms:+.2f} ms to {ms:.2f} (FP32 {found.fp32_ms:.2f})"
    names = " ".join(f"{option} {module}" for module in found.modules)
    return (
        f"{found.metric} {found.select:.4g} on the select images with {len(found.modules)} layers in float{time_text}, "
        f"+{found.added_bytes / 1e6:.1f} MB: {names}"
    )


def _aim(
    context: Context,
    search: _Search,
    graph: Path,
    target: Target,
    few: Float32Array,
    wanted: option_values.Aim,
) -> Aim:
    nothing = frozenset[str]()
    modules: dict[str, str] = {}
    nodes: dict[str, frozenset[str]] = {}  # of layers; profiled below, if any has to be float

    def chosen_as(layers: frozenset[str], *, reached: bool) -> Aim:
        ordered = [layer for layer in modules if layer in layers]
        ms, fp32_ms = search.ms
        return Aim(
            metric=wanted.metric,
            value=wanted.value,
            layers=[node for layer in ordered for node in sorted(nodes[layer])],
            modules=[modules[layer] for layer in ordered],
            reached=reached,
            select=search[layers].value,
            images=len(search.pixels),
            ms=ms,
            fp32_ms=fp32_ms,
            added_ms=search[layers].added_ms,
            added_bytes=search[layers].bytes - search[nothing].bytes,
            tried=[
                AimStep(layers=len(floats), added_ms=one.added_ms, value=one.value)
                for floats, one in sorted(search.tried.items(), key=lambda item: len(item[0]))
            ],
        )

    if search[nothing].holds:
        return chosen_as(nothing, reached=True)
    rounded = context.cache.scratch() / "rounded.onnx"  # mixtures read it later
    search.graphs.write(rounded, nothing)
    mixtures, which = search.graphs.layers(rounded)
    modules |= {layer.name: layer.module for layer in which.layers}
    nodes |= which.nodes
    costs, timed = _costs(target, search.graphs.precision, graph, rounded, few[:1], nodes)
    batches = [few[i : i + IMAGE_BATCH] for i in range(0, len(few), IMAGE_BATCH)]
    exact, noise = outputs(mixtures.open(()), batches), dict[str, float]()
    with context.reporter.bar("aim", len(modules)) as progress:
        for layer in modules:
            noise[layer] = float(
                effect(exact, outputs(mixtures.open(which.rounded([layer])), batches)).noise.sum()
            )
            progress(1)
    least = LEAST_COST * timed if timed else 1.0

    def gain(layers: Sequence[str]) -> float:
        """Noise that goes for each millisecond that layers take longer in float."""
        cost = max(sum(costs.get(layer, 0.0) for layer in layers), least * len(layers))
        return sum(noise[layer] for layer in layers) / cost

    single = [[layer] for layer in modules]
    orders = [sorted(single, key=gain, reverse=True)]
    if timed:  # otherwise the first order is this one
        orders.append(sorted(single, key=lambda layers: noise[layers[0]], reverse=True))
    orders.append(sorted(_blocks(modules), key=gain, reverse=True))
    for order in orders:
        if not search.late:
            _bisect(search, order)
    found = search.cheapest()
    if found is None:
        return chosen_as(search.nearest(), reached=False)
    return chosen_as(found, reached=True)


def _bisect(search: _Search, order: Sequence[Sequence[str]]) -> None:
    """Find how many of the first groups of layers have to be float. All but one may: an INT8 engine has one layer."""

    def first(count: int) -> frozenset[str]:
        return frozenset(layer for group in order[:count] for layer in group)

    low, high = 0, len(order) - 1
    if not search[first(high)].holds:
        return
    while low + 1 < high and not search.late:
        middle = (low + high) // 2
        low, high = (low, middle) if search[first(middle)].holds else (middle, high)


def _blocks(modules: Mapping[str, str]) -> list[list[str]]:
    """Layers by the deepest parent modules that have two layers each, in the mean: inside, nothing is converted.

    Args:
        modules: module of each layer.
    """
    paths = {layer: module.split(".") for layer, module in modules.items()}
    found: dict[tuple[str, ...], list[str]] = {}
    for depth in range(max(map(len, paths.values()), default=1), 0, -1):
        found = {}
        for layer, path in paths.items():
            found.setdefault(tuple(path[:depth]), []).append(layer)
        if 2 * len(found) <= len(paths):
            break
    return list(found.values())


def _costs(
    target: Target,
    precision: Precision,
    graph: Path,
    rounded: Path,
    image: Float32Array,
    nodes: Mapping[str, Collection[str]],
) -> tuple[dict[str, float], float]:
    """Time that each layer takes longer in float, in ms; and the rounded engine's time, 0 if not known.

    Args:
        nodes: names of the nodes of each layer.
    """
    after, before = (
        target.node_times(Opening(file, of), image) for file, of in ((graph, BASELINE), (rounded, precision))
    )
    if not before:
        return {}, 0.0

    def of(times: Mapping[str, float], layer: str) -> float:
        return sum(times.get(f"{node}{part}", 0.0) for node in nodes[layer] for part in PARTS)

    return {layer: of(after, layer) - of(before, layer) for layer in nodes}, sum(before.values())
