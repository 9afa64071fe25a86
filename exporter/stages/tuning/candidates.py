"""INT8 candidates of a target: makes the parts of each once, and measures it on the select images."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from glob import escape
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict
from safetensors.numpy import save_file

from export_zoo.base import graph_io
from export_zoo.calibration.collect import channel_magnitudes, collect
from export_zoo.calibration.kept_images import KeptStream
from export_zoo.calibration.preprocess import Pixels, Preprocess
from export_zoo.calibration.ranges import Ranges
from export_zoo.engines.parity.metrics import WITHOUT_NOISE, check_reference
from export_zoo.engines.parity.outputs import as_rows
from export_zoo.engines.precision.int8.clipping import worth_clipping
from export_zoo.engines.precision.int8.equalize import equalize_as, observed, scaled_tensors
from export_zoo.engines.precision.int8.keep_float import kept_float
from export_zoo.engines.precision.int8.names import APPROXIMATE, OFF
from export_zoo.engines.precision.int8.precision import INT8
from export_zoo.engines.precision.int8.rounding import rounding
from export_zoo.engines.precision.int8.saturation.channel_order import ChannelOrder, choose_order
from export_zoo.engines.precision.placement import classifier_layers, first_layers
from export_zoo.engines.precision.twin import write_twin
from export_zoo.engines.targets.base import Opening, Runner, Target
from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine
from export_zoo.engines.targets.registry import quantized_tensors
from export_zoo.engines.verification.gate import run_in_batches
from export_zoo.exporter.run.context import IMAGE_BATCH, Context
from export_zoo.exporter.stages.images import ChosenImages
from export_zoo.exporter.stages.tuning.gain import Float64Array
from export_zoo.exporter.stages.tuning.input_statistics import InputStatistics
from export_zoo.exporter.stages.tuning.int8_parts import Int8Parts

FEW_IMAGES = 64
"""Number of images for channels' magnitudes that the ranges lack."""


class Candidate(BaseModel):
    """One INT8 configuration of a target; see `tuning.int8_parts.Int8Parts` for the parts."""

    model_config = ConfigDict(frozen=True)

    strength: str = OFF
    """Strength of equalization."""
    bias: bool = False
    method: str = "minmax"
    clipped: tuple[str, ...] = ()
    rounded: bool = False
    kept: tuple[str, ...] = ()


@dataclass(frozen=True)
class Store:
    """Paths of the parts of candidates, so that a cached stage finds them again."""

    directory: Path
    graph: Path
    ranges: Ranges
    _read: dict[str, Ranges] = field(default_factory=dict)
    """Ranges read so far, by strength."""

    def __post_init__(self) -> None:
        self._read[OFF] = self.ranges

    def equalized(self, strength: str) -> Path:
        return self.directory / f"equalized-{_file(strength)}.onnx"

    def means(self, strength: str) -> Path:
        return self.directory / f"means-{_file(strength)}.safetensors"

    def rounding(self, strength: str, target: Target) -> Path:
        """Path of the rounding steps; targets differ only in how scales are rounded."""
        scales = "half" if target.int8.half else "float"
        return self.directory / f"rounding-{_file(strength)}-{scales}.safetensors"

    def graph_of(self, strength: str) -> Path:
        return self.graph if strength == OFF else self.equalized(strength)

    def ranges_of(self, strength: str) -> Ranges:
        if strength not in self._read:
            self._read[strength] = Ranges.read(self.equalized(strength).with_suffix(".json"))
        return self._read[strength]

    def keep(self, chosen: Iterable[tuple[Candidate, Target]]) -> None:
        """Delete the parts that no chosen candidate (with its target) uses."""
        kept = set()
        for candidate, target in chosen:
            parts = self.parts(candidate, target)
            kept |= {parts.graph, parts.graph.with_suffix(".json"), parts.means, parts.rounding}
        for path in self.directory.iterdir():
            if path not in kept and path.name.startswith(("equalized-", "means-", "rounding-")):
                path.unlink()

    def parts(self, candidate: Candidate, target: Target) -> Int8Parts:
        return Int8Parts(
            self.graph_of(candidate.strength),
            self.ranges_of(candidate.strength),
            candidate.method,
            candidate.clipped,
            self.means(candidate.strength) if candidate.bias else None,
            self.rounding(candidate.strength, target) if candidate.rounded else None,
            candidate.kept,
        )


