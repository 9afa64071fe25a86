"""Stage: compare engines with eager PyTorch on verify images beyond those that a bundle has, in constant memory.

The images are divided into shards of a fixed size, whose sums are merged in order: figures do not depend on who works
on them, but for the last bits of PyTorch's logits, which depend on its threads. Finished shards are cached.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from export_zoo.base import graph_io
from export_zoo.base.errors import EnvironmentFailureError
from export_zoo.base.graph_io import sha256_of
from export_zoo.calibration.images import ImageFile, ImageStream, Progress
from export_zoo.engines.bundle.manifest import Recipe
from export_zoo.engines.bundle.reader import HeldOut
from export_zoo.engines.parity.sums import Sums, sums_of
from export_zoo.engines.parity.tasks import Head
from export_zoo.engines.precision.registry import PRECISIONS
from export_zoo.engines.targets.base import Opening, Runner
from export_zoo.engines.targets.plan import Plan
from export_zoo.engines.verification.gate import run_in_batches
from export_zoo.engines.verification.verify import opened
from export_zoo.exporter.cluster.files import Named, Part, Wanted
from export_zoo.exporter.run.at_once import run_at_once
from export_zoo.exporter.run.cache import StageResult
from export_zoo.exporter.run.context import Context
from export_zoo.exporter.stages.build import EngineFiles
from export_zoo.exporter.stages.images import MAX_HELD_OUT, ChosenImages
from export_zoo.exporter.stages.network import EagerModel
from export_zoo.exporter.stages.shards import (
    Here,
    Workers,
    differences,
    facts,
    images_there,
    images_wanted,
    refuse_unreadable,
)

if TYPE_CHECKING:
    from export_zoo.exporter.models.spec import ModelSpec

SHARD = 1024
"""Number of images of a shard."""

BLOCK = 32
"""Least number of images that are in memory at once."""


@dataclass(frozen=True)
class _Engine:
    """An engine to compare, without its files."""

    name: str
    target: str
    precision: str
    plan: Plan | None
    saturating_session: Mapping[str, str]
    only_graph: bool
    files: tuple[str, str]
    """File names of the engine and of its precision graph."""


@dataclass(frozen=True)
class _Order:
    """A shard of the verify images.

    Attributes:
        own_file: whether the network is of the user's own file.
        labels: class index of each image, if known.
        whole: number of files of the set.
        largest: largest magnitude of each of eager's outputs, which makes ties.
    """

    spec: ModelSpec
    own_file: bool
    files: Sequence[ImageFile]
    root: Path
    labels: Sequence[int] | None
    whole: int
    engines: Sequence[_Engine]
    heads: Mapping[str, Head]
    batch: int
    largest: Sequence[float]


@dataclass(frozen=True)
class Evaluated:
    """Sums of a shard, by engine and output: those of `key`."""

    SUMS: ClassVar[str] = "sums.npz"
    unreadable: list[tuple[str, str]]
    """Names of images that were left out, with reasons."""
    read: int
    """Number of images that were compared."""


def _key(engine: str, output: str) -> str:
    return f"{engine}/{output}"


def _evaluate(
    places: Sequence[str], order: _Order, threads: int, progress: Progress
) -> tuple[dict[str, Sums], Evaluated]:
    """Compare engines on one shard. `places`: images, each engine's file and graph, weights, the user's own file."""
    import torch

    from export_zoo.exporter.graph.reference import eager_outputs

    if threads:
        torch.set_num_threads(threads)
    root, *rest = places
    folders, rest = rest[: 2 * len(order.engines)], rest[2 * len(order.engines) :]
    spec = order.spec
    if spec.weights_path is not None:
        spec = dataclasses.replace(spec, weights_path=Path(rest.pop(0)))
    if order.own_file:
        spec = dataclasses.replace(spec, factory_path=rest.pop(0))
    module, p = EagerModel(spec).built[0], spec.preprocess
    runners: dict[str, Runner] = {}
    for engine, place, graph in zip(order.engines, folders[::2], folders[1::2], strict=True):
        opening = Opening(
            Path(place) / engine.files[0],
            PRECISIONS[engine.precision],
            engine.plan,
            Path(graph) / engine.files[1],
            threads=threads,
            saturating_session=engine.saturating_session,
        )
        runners[engine.name] = opened(engine.target, opening, only_graph=engine.only_graph)
    block = order.batch * math.ceil(BLOCK / order.batch)
    files = images_there(order.files, order.root, root)
    labels = dict(zip((file.sha256 for file in files), order.labels or (), strict=False))
    found: dict[str, Sums] = {}
    unreadable: list[tuple[str, str]] = []
    read = 0
    for start in range(0, len(files), block):
        stream = ImageStream(files[start : start + block], p, block, order.root, whole=order.whole)
        for pixels in stream:
            eager = eager_outputs(module, pixels, p)
            known = [labels[file.sha256] for file in stream.images] if labels else None
            for name, runner in runners.items():
                outputs = run_in_batches(runner, pixels, p, order.batch)
                for index, (output, head) in enumerate(order.heads.items()):
                    sums = sums_of(
                        head.rows(eager[index]),
                        head.rows(outputs[index]),
                        head,
                        known if index == 0 else None,
                        order.largest[index],
                    )
                    key = _key(name, output)
                    found[key] = found[key].merged(sums) if key in found else sums
            read += len(pixels)
            progress(len(pixels))
        unreadable += [(u.name, u.reason) for u in stream.unreadable]
    return found, Evaluated(unreadable, read)


def evaluate(
    context: Context,
    spec: ModelSpec,
    chosen: ChosenImages,
    built: Sequence[EngineFiles],
    recipe: Recipe,
    held: HeldOut,
    workers: Workers | None = None,
) -> dict[str, dict[str, Sums]]:
    """Sums over all verify images by engine and output; empty if the held-out images are all.

    With random weights there is nothing to learn from more images: a warning says so.

    Args:
        workers: who compares; by default this machine. Engines that only this machine can run are compared here.

    Raises:
        BadInputError: too many images cannot be decoded.
        EnvironmentFailureError: the workers' results would not be this machine's.
    """
    files, root = chosen.splits["verify"], chosen.verify_root
    if len(files) <= MAX_HELD_OUT or root is None:
        return {}
    if recipe.source.weights.random:
        context.reporter.warn(f"--verify-images: random weights are compared on {MAX_HELD_OUT} images only")
        return {}
    by: Workers = workers or Here()
    if differing := differences(by.facts, facts()):
        raise EnvironmentFailureError(
            f"--on ray: nodes have {differing} as this machine: they would not judge the engines for this machine",
            hint="run the command on a machine like the nodes",
        )
    if any(engine.runs_here and not engine.is_graph for engine in built):
        by = Here()
    parts = [files[start : start + SHARD] for start in range(0, len(files), SHARD)]
    own_file = spec.zoo == "python" and Path(spec.factory_path).is_file()
    engines = [
        _Engine(
            engine.name,
            engine.target,
            engine.precision,
            engine.plan,
            engine.saturating_cpu_session or {},
            not engine.runs_here,
            (engine.file.name, engine.graph.name),
        )
        for engine in built
    ]
    wanted: list[Wanted] = []
    for engine in built:
        graph = Part.of_files([engine.graph, *graph_io.external_files(engine.graph)])
        wanted += [graph if engine.is_graph else Part.of_files([engine.file]), graph]
    if spec.weights_path is not None:
        wanted.append(Named.of(spec.weights_path))
    if own_file:
        wanted.append(Named.of(Path(spec.factory_path)))
    largest = [float(np.abs(output).max()) for output in held.outputs(recipe).values()]

    def evaluated(index: int, progress: Progress) -> StageResult[Evaluated]:
        part, start = parts[index], index * SHARD
        labels = chosen.labels[start : start + len(part)] if chosen.labels is not None else None

        def make(directory: Path) -> Evaluated:
            order = _Order(
                spec,
                own_file,
                part,
                root,
                labels,
                len(files),
                engines,
                recipe.heads,
                recipe.batch.opt,
                largest,
            )
            shard = [images_wanted(part, root), *wanted]
            sums, found = by.run(_evaluate, order, shard, len(part), progress)
            arrays = {
                f"{key}/{name}": array for key, one in sums.items() for name, array in one.arrays().items()
            }
            np.savez(directory / Evaluated.SUMS, **cast("dict[str, Any]", arrays))
            return found

        key = context.key(
            engines={engine.name: [sha256_of(engine.file), sha256_of(engine.graph)] for engine in built},
            graphs_only=[engine.only_graph for engine in engines],
            spec=spec.key(),
            heads=[dataclasses.asdict(head) for head in recipe.heads.values()],
            images=[file.sha256 for file in part],
            labels=labels,
            batch=recipe.batch.opt,
            largest=largest,
            made_with=by.facts,
        )
        return context.cache.run("evaluate", key, make, Evaluated)

    results: dict[int, StageResult[Evaluated]] = {}
    with context.reporter.stage("evaluate") as stage:
        with context.reporter.bar("evaluate", len(files)) as progress:
            tasks = [partial(evaluated, index, progress) for index in range(len(parts))]
            results.update(run_at_once(tasks, by.at_once, by.stop))
        shards = [results[index] for index in range(len(parts))]
        unreadable = [pair for shard in shards for pair in shard.data.unreadable]
        refuse_unreadable(str(root), unreadable, len(files))
        stage.cached = all(shard.cached for shard in shards)
        count = sum(shard.data.read for shard in shards)
        stage.detail = f"{len(built)} engine(s) on {count} images in {len(shards)} shard(s)"
    context.warn_unreadable(root, unreadable)
    merged: dict[str, dict[str, Sums]] = {engine.name: {} for engine in built}
    for engine in built:
        for output in recipe.heads:
            of_shards = [_read(shard, _key(engine.name, output)) for shard in shards if shard.data.read]
            merged[engine.name][output] = reduce(Sums.merged, of_shards)
    return merged


def _read(shard: StageResult[Evaluated], key: str) -> Sums:
    with np.load(shard.file(Evaluated.SUMS)) as arrays:
        prefix = f"{key}/"
        return Sums.of_arrays(
            {name[len(prefix) :]: arrays[name] for name in arrays if name.startswith(prefix)}
        )
