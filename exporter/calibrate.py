"""Calibration without an export: a zoo model and images give a ranges file, whole or in shards to merge."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import reduce
from pathlib import Path

from export_zoo.base.errors import EnvironmentFailureError, UsageError
from export_zoo.base.files import cache_directory, replacing
from export_zoo.calibration.images import check_folder
from export_zoo.calibration.range_warnings import warnings_of
from export_zoo.calibration.ranges import Ranges
from export_zoo.engines.precision.int8.precision import INT8
from export_zoo.exporter.cluster.ray_cluster import RayCluster
from export_zoo.exporter.options import ExportOptions
from export_zoo.exporter.run.cache import StageCache
from export_zoo.exporter.run.context import Context
from export_zoo.exporter.run.report import Reporter
from export_zoo.exporter.stages import network
from export_zoo.exporter.stages import ranges as ranges_stage
from export_zoo.exporter.stages.images import choose_images
from export_zoo.exporter.stages.shards import workers_on


def _write(ranges: Ranges, out: Path) -> None:
    try:
        with replacing(out) as temporary:
            ranges.write(temporary)
    except OSError as error:
        raise EnvironmentFailureError(
            f"--out {out}: cannot be written: {error.strerror}", hint="give a file in a writable directory"
        ) from error


def _check_out(out: Path) -> None:
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UsageError(
            f"--out {out}: must be a file in an existing directory", hint="for example --out ranges.json"
        )


def calibrate(
    options: ExportOptions,
    out: Path,
    *,
    shard: tuple[int, int] = (1, 1),
    shards: int | None = None,
    cluster: RayCluster | None = None,
    reporter: Reporter | None = None,
) -> Ranges:
    """Calibrate a zoo model on the images that `export` would calibrate it on, and write the ranges file.

    Args:
        options: the network and its images; options for building engines have no effect.
        shard: (i, n): calibrate on only the i-th of n parts of these images.
        shards: number of parts to calibrate on, one by one or at once on a cluster; the result is the same. None for
            one, or for as many as the cluster can run at once.
        cluster: runs the shards; by default this machine does.

    Raises:
        EnvironmentFailureError: a shard cannot run on the cluster.
        ExportZooError: see `export`.
    """
    if options.calib is None:
        raise UsageError("calibrate needs --calib DIR", hint="pass a folder of 300 to 1,000 images")
    _check_out(out)
    check_folder(options.calib, "--calib")
    options = dataclasses.replace(options, precisions=(INT8.name,))
    reporter = reporter or Reporter()
    with reporter.library_warnings(), StageCache(cache_directory() if options.cache else None) as cache:
        context = Context(options, reporter, cache)
        spec = network.resolve_model(context)
        workers = workers_on(cluster, spec, options) if cluster is not None else None
        chosen = choose_images(context, spec)
        count = len(chosen.splits["calibrate"])
        if shards is None:
            shards = min(count, workers.shards) if workers is not None else 1
        if max(shards, shard[1]) > count:
            given = f"--shards {shards}" if shards > 1 else f"--shard {shard[0]}/{shard[1]}"
            raise UsageError(f"{given}: there are only {count} images", hint="use fewer shards")
        parts = [(index, shards) for index in range(1, shards + 1)] if shards > 1 else [shard]
        exported = network.export_graph(context, spec, network.EagerModel(spec))
        simplified = network.simplify_graph(context, spec, exported)
        graph = simplified.file(network.Simplified.GRAPH)
        _, ranges = ranges_stage.calibrate(context, spec, graph, chosen, parts, workers)
        _write(ranges, out)
    return ranges


def merge(files: Sequence[Path], out: Path, *, reporter: Reporter | None = None) -> Ranges:
    """Merge the ranges files of shards. The result is bit-identical to one calibration on all their images.

    Raises:
        UsageError: `out` is not a file in an existing directory.
        BadInputError: one of them is not a ranges file, or they do not belong together.
    """
    _check_out(out)
    ranges = reduce(Ranges.merged, (Ranges.read(path) for path in files))
    _write(ranges, out)
    for text in warnings_of(ranges, {}):
        (reporter or Reporter()).warn(text)
    return ranges
