"""Diagnoses an engine of a bundle: what each of its layers does to the outputs, and why."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, Field

from export_zoo.base import graph_io
from export_zoo.base.errors import BadInputError, UsageError
from export_zoo.calibration.preprocess import normalize
from export_zoo.engines.bundle import reader
from export_zoo.engines.bundle.manifest import Engine, Manifest
from export_zoo.engines.bundle.opening import opening_of, why_not_run
from export_zoo.engines.diagnosis import counterparts as graphs
from export_zoo.engines.diagnosis.layers import PARTS, HalfLayers, Layer, Layers, QuantizedLayers
from export_zoo.engines.diagnosis.local import Local, local_errors, rounding_of, roundings
from export_zoo.engines.diagnosis.mixtures import Float32Array, Mixtures
from export_zoo.engines.diagnosis.ranking import Float64Array, effect, outputs
from export_zoo.engines.parity.metrics import WITHOUT_NOISE
from export_zoo.engines.parity.outputs import as_rows
from export_zoo.engines.precision.placement import constant
from export_zoo.engines.precision.registry import BASELINE, PRECISIONS
from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine
from export_zoo.engines.targets.registry import TARGETS

DEFAULT_IMAGES, MIN_IMAGES = 32, 4
"""Number of held-out images that layers are judged on."""

DEFAULT_SECONDS = 600.0

LOOKED_AT = 8
"""Number of images for local errors, histograms and the error along the network."""

BATCH = 8
BINS = 48


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Histogram(_Model):
    """Values of a layer's input over some images, and the range that its 8 bits have."""

    min: float
    max: float
    counts: list[int] = Field(description="Number of values in equal bins from `min` to `max`.")
    low: float | None = Field(description="Smallest value that is not clipped; null if it is not rounded.")
    high: float | None


class LayerFigures(_Model):
    """What one layer does. Decibels are SQNRs: larger is better; null if there is no error at all."""

    name: str = Field(description="Name of its node.")
    module: str = Field(description="Path of its module in PyTorch.")
    operator: str
    sqnr: float | None = Field(
        description="SQNR of the outputs if this layer alone is rounded, in dB; -200: not finite."
    )
    divergence: float | None = Field(
        description="Kullback-Leibler divergence of the outputs' softmax in that case, in nats, mean over images; "
        "for a classification only. Null if it is not finite."
    )
    share: float = Field(description="Share of this layer's noise in the sum over all layers, each alone.")
    weights: float | None = Field(description="SQNR of its own output by rounded weights alone, in dB.")
    clipping: float | None = Field(
        description="The same by values outside the ranges of its input and output."
    )
    rounding: float | None = Field(description="The same by all other roundings of its input and output.")
    along: float | None = Field(description="SQNR of its output if all layers are rounded, in dB.")
    input: Histogram | None
    bytes: int = Field(description="Size of its weights in the engine's graph.")
    ms: float | None = Field(
        description="Time on one thread for one image, in ms; null if the target cannot tell."
    )


class Mended(_Model):
    """What the engine's SQNR would be with the worst layers in float."""

    layers: int
    sqnr: float


class Answer(_Model):
    """An image that the engine answers otherwise than eager PyTorch, or with one of the largest errors."""

    index: int = Field(description="Index of the image in the bundle's held-out images.")
    eager: str | None = Field(
        description="Eager's answer: name or number of the class; for a classification only."
    )
    engine: str | None
    sqnr: float | None = Field(description="SQNR on this image against the mean signal of all, in dB.")


class Diagnosis(_Model):
    """Layers of an engine in the order of the network."""

    schema_version: Literal[1] = 1
    bundle: str
    engine: str
    quantized: bool = Field(description="Whether it is INT8, so that `--keep-float` can name its layers.")
    images: int
    sqnr: float = Field(description="SQNR of the engine's graph on these images, in dB.")
    limit: float | None = Field(description="The gate's limit on SQNR, in dB.")
    layers: list[LayerFigures]
    worst: list[str] = Field(description="Names of all layers, the one with the lowest `sqnr` first.")
    mended: list[Mended] = Field(description="SQNR with the first layers of `worst` in float.")
    answers: list[Answer] = Field(description="Images that go wrong, and those with the largest errors.")
    remaining: float | None = Field(
        description="SQNR with all layers in float, in dB: equalization through ReLU6 changes the function."
    )
    ms: float | None = Field(description="Sum of the times of all nodes of the engine, in ms.")
    bytes: int = Field(description="Size of the engine's graph.")


Steps = Callable[[int, int], None]
"""Told the number of finished steps, and of all."""


