"""Stage: activation ranges, from the calibration set or from a file of `export-zoo calibrate`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from export_zoo.base import graph_io
from export_zoo.base.errors import BadInputError, UsageError
from export_zoo.base.graph_io import sha256_of
from export_zoo.calibration import images
from export_zoo.calibration.collect import NoImageError, collect, refuse_dead
from export_zoo.calibration.images import ImageFile, Progress
from export_zoo.calibration.near_duplicates import FingerprintedStream, alike
from export_zoo.calibration.preprocess import Preprocess
from export_zoo.calibration.range_warnings import warnings_of
from export_zoo.calibration.ranges import Ranges
from export_zoo.calibration.synthetic import SyntheticStream
from export_zoo.engines.precision.int8.keep_float import kept_float
from export_zoo.engines.targets.registry import quantized_tensors
from export_zoo.exporter.cluster.files import Named, Wanted
from export_zoo.exporter.run.at_once import run_at_once
from export_zoo.exporter.run.cache import StageResult
from export_zoo.exporter.run.context import IMAGE_BATCH, Context
from export_zoo.exporter.stages.images import ChosenImages
from export_zoo.exporter.stages.shards import Here, Workers, images_there, images_wanted, refuse_unreadable

if TYPE_CHECKING:
    from export_zoo.exporter.models.spec import ModelSpec


@dataclass(frozen=True)
class Calibrated:
    """A ranges file, unless no image could be used, and fingerprints of its images, in the order of their names.

    For fingerprints see `calibration.near_duplicates`.
    """

    RANGES: ClassVar[str] = "ranges.json"
    FINGERPRINTS: ClassVar[str] = "fingerprints.npy"
    unreadable: list[tuple[str, str]]
    """Names of images that were left out, with reasons."""
    names: list[str]


@dataclass(frozen=True)
class _Order:
    """A shard: images to calibrate on. Whether no scale can be chosen is judged when all are merged.

    Attributes:
        files: empty for synthetic images.
        root: their folder; None for synthetic images.
        histograms: names of the tensors to collect histograms of.
        seed: seed of synthetic images.
        whole: number of files of the set that `files` are a shard of.
    """

    files: Sequence[ImageFile]
    root: Path | None
    preprocess: Preprocess
    histograms: Sequence[str]
    seed: int
    whole: int


@dataclass(frozen=True)
class _Collected:
    """Result of a shard; see `Calibrated`. `ranges` is None if no image could be used."""

    ranges: Ranges | None
    unreadable: list[tuple[str, str]]
    names: list[str]
    fingerprints: npt.NDArray[np.float32]


def _collect(places: Sequence[str], order: _Order, threads: int, progress: Progress) -> _Collected:
    """Calibrate on one shard. `places` are those of the graph and of the folder of images."""
    p = order.preprocess
    stream = (
        FingerprintedStream(
            images_there(order.files, order.root, places[1]), p, IMAGE_BATCH, order.root, whole=order.whole
        )
        if order.root is not None
        else SyntheticStream(images.MIN_CALIBRATE, order.seed, p, IMAGE_BATCH)
    )
    ranges = None
    with contextlib.suppress(NoImageError):
        ranges = collect(
            Path(places[0]),
            stream,
            histograms=order.histograms,
            threads=threads,
            shard=True,
            progress=progress,
        )
    unreadable = [(u.name, u.reason) for u in stream.unreadable]
    if not isinstance(stream, FingerprintedStream):
        return _Collected(ranges, unreadable, [], np.empty((0, 0), np.float32))
    return _Collected(ranges, unreadable, [image.name for image in stream.images], stream.found())


def calibrate(
    context: Context,
    spec: ModelSpec,
    graph: Path,
    chosen: ChosenImages,
    shards: Sequence[tuple[int, int]] = ((1, 1),),
    workers: Workers | None = None,
) -> tuple[Path, Ranges]:
    """Run the calibration set through the graph and write a ranges file. Without images, FP16 uses synthetic images.

    The bits do not depend on the shards. Each is cached: an interrupted calibration goes on where it ended.

    Args:
        shards: parts (i, n) of the set to calibrate on, each the i-th of n: one of them, or all.
        workers: who calibrates on the shards; by default this machine.

    Raises:
        BadInputError: too many images cannot be decoded, or no scale can be chosen; see `collect`.
    """
    files, root, by = chosen.splits["calibrate"], context.options.calib, workers or Here()
    histograms = _quantized(context, graph) if context.options.quantizes else []
    parts = [files[index - 1 :: count] for index, count in shards]
    whole, seed = len(parts) == shards[0][1], spec.seed + 3

    def collected(index: int, progress: Progress) -> StageResult[Calibrated]:
        def make(directory: Path) -> Calibrated:
            part = parts[index]
            order = _Order(part, root, spec.preprocess, histograms, seed, len(files))
            wanted: list[Wanted] = [
                Named.of(graph),
                *([images_wanted(part, root)] if root is not None else []),
            ]
            found = by.run(_collect, order, wanted, len(part), progress)
            if found.ranges is not None:
                found.ranges.write(directory / Calibrated.RANGES)
            np.save(directory / Calibrated.FINGERPRINTS, found.fingerprints)
            return Calibrated(found.unreadable, found.names)

        key = context.key(
            graph=sha256_of(graph),
            preprocess=spec.preprocess.model_dump(),
            images=sorted(i.sha256 for i in parts[index]) if root is not None else ["synthetic", seed],
            histograms=histograms,
            made_with=by.facts,
        )
        return context.cache.run("calibrate", key, make, Calibrated)

    results: dict[int, StageResult[Calibrated]] = {}
    merged: Ranges | None = None
    with context.reporter.stage("calibrate") as stage:
        with context.reporter.bar("calibrate", sum(map(len, parts))) as progress:
            tasks = [partial(collected, index, progress) for index in range(len(parts))]
            for index, result in run_at_once(tasks, by.at_once, by.stop):
                results[index] = result
                if result.data.names or root is None:
                    ranges = Ranges.read(result.file(Calibrated.RANGES))
                    merged = ranges if merged is None else merged.merged(ranges)
        unreadable = [pair for _, result in sorted(results.items()) for pair in result.data.unreadable]
        if whole:
            refuse_unreadable(str(root), unreadable, len(files))
        if merged is None:
            raise NoImageError(root or Path("synthetic images"))
        if whole:
            refuse_dead(merged, str(graph_io.load(graph).graph.inputs[0].name))
        path = results[0].file(Calibrated.RANGES)
        if len(parts) > 1:
            # Shards without a usable image have no ranges that name theirs.
            merged = merged.model_copy(update={"unreadable": sorted(name for name, _ in unreadable)})
            path = context.cache.scratch() / Calibrated.RANGES
            merged.write(path)
        stage.cached = all(result.cached for result in results.values())
        kind = "images" if root is not None else "synthetic images"
        stage.detail = f"{len(merged.tensors)} tensors over {len(merged.image_sha256)} {kind}"
        if len(parts) > 1:
            stage.detail += f" in {len(parts)} shards"
    context.warn_unreadable(root, unreadable)
    if histograms:
        names = {file.sha256: file.name for file in files}
        pairs = _alike([file.name for file in files], [results[index] for index in range(len(parts))])
        for text in warnings_of(merged, names, alike=pairs, whole=whole):
            context.reporter.warn(text)
    return path, merged


def _alike(names: Sequence[str], results: Sequence[StageResult[Calibrated]]) -> list[tuple[str, str]]:
    """Pairs of names: an image that looks like an earlier one, and that one.

    Args:
        names: of all images, in their order.
    """
    found = {
        name: fingerprint
        for result in results
        for name, fingerprint in zip(
            result.data.names, np.load(result.file(Calibrated.FINGERPRINTS)), strict=True
        )
    }
    used = [name for name in names if name in found]
    pairs = alike(np.stack([found[name] for name in used])) if used else {}
    return [(used[index], used[first]) for index, first in pairs.items()]


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
