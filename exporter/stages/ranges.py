"""Stage: activation ranges, from the calibration set or from a file of `export-zoo calibrate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from export_zoo.base import graph_io
from export_zoo.base.errors import BadInputError, UsageError
from export_zoo.base.graph_io import sha256_of
from export_zoo.base.machine import instruction_set
from export_zoo.calibration import images
from export_zoo.calibration.collect import collect
from export_zoo.calibration.near_duplicates import FingerprintedStream
from export_zoo.calibration.range_warnings import warnings_of
from export_zoo.calibration.ranges import Ranges
from export_zoo.calibration.synthetic import SyntheticStream
from export_zoo.engines.precision.int8.keep_float import kept_float
from export_zoo.engines.targets.registry import quantized_tensors
from export_zoo.exporter.run.context import IMAGE_BATCH, Context
from export_zoo.exporter.stages.images import ChosenImages

if TYPE_CHECKING:
    from export_zoo.exporter.models.spec import ModelSpec


@dataclass(frozen=True)
class Calibrated:
    """A ranges file, made from images or from synthetic ones."""

    RANGES: ClassVar[str] = "ranges.json"
    unreadable: list[tuple[str, str]]
    """Names of images that were left out, with reasons."""
    alike: list[tuple[str, str]]
    """Names of images that look alike."""


def calibrate(
    context: Context, spec: ModelSpec, graph: Path, chosen: ChosenImages, shard: tuple[int, int] = (1, 1)
) -> tuple[Path, Ranges]:
    """Run the calibration set through the graph and write a ranges file. Without images, FP16 uses synthetic images.

    Args:
        shard: (i, n): only the i-th of n parts of the set.
    """
    files, root = chosen.splits["calibrate"][shard[0] - 1 :: shard[1]], context.options.calib
    seed = spec.seed + 3
    histograms: list[str] = []
    if context.options.quantizes:
        histograms = _quantized(context, graph)

    def make(directory: Path) -> Calibrated:
        stream = (
            FingerprintedStream(files, spec.preprocess, IMAGE_BATCH, root)
            if root is not None
            else SyntheticStream(images.MIN_CALIBRATE, seed, spec.preprocess, IMAGE_BATCH)
        )
        with context.reporter.bar("calibrate", len(files)) as progress:
            ranges = collect(graph, stream, histograms=histograms, progress=progress)
        ranges.write(directory / Calibrated.RANGES)
        pairs = stream.alike() if isinstance(stream, FingerprintedStream) else []
        return Calibrated([(u.name, u.reason) for u in stream.unreadable], pairs)

    with context.reporter.stage("calibrate") as stage:
        key = context.key(
            "onnxruntime",
            "numpy",
            "pillow",
            graph=sha256_of(graph),
            preprocess=spec.preprocess.model_dump(),
            images=sorted(i.sha256 for i in files) if root is not None else ["synthetic", seed],
            histograms=histograms,
            isa=instruction_set(),
        )
        result = context.cache.run("calibrate", key, make, Calibrated)
        ranges = Ranges.read(result.file(Calibrated.RANGES))
        stage.cached = result.cached
        kind = "images" if root is not None else "synthetic images"
        stage.detail = f"{len(ranges.tensors)} tensors over {len(ranges.image_sha256)} {kind}"
    context.warn_unreadable(root, result.data.unreadable)
    if histograms:
        names = {file.sha256: file.name for file in files}
        for text in warnings_of(ranges, names, alike=result.data.alike, whole=shard[1] == 1):
            context.reporter.warn(text)
    return result.file(Calibrated.RANGES), ranges


def _quantized(context: Context, graph: Path) -> list[str]:
    """Tensors that INT8 quantizes for any target.

    Raises:
        UsageError: --keep-float names nothing, or leaves nothing to quantize.
    """
    model = graph_io.load(graph).graph
    found = sorted(quantized_tensors(model, kept_float(model, context.options.keep_float)))
    if context.options.keep_float and not found:
        raise UsageError(
            f"--keep-float {', '.join(context.options.keep_float)}: leaves nothing to quantize",
            hint="use --precision fp16",
        )
    return found


def read_ranges(context: Context, spec: ModelSpec, graph: Path, chosen: ChosenImages) -> tuple[Path, Ranges]:
    """Read the ranges file of --ranges; it must be of this graph, this preprocessing and these images.

    Raises:
        BadInputError: the file is not a ranges file or does not match; names what differs.
    """
    path = context.options.ranges
    assert path is not None
    with context.reporter.stage("calibrate") as stage:
        ranges = Ranges.read(path)
        for what, have, want in (
            ("graph (weights, input size, versions)", ranges.graph_sha256, sha256_of(graph)),
            ("preprocessing", ranges.preprocess.figures(), spec.preprocess.figures()),
        ):
            if have != want:
                raise BadInputError(
                    f"--ranges {path}: belongs to another {what}",
                    hint="run `export-zoo calibrate` for this network with the same options",
                )
        used = set(ranges.image_sha256)
        wanted = {file.sha256 for file in chosen.splits["calibrate"]}
        if context.options.calib is not None and not used <= wanted:
            raise BadInputError(
                f"--ranges {path}: {len(used - wanted)} of its {len(used)} images are not in the calibration set "
                f"(--calib {context.options.calib})",
                hint="use the same folder, --calib-images, --verify-images and --seed as for `export-zoo calibrate`, "
                "or leave out --calib and verify on --verify DIR",
            )
        if len(used) < images.MIN_CALIBRATE:
            raise BadInputError(
                f"--ranges {path}: covers {len(used)} images, at least {images.MIN_CALIBRATE} are needed",
                hint="merge all shards (`export-zoo calibrate --merge`), or calibrate on more images",
            )
        if context.options.quantizes:
            _check_tensors(context, ranges, _quantized(context, graph))
        stage.detail = f"--ranges {path}: {len(ranges.tensors)} tensors over {len(used)} images"
    if context.options.calib is not None and len(used) < len(wanted) - len(ranges.unreadable):
        context.reporter.warn(
            f"--ranges {path}: covers {len(used)} of the {len(wanted)} calibration images: is a shard missing?"
        )
    if context.options.quantizes:
        for text in warnings_of(ranges, {file.sha256: file.name for file in chosen.splits["calibrate"]}):
            context.reporter.warn(text)
    return path, ranges


def _check_tensors(context: Context, ranges: Ranges, wanted: list[str]) -> None:
    path, method = context.options.ranges, context.options.method
    for name in wanted:
        if name not in ranges.tensors:
            raise BadInputError(
                f"--ranges {path}: has no range of tensor {name!r}: edited by hand?", hint="calibrate again"
            )
        tried = method != "minmax" if context.options.calib is not None else method not in ("minmax", "auto")
        if tried and not ranges.tensors[name].histogram:
            raise BadInputError(
                f"--ranges {path}: has no histogram of tensor {name!r}, which --method {method} needs",
                hint="calibrate again with the same --keep-float, or use --method minmax",
            )