class Subject:
    """An engine of a bundle, whose layers can be rounded one by one.

    Args:
        name: of the engine; by default the one with the lowest SQNR that is not FP32.

    Raises:
        BadInputError: not a bundle, or damaged; no such engine; nothing in the engine is rounded.
    """

    def __init__(self, bundle: Path, name: str | None = None) -> None:
        self.bundle, self.manifest = bundle, reader.read_manifest(bundle)
        self.engine = chosen(bundle, self.manifest, name)
        self.held = reader.held_out(bundle, self.manifest)
        self.counterparts = graphs.of_engine(bundle, self.manifest, self.engine)
        target = TARGETS[self.engine.target]
        self.mixtures = Mixtures(self.counterparts, integers=not target.compiled)
        rules, roundings = target.int8, self.mixtures.roundings
        self._which: Layers = (
            QuantizedLayers(self.counterparts, rules, roundings)
            if PRECISIONS[self.engine.precision].quantized
            else HalfLayers(self.counterparts, roundings)
        )
        self.layers = self._which.layers
        if not self.layers:
            raise BadInputError(
                f"{bundle}: {self.engine.name} rounds nothing", hint="choose another --engine"
            )
        nodes = graphs.nodes_by_name(self.counterparts.exact.graph)
        self.nodes = {
            layer.name: next(node for part in PARTS if (node := nodes.get(f"{layer.name}{part}")) is not None)
            for layer in self.layers
        }
        """The node of each layer in the float graph, by the layer's name."""

    def members(self, layer: Layer) -> list[str]:
        """Names of the nodes that a layer may consist of."""
        return [f"{node}{part}" for node in sorted(self._which.nodes[layer.name]) for part in PARTS]

    def batches(self, start: int, stop: int, size: int = BATCH) -> list[Float32Array]:
        """Held-out images, preprocessed, in batches."""
        starts, p = range(start, stop, size), self.manifest.recipe.preprocess
        return [normalize(self.held.pixels[i : min(i + size, stop)], p) for i in starts]

    def outputs(self, rounded: Collection[str], batches: Sequence[Float32Array]) -> Float32Array:
        """The first output if these layers are rounded and all others are float: float32 [N, ...], `sampled`."""
        return outputs(self.mixtures.open(self._which.rounded(rounded)), batches)


def diagnose(
    bundle: Path,
    name: str | None = None,
    *,
    images: int = DEFAULT_IMAGES,
    seconds: float = DEFAULT_SECONDS,
    progress: Steps = lambda done, total: None,
) -> Diagnosis:
    """Diagnose an engine of a bundle on its held-out images.

    Each layer is rounded alone, in a mixture of the engine's graph and the float graph.

    Args:
        name: of the engine, see `Subject`.
        images: number of images.
        seconds: fewer images are used, MIN_IMAGES at least, if it would take longer by the time of the first run.

    Raises:
        BadInputError: see `Subject`.
        UsageError: too few images.
    """
    began, subject = time.monotonic(), Subject(bundle, name)
    layers, reference = subject.layers, subject.held.logits
    count = min(images, len(reference))
    if count < MIN_IMAGES:
        raise UsageError(
            f"--images {images}: layers are judged on at least {MIN_IMAGES} images; {bundle} has {len(reference)}",
            hint="give more --images, or export again with more --verify-images",
        )
    reference = reference[:count]
    counts = _counts(len(layers))
    steps, total = 0, len(layers) + len(counts) + 4

    def step() -> None:
        nonlocal steps
        steps += 1
        progress(1, total)

    looked_at = subject.batches(0, min(LOOKED_AT, count), 1)
    local = local_errors(subject.counterparts, layers, iter(looked_at))
    step()
    along = _along(subject, looked_at)
    step()
    shown = _histograms(subject, looked_at)
    step()
    start = time.monotonic()
    exact = subject.outputs((), subject.batches(0, count))
    each, left = time.monotonic() - start, seconds - (start - began)
    if (needed := each * (len(layers) + len(counts))) > left:
        count = max(MIN_IMAGES, min(count, int(count * left / needed)))
        exact, reference = exact[:count], reference[:count]
    used = subject.batches(0, count)
    alone = []
    for layer in layers:
        alone.append(effect(exact, subject.outputs([layer.name], used)))
        step()
    order = sorted(range(len(layers)), key=lambda i: -float(alone[i].noise.sum()))
    worst = [layers[i].name for i in order]
    signal, mended = _signal(reference), []
    answers: list[Answer] = []
    for k in counts:
        outputs_of_k = subject.outputs(worst[k:], used)
        if k == 0:
            answers = _answers(subject, reference, outputs_of_k, signal)
        noise = effect(reference, outputs_of_k).noise
        mended.append(Mended(layers=k, sqnr=_decibels(signal, noise)))
        step()
    times = _times(subject)
    step()
    sum_of_all = math.fsum(x for found in alone if math.isfinite(x := float(found.noise.sum()))) or 1.0
    head = subject.manifest.recipe.output.head
    by_class = head.by_class and head.task == "classification"
    figures = [
        LayerFigures(
            name=layer.name,
            module=layer.module,
            operator=subject.nodes[layer.name].op_type,
            sqnr=_or_none(_decibels(signal, found.noise)),
            divergence=_finite(float(found.divergence.mean())) if by_class else None,
            share=min(1.0, float(found.noise.sum()) / sum_of_all),
            **_parts(local.get(layer.name, NOTHING)),
            along=_or_none(along[layer.name]),
            input=shown.get(layer.name),
            bytes=_bytes(subject, layer),
            ms=sum(times.get(node, 0.0) for node in subject.members(layer)) if times else None,
        )
        for layer, found in zip(layers, alone, strict=True)
    ]
    return Diagnosis(
        bundle=str(bundle),
        engine=subject.engine.name,
        quantized=PRECISIONS[subject.engine.precision].quantized,
        images=count,
        sqnr=mended[0].sqnr,
        limit=subject.engine.gate.tolerances.get("sqnr"),
        layers=figures,
        worst=worst,
        mended=mended,
        answers=answers,
        remaining=_or_none(mended[-1].sqnr),
        ms=sum(times.values()) if times else None,
        bytes=subject.engine.precision_graph()[0].size_bytes,
    )


