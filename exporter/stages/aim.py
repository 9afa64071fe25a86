"""Stage: leave float the layers that an accuracy needs, those that cost least time first (`--aim`).

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
from export_zoo.engines.bundle.manifest import Aim, AimStep
from export_zoo.engines.diagnosis.counterparts import of_graphs, of_half
from export_zoo.engines.diagnosis.layers import PARTS, HalfLayers, Layers, QuantizedLayers
from export_zoo.engines.diagnosis.mixtures import Float32Array, Mixtures
from export_zoo.engines.diagnosis.ranking import Float64Array, effect, outputs
from export_zoo.engines.parity.limits import Limit, fitting
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
from export_zoo.exporter.options import ExportOptions
from export_zoo.exporter.run.context import IMAGE_BATCH, Context
from export_zoo.exporter.stages.images import ChosenImages
from export_zoo.exporter.stages.tuning.tune import MAX_SELECT, Tuned

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

    def __init__(self, graph: Path, ranges: Ranges | None) -> None:
        self._graph, self._ranges = graph, ranges
        self.nodes: Mapping[str, frozenset[str]] = {}
        """Names of the nodes of each layer."""

    def write(self, out: Path, layers: frozenset[str]) -> None:
        kept = frozenset[str]().union(*(self.nodes[layer] for layer in layers))
        FP16.write(self._graph, out, self._ranges, kept)

    def layers(self, graph: Path) -> tuple[Mixtures, Layers]:
        pair = of_half(graph_io.load(graph), graph_io.load(self._graph))
        mixtures = Mixtures(pair, integers=False)
        found = HalfLayers(pair, mixtures.roundings)
        self.nodes = found.nodes
        return mixtures, found

    def key(self) -> Mapping[str, Any]:
        return {"ranges": self._ranges.digest() if self._ranges is not None else None}


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
    ) -> None:
        assert context.options.aim is not None
        self._target, self.graphs = target, graphs
        self._preprocess, self._head, self.pixels, self._labels = preprocess, head, pixels, labels
        self._verified = verified
        self.limit = Limit(context.options.aim.metric, context.options.aim.value)
        self._reference = self._outputs(OnnxRuntimeEngine(graph, saturating_session={}))
        self.known: dict[frozenset[str], float] = {}
        self.bytes: dict[frozenset[str], int] = {}
        self.ends = time.monotonic() + context.options.aim_seconds

    @property
    def late(self) -> bool:
        return time.monotonic() > self.ends

    def _outputs(self, engine: Runner) -> Float32Array:
        return run_in_batches(engine, self.pixels, self._preprocess, IMAGE_BATCH)[0]

    def value(self, layers: frozenset[str]) -> float:
        """The metric with these layers in float, too; an SQNR less the margin for other images."""
        if layers not in self.known:
            with tempfile.TemporaryDirectory(prefix="export-zoo-") as directory:
                graph = Path(directory) / "rounded.onnx"
                self.graphs.write(graph, layers)
                self.bytes[layers] = graph.stat().st_size
                engine: Runner
                if self._target.compiled:
                    engine = OnnxRuntimeEngine(write_twin(graph, graph.with_name("twin.onnx")), fused=False)
                else:
                    engine = self._target.open(Opening(graph, self.graphs.precision))
                found = self._outputs(engine)
            rows = self._head.rows
            metrics = compare(rows(self._reference), rows(found), self._labels, self._head)
            value = float(getattr(metrics, self.limit.metric))
            if self.limit.metric == "sqnr":
                value -= _margin(effect(self._reference, found).noise, self._verified)
            self.known[layers] = value
        return self.known[layers]

    def holds(self, layers: frozenset[str]) -> bool:
        value = self.value(layers)
        return value >= self.limit.value if self.limit.at_least else value <= self.limit.value


CONFIDENCE = 1.645
"""One-sided quantile of the normal distribution: 19 of 20 aims that hold here hold on the verify images, too."""


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

    def make(_: Path) -> Aim:
        assert options.calib is not None
        pixels = ImageStream(files, preprocess, IMAGE_BATCH, options.calib).all()
        labels = chosen.select_labels[: len(files)] if chosen.select_labels is not None else None
        verified = len(chosen.splits["verify"])
        search = _Search(context, graph, target, graphs, preprocess, head, pixels, labels, verified)
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
            seconds=options.aim_seconds,
            isa=instruction_set(),
            machine=cpu_model(),  # times decide, too
        )
        result = context.cache.run("aim", key, make, Aim)
        found, stage.cached = result.data, result.cached
        stage.detail = f"{name}: {_described(found, options=graphs.precision.quantized)}"
    if not found.reached:
        context.reporter.warn(
            f"--aim {wanted}: not reached by {name} on the select images; nearest: {found.select:.4g} with "
            f"{len(found.modules)} layers in float (one at least stays as it is)"
        )
    return found


def _described(found: Aim, *, options: bool) -> str:
    """An aim for people.

    Args:
        options: whether --keep-float names its layers.
    """
    if not found.layers:
        return f"{found.metric} {found.select:.4g} on the select images, no layer in float for it"
    time_text = f", {found.added_ms:+.2f} ms" if found.added_ms is not None else ""
    names = (
        " ".join(f"--keep-float {module}" for module in found.modules)
        if options
        else ", ".join(found.modules)
    )
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
    rounded = context.cache.scratch() / "rounded.onnx"  # mixtures read it later
    search.graphs.write(rounded, nothing)
    mixtures, which = search.graphs.layers(rounded)
    modules = {layer.name: layer.module for layer in which.layers}
    nodes = which.nodes
    costs, timed = _costs(target, search.graphs.precision, graph, rounded, few[:1], nodes)

    def chosen_as(layers: frozenset[str], *, reached: bool) -> Aim:
        ordered = [layer for layer in modules if layer in layers]
        return Aim(
            metric=wanted.metric,
            value=wanted.value,
            layers=[node for layer in ordered for node in sorted(nodes[layer])],
            modules=[modules[layer] for layer in ordered],
            reached=reached,
            select=search.value(layers),
            images=len(search.pixels),
            added_ms=sum(costs.get(layer, 0.0) for layer in layers) if timed else None,
            added_bytes=search.bytes[layers] - search.bytes[nothing],
            tried=[
                AimStep(
                    layers=len(tried),
                    added_ms=sum(costs.get(layer, 0.0) for layer in tried) if timed else None,
                    value=value,
                )
                for tried, value in sorted(search.known.items(), key=lambda item: len(item[0]))
            ],
        )

    if search.holds(nothing):
        return chosen_as(nothing, reached=True)
    batches = [few[i : i + IMAGE_BATCH] for i in range(0, len(few), IMAGE_BATCH)]
    exact, noise = outputs(mixtures.open(()), batches), dict[str, float]()
    with context.reporter.bar("aim", len(modules)) as progress:
        for layer in modules:
            noise[layer] = float(
                effect(exact, outputs(mixtures.open(which.rounded([layer])), batches)).noise.sum()
            )
            progress(1)
    least = LEAST_COST * timed if timed else 1.0

    def worth(layer: str) -> float:
        return noise[layer] / max(costs.get(layer, 0.0), least)

    found = []
    for order in (
        sorted(modules, key=worth, reverse=True),
        sorted(modules, key=noise.__getitem__, reverse=True),
    ):
        # All layers but one: an INT8 engine has one at least.
        low, high = 0, len(order) - 1
        if not search.holds(frozenset(order[:high])):
            continue
        while low + 1 < high and not search.late:
            middle = (low + high) // 2
            low, high = (low, middle) if search.holds(frozenset(order[:middle])) else (middle, high)
        found.append(frozenset(order[:high]))
        if search.late or not timed:  # without times, both orders are the same
            break
    if not found:
        return chosen_as(max(search.known, key=lambda layers: _nearness(search, layers)), reached=False)
    return chosen_as(
        min(found, key=lambda layers: (sum(costs.get(x, 0.0) for x in layers), len(layers))), reached=True
    )


def _nearness(search: _Search, layers: frozenset[str]) -> float:
    value = search.value(layers)
    return value if search.limit.at_least else -value


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
