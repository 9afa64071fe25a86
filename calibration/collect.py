"""Ranges and histograms of all activations in one streaming pass of ONNX Runtime, in bounded memory."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterator, Sequence
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
from export_zoo.calibration.preprocess import Preprocess, UInt8Array, normalize
from export_zoo.calibration.ranges import Ranges, TensorRange

_FUSED_ACTIVATIONS = frozenset({"Relu", "Clip"})
_FUSING_PRODUCERS = frozenset({"Conv", "ConvTranspose", "Gemm", "Add", "BatchNormalization"})


def activation_tensors(model: ir.Model) -> list[str]:
    """Names of the float tensors whose ranges any placement policy may ask for.

    These are all floating-point activations but for those that no target quantizes: what a Conv, Gemm, Add
    or BatchNormalization hands to its only reader, a Relu or Clip (the pair fuses).
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
"""Copies of the network that run side by side, at most; further cores help within each."""

BUDGET = 256 << 20
"""Bytes of activations that are held at once, by each worker where they are those of one image. A network that has more
with one image is run several times, each time for some of its tensors; what is fused, and so the last bit, depends on
that, and so it depends on nothing else."""


@dataclass
class _Observed:
    """A tensor that is looked at, and what was seen so far."""

    name: str
    module: str
    elements: int
    """Of one image."""
    by_image: bool
    """Its first dimension is the batch, and nothing else is in it: rows are images."""
    accumulator: Accumulator | None
    low: float = math.inf
    high: float = -math.inf
    widest: tuple[float, str] = (-1.0, "")
    """Largest magnitude, and its image."""
    others: float = 0.0
    lock: Lock = field(default_factory=Lock)

    def see(self, array: Float32Array, images: Sequence[ImageFile], worker: int) -> None:
        """Take in the values of one batch. Several workers may, at the same time.

        Raises:
            BadInputError: they are not all finite.
        """
        rows = array.reshape(len(images), -1) if self.by_image else array.reshape(1, -1)
        lows, highs = extremes(rows)
        if np.isnan(lows).any():
            raise BadInputError(
                f"calibration: tensor {self.name!r} (module {self.module or 'unknown'}) is not finite on the "
                "calibration images",
                hint="check the weights and the preprocessing: FP32 itself overflows or makes NaN there",
            )
        with self.lock:
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
        )


def _at_size(model: ir.Model, crop: tuple[int, int]) -> ir.Model:
    """Where height and width are dynamic: the graph with the shapes that activations have at one size."""
    feed = model.graph.inputs[0]
    if feed.shape is not None and any(isinstance(size, ir.SymbolicDim) for size in list(feed.shape)[2:]):
        feed.shape = ir.Shape([*list(feed.shape)[:2], *crop])
        ShapeInferencePass()(model)
    return model


def _observe(
    model: ir.Model, histograms: Collection[str], crop: tuple[int, int], workers: int
) -> list[_Observed]:
    feed = model.graph.inputs[0]
    batch = feed.shape[0] if feed.shape is not None else None
    values = {
        str(v.name): v for v in [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    }
    observed = []
    for name in activation_tensors(model):
        shape = list(values[name].shape or [])
        known = [size for size in shape[1:] if isinstance(size, int)]
        by_image = bool(shape) and shape[0] == batch and not isinstance(batch, int)
        whole = by_image and len(known) == len(shape) - 1
        observed.append(
            _Observed(
                name=name,
                module=graph_io.module_of(values[name].producer()),
                # What is not known is taken for as large as 16 channels of the image.
                elements=math.prod(known) if whole else 16 * math.prod(crop),
                by_image=by_image,
                accumulator=Accumulator(workers) if name in histograms else None,
            )
        )
    return observed


def _passes(observed: Sequence[_Observed], budget: int) -> Iterator[list[_Observed]]:
    """Tensors that are looked at together: as many as fit with one image."""
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
    """Look at the tensors of all images, and yield the number of images as they are done.

    Each worker runs the network and counts on one core, by itself: counting does not parallelize within a batch as well
    as batches do.

    Raises:
        BadInputError: a tensor is not finite.
    """
    idle: SimpleQueue[int] = SimpleQueue()
    for worker in range(workers):
        idle.put(worker)

    def look(pixels: UInt8Array, files: Sequence[ImageFile]) -> int:
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


def collect(
    graph: Path,
    images: ImageStream,
    *,
    histograms: Collection[str] = (),
    threads: int = 0,
    budget: int = BUDGET,
    progress: Progress = lambda _: None,
) -> Ranges:
    """Run the images through the graph and record each activation's exact minimum and maximum, and histograms.

    The result is the same to the bit for any batches, order and number of threads, and shards of the images merge to
    what all of them give (`Ranges.merged`).

    Args:
        graph: ONNX file with one float32 input [N, 3, H, W].
        images: the stream to calibrate on.
        histograms: names of the tensors to count values of, those that will be quantized.
        threads: threads of ONNX Runtime and of counting, 0 for all cores.
        budget: bytes of activations to hold at once, see BUDGET.
        progress: called with the number of images done.

    Raises:
        BadInputError: a tensor is not finite, or is to be quantized and 0 on all images (named with its module path);
            or no image could be used.
    """
    threads = threads or usable_cores()
    workers = min(threads, _WORKERS)
    kernels()  # compiled once, before there are threads
    p = images.preprocess
    crop = (p.crop_height, p.crop_width)
    observed = _observe(_at_size(graph_io.load(graph), crop), histograms, crop, workers)
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
        raise BadInputError(f"{images.root}: no image could be used for calibration", hint="check the folder")
    for tensor in observed:
        if tensor.accumulator is not None and tensor.low == tensor.high == 0:
            raise BadInputError(
                f"calibration: tensor {tensor.name!r} (module {tensor.module or 'unknown'}) is 0 on all calibration "
                "images: eight bits cannot be fitted to it",
                hint="check the weights and the images, or leave the layers that write and read it unquantized: "
                f"--keep-float {tensor.module.rpartition('.')[0] or 'PATTERN'}",
            )
    return Ranges(
        graph_sha256=graph_io.sha256_of(graph),
        preprocess=images.preprocess,
        image_sha256=sorted(i.sha256 for i in images.images),
        unreadable=sorted(u.name for u in images.unreadable),
        instruction_set=instruction_set(),
        versions=library_versions("onnxruntime", "numpy", "pillow"),
        tensors={tensor.name: tensor.range() for tensor in observed},
    )


def channel_magnitudes(
    graph: Path, pixels: UInt8Array, preprocess: Preprocess, names: Collection[str]
) -> dict[str, Float32Array]:
    """Largest magnitude of each channel of some activations, over all images and places.

    Args:
        pixels: uint8 [N, H, W, 3]; they are run one by one, so memory is that of one image.
        names: activations [N, C, H, W], or [N, C].

    Returns float32 [C] by name.
    """
    found: dict[str, Float32Array] = {}
    for arrays in Observer(graph, names).one_by_one(pixels, preprocess):
        for name in names:
            largest = np.abs(arrays[name]).reshape(arrays[name].shape[1], -1).max(axis=1)
            found[name] = np.maximum(found[name], largest) if name in found else largest
    return found