def chosen(bundle: Path, manifest: Manifest, name: str | None) -> Engine:
    """The engine to diagnose. Raises BadInputError if it is not there, or is FP32."""
    if name is not None:
        engine = reader.named(bundle, manifest, name)
        if engine.precision == BASELINE.name:
            raise BadInputError(f"{bundle}: {name} rounds nothing", hint="choose an engine that is not FP32")
        return engine
    engines = [engine for engine in manifest.artifacts.engines if engine.precision != BASELINE.name]
    if not engines:
        raise BadInputError(
            f"{bundle}: has FP32 engines only, which round nothing", hint="export it with --precision int8"
        )
    return min(engines, key=lambda engine: engine.gate.eager_metrics["sqnr"] or 0.0)


NOTHING = Local(0.0, 0.0, 0.0, 0.0)
MAX_ANSWERS = 12


def _answers(subject: Subject, reference: Float32Array, found: Float32Array, signal: float) -> list[Answer]:
    """Images that are answered otherwise than by eager, and those with the largest errors, the worst first."""
    noise, recipe = effect(reference, found).noise, subject.manifest.recipe
    head = recipe.output.head
    eager = engine = None
    differs = np.zeros(len(noise), dtype=bool)
    if head.by_class and reference.ndim == 2:
        eager, engine = reference.argmax(axis=1), np.nan_to_num(found, nan=-np.inf).argmax(axis=1)
        differs = eager != engine

    def name(classes: npt.NDArray[np.intp] | None, index: int) -> str | None:
        if classes is None:
            return None
        number = int(classes[index])
        return recipe.labels[number] if number < len(recipe.labels) else f"class {number}"

    order = sorted(range(len(noise)), key=lambda i: (bool(differs[i]), float(noise[i])), reverse=True)
    return [
        Answer(
            index=i,
            eager=name(eager, i),
            engine=name(engine, i),
            sqnr=_or_none(_decibels(signal / len(noise), noise[i])),
        )
        for i in order[:MAX_ANSWERS]
    ]


def _signal(reference: Float32Array) -> float:
    rows = as_rows(reference).astype(np.float64)
    return float(((rows - rows.mean(axis=0)) ** 2).sum())


def _decibels(signal: float, noise: Float64Array | float) -> float:
    """SQNR in dB, within WITHOUT_NOISE of 0."""
    total = float(np.sum(noise))
    if not math.isfinite(total):
        return -WITHOUT_NOISE
    if total == 0 or signal == 0:
        return WITHOUT_NOISE
    return float(np.clip(10 * math.log10(signal / total), -WITHOUT_NOISE, WITHOUT_NOISE))


def _or_none(decibels: float) -> float | None:
    return None if decibels == WITHOUT_NOISE else decibels


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _parts(local: Local) -> dict[str, float | None]:
    powers = {"weights": local.weights, "clipping": local.clipping, "rounding": local.rounding}
    return {what: _or_none(_decibels(local.signal, power)) for what, power in powers.items()}