class Evaluator:
    """Makes the parts of candidates, and measures candidates by the SQNR of their logits against the FP32 graph's.

    Args:
        select: images to measure on, [N, H, W, C].
        few: number of them that the SQNR is measured on.
        strengths: strengths of equalization to try.
        statistics: number of calibration images for the statistics of layers' inputs.
    """

    def __init__(
        self,
        context: Context,
        store: Store,
        chosen: ChosenImages,
        preprocess: Preprocess,
        select: Pixels,
        few: int,
        strengths: Sequence[str],
        statistics: int,
    ) -> None:
        self._context, self._store, self._preprocess = context, store, preprocess
        root = context.options.calib
        assert root is not None
        self._stream = KeptStream(chosen.splits["calibrate"], preprocess, IMAGE_BATCH, root)
        self._select = select
        self._strengths, self._images = strengths, statistics
        self.images, self.few = len(select), min(few, len(select))
        self._reference = self._outputs(OnnxRuntimeEngine(store.graph, saturating_session={}), 0, self.few)
        rows = as_rows(self._reference).astype(np.float64)
        check_reference(as_rows(self._reference))
        self._signal = float(((rows - rows.mean(axis=0)) ** 2).sum())
        self._known: dict[tuple[Candidate, Target], Float64Array] = {}
        self._hashes = {graph_io.sha256_of(store.graph)}
        self._factors: dict[str, dict[str, npt.NDArray[np.float32]]] = {OFF: {}}
        """Factors of layers' inputs, by strength."""
        self._orders: dict[str, ChannelOrder] = {}

    @cached_property
    def _pixels(self) -> Pixels:
        """The first calibration images."""
        return self._stream.first(self._images)

    def _outputs(self, engine: Runner, start: int, stop: int) -> npt.NDArray[np.float32]:
        """First outputs of the select images from `start` to `stop`."""
        return run_in_batches(engine, self._select[start:stop], self._preprocess, IMAGE_BATCH)[0]

    def _noise(self, engine: Runner, start: int, stop: int) -> Float64Array:
        if len(self._reference) < stop:
            precise = OnnxRuntimeEngine(self._store.graph, saturating_session={})
            more = self._outputs(precise, len(self._reference), stop)
            self._reference = np.concatenate([self._reference, more])
        difference = self._outputs(engine, start, stop).astype(np.float64) - self._reference[start:stop]
        squares: Float64Array = (difference.reshape(len(difference), -1) ** 2).sum(axis=1)
        return squares

    def sqnr(self, candidate: Candidate, target: Target) -> float:
        """SQNR of a candidate on the first `few` images, in dB. Its equalized graph must have been made."""
        noise = float(self.noise(candidate, target, self.few).sum())
        if not np.isfinite(noise):
            return -WITHOUT_NOISE
        return WITHOUT_NOISE if noise == 0 else min(WITHOUT_NOISE, 10 * math.log10(self._signal / noise))

    def noise(self, candidate: Candidate, target: Target, count: int) -> Float64Array:
        """Squared errors of a candidate's logits on the first images, [count].

        Its equalized graph must have been made; other parts that it lacks are made here.
        """
        known = self._known.get((candidate, target), np.empty(0))
        if len(known) < count:
            self._calibrate(candidate.strength)
            if candidate.rounded:
                self._rounding(candidate.strength, target)
            if candidate.bias:
                self._means(candidate.strength)
            with tempfile.TemporaryDirectory(prefix="export-zoo-") as directory:
                graph, twin = Path(directory) / "candidate.onnx", Path(directory) / "twin.onnx"
                parts, options = self._store.parts(candidate, target), self._context.options
                parts.write(graph, target, options, self._order(candidate.strength, target))
                engine: Runner
                if target.compiled:
                    engine = OnnxRuntimeEngine(write_twin(graph, twin), fused=False)
                else:  # it cannot saturate, so it does not need the slower exact session
                    engine = target.open(Opening(graph, INT8))
                known = np.concatenate([known, self._noise(engine, len(known), count)])
            self._known[candidate, target] = known
        return known[:count]

    @cached_property
    def equalized(self) -> list[str]:
        """Strengths with which layers can be equalized. Makes the graph of each."""
        if not observed(graph_io.load(self._store.graph).graph):
            return []
        return [strength for strength in self._strengths if self._equalize(strength)]

    @cached_property
    def _approximation(self) -> Float64Array:
        """Squared errors of the float graph that is equalized through ReLU6, on the first `few` images.

        Infinite if no more layers can be equalized through ReLU6.
        """
        graph = graph_io.load(self._store.graph).graph
        if observed(graph, approximate=True) == observed(graph) or not self._equalize(APPROXIMATE):
            return np.full(self.few, np.inf)
        approximate = self._store.equalized(APPROXIMATE)
        return self._noise(OnnxRuntimeEngine(approximate, saturating_session={}), 0, self.few)

    def approximated(self, candidate: Candidate, target: Target) -> bool:
        """Whether equalization through ReLU6 may be better than a candidate.

        It cannot be, if the float graph alone is further from the original than the candidate.
        """
        return float(self._approximation.sum()) < float(self.noise(candidate, target, self.few).sum())

    @cached_property
    def _magnitudes(self) -> dict[str, npt.NDArray[np.float32]]:
        """Channels' magnitudes of all tensors that any equalization asks for."""
        graph = graph_io.load(self._store.graph).graph
        names = sorted({*observed(graph), *observed(graph, approximate=True)})
        tensors = self._store.ranges.tensors
        found = {
            name: tensors[name].magnitudes() for name in names if name in tensors and tensors[name].channels
        }
        missing = [name for name in names if name not in found]  # as in ranges files of earlier versions
        if missing:
            images = self._pixels[:FEW_IMAGES]
            found |= channel_magnitudes(self._store.graph, images, self._preprocess, missing)
        return found

    def _equalize(self, strength: str) -> bool:
        """Write the graph that is equalized with a strength. Returns False if it is one that exists."""
        model = graph_io.load(self._store.graph)
        factors = equalize_as(model.graph, self._magnitudes, strength)
        if not factors:
            return False
        self._factors[strength] = factors
        path = self._store.equalized(strength)
        graph_io.save(model, path)
        if graph_io.sha256_of(path) in self._hashes:  # another strength gave the same powers of two
            return False
        self._hashes.add(graph_io.sha256_of(path))
        return True

    def _calibrate(self, strength: str) -> None:
        """Write the ranges of an equalized graph, unless they exist."""
        path = self._store.equalized(strength)
        if strength == OFF or path.with_suffix(".json").exists():
            return
        graph = graph_io.load(self._store.graph).graph
        scaled = scaled_tensors(graph, approximate=strength == APPROXIMATE)
        wanted = quantized_tensors(
            graph_io.load(path).graph, kept_float(graph, self._context.options.keep_float)
        )
        # Powers of two leave all other tensors as they were. Through a ReLU6, these change hardly.
        known = {name: found for name, found in self._store.ranges.tensors.items() if name not in scaled}
        with self._context.reporter.bar("tune", len(self._stream.files)) as progress:
            ranges = collect(path, self._stream, histograms=wanted, known=known, progress=progress)
        ranges.write(path.with_suffix(".json"))

    @cached_property
    def _statistics(self) -> InputStatistics:
        return InputStatistics(self._store.graph, self._pixels, self._preprocess)

    def _means(self, strength: str) -> None:
        """Write the mean inputs of layers, unless they exist."""
        path = self._store.means(strength)
        if not path.exists():
            save_file(self._statistics.means(self._factors[strength]), path)

    def _rounding(self, strength: str, target: Target) -> None:
        """Round the weights and write the rounding steps, unless they exist; the slowest step of tuning."""
        path = self._store.rounding(strength, target)
        if path.exists():
            return
        moments = self._statistics.moments(self._factors[strength])
        with self._context.reporter.bar("tune rounding", self._statistics.rounded) as progress:
            order, graph = self._order(strength, target), graph_io.load(self._store.graph_of(strength)).graph
            save_file(rounding(graph, moments, target.int8, order=order, progress=progress), path)

    def _order(self, strength: str, target: Target) -> ChannelOrder | None:
        """The channel order of a graph for a target, chosen once per strength; None if no sums are in 16 bits."""
        if not target.int8.sums_in_16_bits:
            return None
        if strength not in self._orders:
            self._orders[strength] = choose_order(graph_io.load(self._store.graph_of(strength)).graph)
        return self._orders[strength]

    def clipped(self, strength: str, target: Target) -> list[str]:
        """Tensors that gain by clipping, largest gain first."""
        graph, ranges = self._store.graph_of(strength), self._store.ranges_of(strength)
        return worth_clipping(
            graph_io.load(graph).graph, ranges, target.int8, self._context.options.keep_float
        )

    @cached_property
    def first(self) -> tuple[str, ...]:
        """Patterns of the first layer and the depthwise convolutions behind it; see `placement.first_layers`.

        Without those of --keep-float.
        """
        graph = graph_io.load(self._store.graph).graph
        given = kept_float(graph, self._context.options.keep_float)
        return tuple(escape(layer) for layer in first_layers(graph) if layer not in given)

    def leaves_some(self, kept: Sequence[str], target: Target) -> bool:
        """Whether any layer is quantized if those of patterns, and those of --keep-float, stay float."""
        graph = graph_io.load(self._store.graph).graph
        layers = kept_float(graph, (*self._context.options.keep_float, *kept))
        return bool(target.int8.place(graph, layers).weights)

    def classifiers(self) -> list[tuple[str, ...]]:
        """Patterns of the layer that makes the logits, and of all layers behind the last convolution."""
        layers = classifier_layers(graph_io.load(self._store.graph).graph)
        return [tuple(map(escape, some)) for some in dict.fromkeys((layers[-1:], layers)) if some]


def _file(strength: str) -> str:
    return strength.replace(" ", "-")
