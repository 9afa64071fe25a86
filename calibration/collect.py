"""Collects ranges and histograms of all activations from a stream of images through ONNX Runtime, in bounded memory."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from export_zoo.base import graph_io
from export_zoo.base.errors import BadInputError
from export_zoo.base.machine import instruction_set, library_versions, usable_cores
from export_zoo.calibration.histogram import Accumulator, Float32Array, extremes, kernels
from export_zoo.calibration.images import ImageFile, ImageStream, Progress
from export_zoo.calibration.observe import Observer
from export_zoo.calibration.preprocess import Pixels, Preprocess, normalize
from export_zoo.calibration.ranges import Ranges, TensorRange, encode_magnitudes

_FUSED_ACTIVATIONS = frozenset({"Relu", "Clip"})
_FUSING_PRODUCERS = frozenset({"Conv", "ConvTranspose", "Gemm", "Add", "BatchNormalization"})


def activation_tensors(model: ir.Model) -> list[str]:
    """Names of the float tensors whose ranges any placement policy may ask for.

    These are all floating-point activations except those that no target quantizes: the output of a Conv,
    ConvTranspose, Gemm, Add or BatchNormalization whose only reader is a Relu or Clip (the pair fuses).
    """
    names: list[str] = []
    values: list[ir.Value] = list(model.graph.inputs)
    for node in model.graph:
        values.extend(node.outputs)
    for value in values:
        if value.name is None or value.dtype is not ir.DataType.FLOAT or value.const_value is not None:
            continue
        producer = value.producer()
        readers = {use.node for use in value.uses()}
        if (
            producer is not None
            and producer.op_type in _FUSING_PRODUCERS
            and len(readers) == 1
            and next(iter(readers)).op_type in _FUSED_ACTIVATIONS
            and not value.is_graph_output()
        ):
            continue
        names.append(value.name)
    return names


_WORKERS = 4
"""Maximum number of copies of the network that run in parallel; each copy uses further cores."""

BUDGET = 256 << 20
"""Bytes of activations that all workers together hold at once. Each worker may hold this many for a single image. A
network with more activations for one image is run several times, each time for some of its tensors. This division
affects which operators fuse, and so the last bit of the results. Therefore it depends only on the sizes of the
activations and on this budget."""


@dataclass
class _Observed:
    """A tensor that is observed, and its statistics so far."""

    name: str
    module: str
    elements: int
    """Number of elements for one image."""
    by_image: bool
    """Whether the first dimension is exactly the batch, so that rows are images."""
    accumulator: Accumulator | None
    low: float = math.inf
    high: float = -math.inf
    widest: tuple[float, str] = (-1.0, "")
    """Largest magnitude, and the SHA-256 of its image."""
    others: float = 0.0
    channels: Float32Array | None = None
    """Largest magnitude of each channel."""
    lock: Lock = field(default_factory=Lock)

    def see(self, array: Float32Array, images: Sequence[ImageFile], worker: int) -> None:
        """Add the values of one batch. Several workers may call this at the same time.

        Raises:
            BadInputError: a value is not finite.
        """
        rows = array.reshape(len(images), -1) if self.by_image else array.reshape(1, -1)
        by_channel = self.by_image and array.ndim in (2, 4)
        lows, highs = extremes(array.reshape(math.prod(array.shape[:2]), -1) if by_channel else rows)
        if np.isnan(lows).any():
            raise BadInputError(
                f"calibration: tensor {self.name!r} (module {self.module or 'unknown'}) is not finite on the "
                "calibration images",
                hint="check the weights and the preprocessing: the FP32 model itself computes infinity or NaN there",
            )
        largest = None
        if by_channel:
            lows, highs = lows.reshape(array.shape[:2]), highs.reshape(array.shape[:2])
            largest = np.maximum(-lows, highs).max(axis=0)
            lows, highs = lows.min(axis=1), highs.max(axis=1)
        with self.lock:
            if largest is not None:
                self.channels = largest if self.channels is None else np.maximum(self.channels, largest)
            self.low, self.high = min(self.low, float(lows.min())), max(self.high, float(highs.max()))
            if self.by_image:
                for image, low, high in zip(images, lows.tolist(), highs.tolist(), strict=True):
                    seen = (max(-low, high), image.sha256)
                    self.others = max(self.others, min(self.widest, seen)[0])
                    self.widest = max(self.widest, seen)
        if self.accumulator is not None:
            self.accumulator.add(rows, worker=worker, sampled=self.by_image)

    def range(self) -> TensorRange:
        return TensorRange(
            min=self.low,
            max=self.high,
            module=self.module,
            widest=self.widest[1],
            others=max(self.others, 0.0),
            histogram=self.accumulator.histogram(self.low, self.high).encode() if self.accumulator else "",
            channels=encode_magnitudes(self.channels) if self.channels is not None else "",
        )


def _at_size(model: ir.Model, crop: tuple[int, int]) -> ir.Model:
    """The graph with activation shapes for one input size, where height or width is dynamic; otherwise unchanged."""
    feed = model.graph.inputs[0]
    if feed.shape is not None and any(isinstance(size, ir.SymbolicDim) for size in list(feed.shape)[2:]):
        feed.shape = ir.Shape([*list(feed.shape)[:2], *crop])
        ShapeInferencePass()(model)
    return model


def _observe(
    model: ir.Model,
    histograms: Collection[str],
    crop: tuple[int, int],
    workers: int,
    left_out: Collection[str],
) -> list[_Observed]:
    feed = model.graph.inputs[0]
    batch = feed.shape[0] if feed.shape is not None else None
    values = {
        str(v.name): v for v in [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    }
    observed = []
    for name in activation_tensors(model):
        if name in left_out:
            continue
        shape = list(values[name].shape or [])
        known = [size for size in shape[1:] if isinstance(size, int)]
        by_image = bool(shape) and shape[0] == batch and not isinstance(batch, int)
        whole = by_image and len(known) == len(shape) - 1
        observed.append(
            _Observed(
                name=name,
                module=graph_io.module_of(values[name].producer()),
                # An unknown size is assumed to be that of 16 channels of the image.
                elements=math.prod(known) if whole else 16 * math.prod(crop),
                by_image=by_image,
                accumulator=Accumulator(workers) if name in histograms else None,
            )
        )
    return observed


def _passes(observed: Sequence[_Observed], budget: int) -> Iterator[list[_Observed]]:
    """Groups of tensors to observe together: as many as fit in `budget` bytes with one image."""
    together: list[_Observed] = []
    for tensor in observed:
        if together and 4 * sum(t.elements for t in [*together, tensor]) > budget:
            yield together
            together = []
        together.append(tensor)
    if together:
        yield together


def _run(
    observer: Observer,
    tensors: Sequence[_Observed],
    images: ImageStream,
    workers: int,
    at_once: int,
) -> Iterator[int]:
    """Observe the tensors on all images; yield the number of images of each batch that is done.

    Each worker runs the network by itself and counts values on one core: counting parallelizes better over batches than
    within a batch.

    Raises:
        BadInputError: a tensor has a value that is not finite.
    """
    idle: SimpleQueue[int] = SimpleQueue()
    for worker in range(workers):
        idle.put(worker)

    def look(pixels: Pixels, files: Sequence[ImageFile]) -> int:
        worker = idle.get()
        try:
            found = observer.run(normalize(pixels, images.preprocess))
            for tensor in tensors:
                tensor.see(found[tensor.name], files, worker)
        finally:
            idle.put(worker)
        return len(pixels)

    running: deque[Future[int]] = deque()
    done = 0
    with ThreadPoolExecutor(workers) as pool:
        for pixels in images:
            files = images.images[done : done + len(pixels)]
            done += len(pixels)
            for start in range(0, len(pixels), at_once):
                part = slice(start, start + at_once)
                running.append(pool.submit(look, pixels[part], files[part]))
                if len(running) > 2 * workers:
                    yield running.popleft().result()
        while running:
            yield running.popleft().result()


class NoImageError(BadInputError):
    """None of the images could be used. Of a shard this is no error."""

    def __init__(self, root: Path) -> None:
        super().__init__(f"{root}: no image could be used for calibration", hint="check the folder")


def collect(
    graph: Path,
    images: ImageStream,
    *,
    histograms: Collection[str] = (),
    known: Mapping[str, TensorRange] | None = None,
    threads: int = 0,
    budget: int = BUDGET,
    shard: bool = False,
    progress: Progress = lambda _: None,
) -> Ranges:
    """Run the images through the graph and record each activation's exact minimum and maximum, and histograms.

    The result is bit-identical for any batch size, image order and number of threads. The merged results of shards
    (`Ranges.merged`) are bit-identical to the result of all images.

    Args:
        graph: ONNX file with one float32 input [N, 3, H, W].
        images: the stream to calibrate on.
        histograms: names of the tensors to collect histograms of: those that will be quantized.
        known: ranges of activations that need not be observed, by name. If given, the others may all be 0.
        threads: number of threads for ONNX Runtime and for counting; 0 for all cores.
        budget: bytes of activations to hold at once; see BUDGET.
        shard: these are not all images, so tensors may be 0 on all of them (`refuse_dead` judges the merged ranges).
        progress: called with the number of images done since the last call.

    Raises:
        BadInputError: a tensor has a value that is not finite (the message names its module path); the input or all
            tensors to be quantized are 0 on all images.
        NoImageError: no image could be used.
    """
    threads = threads or usable_cores()
    workers = min(threads, _WORKERS)
    kernels()  # compiled once, before threads start
    p = images.preprocess
    crop = (p.crop_height, p.crop_width)
    model = _at_size(graph_io.load(graph), crop)
    feed = model.graph.inputs[0].name
    found = {name: known[name] for name in activation_tensors(model) if name in known} if known else {}
    observed = _observe(model, histograms, crop, workers, found)
    passes = list(_passes(observed, budget))
    shown = 0
    for index, tensors in enumerate(passes):
        at_once = budget // workers // (4 * sum(t.elements for t in tensors))
        observer = Observer(graph, (tensor.name for tensor in tensors), threads=threads // workers)
        done = 0
        for count in _run(observer, tensors, images, workers, max(1, at_once)):
            done += count
            now = (index * len(images.files) + done) // len(passes)
            progress(now - shown)
            shown = now
        del observer  # before the next one is made
    if not images.images:
        raise NoImageError(images.root)
    ranges = Ranges(
        graph_sha256=graph_io.sha256_of(graph),
        preprocess=images.preprocess,
        image_sha256=sorted(i.sha256 for i in images.images),
        unreadable=sorted(u.name for u in images.unreadable),
        instruction_set=instruction_set(),
        versions=library_versions("onnxruntime", "numpy", "pillow"),
        tensors={**found, **{tensor.name: tensor.range() for tensor in observed}},
    )
    if not shard and not found:
        refuse_dead(ranges, str(feed))
    return ranges


def refuse_dead(ranges: Ranges, feed: str) -> None:
    """Refuse ranges of which no 8-bit scale can be chosen.

    Args:
        feed: name of the graph's input.

    Raises:
        BadInputError: the input or all tensors to be quantized are 0 on all images.
    """
    quantized = {name: tensor for name, tensor in ranges.tensors.items() if tensor.histogram}
    dead = [name for name, tensor in quantized.items() if tensor.min == tensor.max == 0]
    if dead and (len(dead) == len(quantized) or feed in dead):
        what = "all tensors are" if len(dead) == len(quantized) else "the input is"
        raise BadInputError(
            f"calibration: {what} 0 on all calibration images: no 8-bit scale can be chosen",
            hint="check the weights, the images and the preprocessing",
        )


def channel_magnitudes(
    graph: Path, pixels: Pixels, preprocess: Preprocess, names: Collection[str]
) -> dict[str, Float32Array]:
    """Largest magnitude of each channel of some activations, over all images and positions.

    Args:
        pixels: [N, H, W, C]; images are run one at a time, so that memory is needed for one image only.
        names: activations [N, C, H, W], or [N, C].

    Returns float32 [C] by name.
    """
    found: dict[str, Float32Array] = {}
    for arrays in Observer(graph, names).one_by_one(pixels, preprocess):
        for name in names:
            largest = np.abs(arrays[name]).reshape(arrays[name].shape[1], -1).max(axis=1)
            found[name] = np.maximum(found[name], largest) if name in found else largest
    return found