def _counts(layers: int) -> list[int]:
    """Numbers of layers in float that are tried: 0, 1, 2, 3, 5, 8, ..., and all."""
    found, first, second = [0], 1, 2
    while first < layers:
        found.append(first)
        first, second = second, first + second
    return [*found, layers]


def _along(subject: Subject, batches: Sequence[Float32Array]) -> dict[str, float]:
    """SQNR of each layer's output with all roundings, in dB, by layer; powers are about 0."""
    tensors = {name: str(node.outputs[0].name) for name, node in subject.nodes.items()}
    engines = [subject.mixtures.open(on, [*tensors.values()]) for on in ((), subject.mixtures.roundings)]
    signal, noise = np.zeros(len(tensors)), np.zeros(len(tensors))
    for batch in batches:
        exact, rounded = (engine.run_all(batch)[-len(tensors) :] for engine in engines)
        for index, (want, have) in enumerate(zip(exact, rounded, strict=True)):
            long = want.astype(np.float64)
            signal[index] += (long**2).sum()
            with np.errstate(invalid="ignore", over="ignore"):
                noise[index] += ((have - long) ** 2).sum()
    return {layer: _decibels(s, n) for layer, s, n in zip(tensors, signal, noise, strict=True)}


def _times(subject: Subject) -> Mapping[str, float]:
    target, engine = TARGETS[subject.engine.target], subject.engine
    if why_not_run(engine):
        return {}
    return target.node_times(opening_of(subject.bundle, engine), subject.batches(0, 1)[0])


def _histograms(subject: Subject, batches: Sequence[Float32Array]) -> dict[str, Histogram]:
    """Values of the layers' inputs in the float graph, by layer."""
    nodes, how = subject.nodes, roundings(subject.counterparts.rounded.graph)
    inputs = {name: node.inputs[0] for name, node in nodes.items() if node.inputs}
    names = sorted(
        {str(value.name) for value in inputs.values() if value is not None and not constant(value)}
    )
    values = _Values(subject.counterparts.exact, names)
    low, high = dict.fromkeys(names, math.inf), dict.fromkeys(names, -math.inf)
    for batch in batches:
        for name, array in values.of(batch):
            low[name], high[name] = min(low[name], float(array.min())), max(high[name], float(array.max()))
    counts = {name: np.zeros(BINS, dtype=np.int64) for name in names}
    for batch in batches:
        for name, array in values.of(batch):
            counts[name] += np.histogram(array, BINS, (low[name], high[name]))[0]
    found = {}
    for layer, value in inputs.items():
        if (
            value is None
            or (name := str(value.name)) not in counts
            or not math.isfinite(low[name] + high[name])
        ):
            continue
        rounding = rounding_of(value, how)
        found[layer] = Histogram(
            min=low[name],
            max=high[name],
            counts=counts[name].tolist(),
            low=rounding.low if rounding is not None else None,
            high=rounding.high if rounding is not None else None,
        )
    return found


class _Values:
    """Runs a float graph for the values of some of its tensors."""

    def __init__(self, model: ir.Model, names: Sequence[str]) -> None:
        model = model.clone()
        known = {str(value.name): value for node in model.graph for value in node.outputs}
        self._input, self._names = str(model.graph.inputs[0].name), names
        self._first = len(model.graph.outputs)
        self._computed = [name for name in names if name in known]
        model.graph.outputs.extend(known[name] for name in self._computed)
        with tempfile.TemporaryDirectory(prefix="export-zoo-") as directory:
            path = Path(directory) / "values.onnx"
            graph_io.save(model, path)
            self._engine = OnnxRuntimeEngine(path)

    def of(self, batch: Float32Array) -> Iterator[tuple[str, Float32Array]]:
        if self._input in self._names:
            yield self._input, batch
        yield from zip(self._computed, self._engine.run_all(batch)[self._first :], strict=True)


def _bytes(subject: Subject, layer: Layer) -> int:
    """Size of a layer's constants, which are integers or, in half, numbers of two bytes."""
    nodes = graphs.nodes_by_name(subject.counterparts.rounded.graph)
    half = PRECISIONS[subject.engine.precision].float16
    total = 0
    for name in subject.members(layer):
        for value in nodes[name].inputs if name in nodes else ():
            producer = value.producer() if value is not None else None
            if producer is not None and producer.op_type == "DequantizeLinear":
                value = producer.inputs[0]
            if value is not None and value.const_value is not None:
                tensor = value.const_value
                total += tensor.size * 2 if half and tensor.dtype == ir.DataType.FLOAT else tensor.nbytes
    return total
