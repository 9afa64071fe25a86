"""Shards of a calibration, and who works on them: this machine, or the nodes of a Ray cluster."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from export_zoo.base.errors import EnvironmentFailureError
from export_zoo.base.machine import instruction_set, library_versions
from export_zoo.calibration import images
from export_zoo.calibration.collect import NoImageError, collect
from export_zoo.calibration.images import ImageFile, Progress
from export_zoo.calibration.near_duplicates import FingerprintedStream
from export_zoo.calibration.preprocess import Preprocess
from export_zoo.calibration.ranges import Ranges
from export_zoo.calibration.synthetic import SyntheticStream
from export_zoo.exporter.cluster.files import Named, Part
from export_zoo.exporter.cluster.ray_cluster import Needs, NoNodeError, RayCluster, TaskError
from export_zoo.exporter.run.at_once import CORES_EACH
from export_zoo.exporter.run.context import IMAGE_BATCH


@dataclass(frozen=True)
class Order:
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
class Collected:
    """Ranges over a shard.

    Attributes:
        ranges: None if no image could be used.
        unreadable: names of images that were left out, with reasons.
        names: names of the other images, except synthetic ones.
        fingerprints: float32 [names, ...]; see `calibration.near_duplicates`.
    """

    ranges: Ranges | None
    unreadable: list[tuple[str, str]]
    names: list[str]
    fingerprints: npt.NDArray[np.float32]


def facts() -> dict[str, str]:
    """What the bits of ranges depend on, beside the code: this machine's instruction set and libraries."""
    return {
        "instruction set": instruction_set(),
        **library_versions("onnxruntime", "numpy", "pillow"),
    }


def _collect(graph: Path, order: Order, progress: Progress, threads: int = 0) -> Collected:
    p = order.preprocess
    stream = (
        FingerprintedStream(order.files, p, IMAGE_BATCH, order.root, whole=order.whole)
        if order.root is not None
        else SyntheticStream(images.MIN_CALIBRATE, order.seed, p, IMAGE_BATCH)
    )
    ranges = None
    with contextlib.suppress(NoImageError):
        ranges = collect(
            graph, stream, histograms=order.histograms, threads=threads, shard=True, progress=progress
        )
    unreadable = [(u.name, u.reason) for u in stream.unreadable]
    if not isinstance(stream, FingerprintedStream):
        return Collected(ranges, unreadable, [], np.empty((0, 0), np.float32))
    return Collected(ranges, unreadable, [image.name for image in stream.images], stream.found())


class Workers(Protocol):
    """Those who calibrate on shards."""

    at_once: int
    """Number of shards that are worked on at once."""
    facts: Mapping[str, str]
    """See `facts`."""

    def collect(self, graph: Path, order: Order, progress: Progress) -> Collected:
        """Calibrate on one shard, and wait for the result. May be called from several threads at once.

        Raises:
            BadInputError: see `calibration.collect.collect`.
            EnvironmentFailureError: the shard cannot be worked on.
            StoppedError: `stop` was called.
        """

    def stop(self) -> None:
        """End all work."""


class Here:
    """This machine, with all its cores for one shard after the other."""

    at_once = 1

    def __init__(self) -> None:
        self.facts: Mapping[str, str] = facts()

    def collect(self, graph: Path, order: Order, progress: Progress) -> Collected:
        return _collect(graph, order, progress)

    def stop(self) -> None:
        pass


def _collect_on_node(places: Sequence[str], order: Order, cores: int) -> Collected:
    """The task of a shard, on its node, which has the graph and the folder of images at `places`."""
    assert order.root is not None
    graph, root = map(Path, places)
    files = [dataclasses.replace(file, path=root / file.path.relative_to(order.root)) for file in order.files]
    there = dataclasses.replace(order, files=files)
    return _collect(graph, there, lambda _: None, threads=cores)


class OnCluster:
    """The nodes of a Ray cluster: a task for each shard.

    Args:
        memory: bytes that a shard is expected to take.

    Raises:
        EnvironmentFailureError: nodes differ in what the bits of ranges depend on.
    """

    at_once = 256

    def __init__(self, cluster: RayCluster, memory: int) -> None:
        self._cluster, self._needs = cluster, Needs(memory, CORES_EACH)
        found: dict[str, dict[str, str]] = cluster.on_each_node(facts, with_cores=True)
        first = next(iter(found), "")
        self.facts: Mapping[str, str] = found.get(first) or facts()
        for name, there in found.items():
            differing = [
                f"{what} {there[what]}, not {have}"
                for what, have in self.facts.items()
                if there[what] != have
            ]
            if differing:
                raise EnvironmentFailureError(
                    f"--on ray: node {name} has {', '.join(differing)} as {first}: the ranges could not be merged",
                    hint="calibrate on nodes of one kind, with the same libraries",
                )

    def collect(self, graph: Path, order: Order, progress: Progress) -> Collected:
        assert order.root is not None
        root = order.root.resolve()
        files = [
            dataclasses.replace(file, path=root / file.path.relative_to(order.root)) for file in order.files
        ]
        shas = {file.path.relative_to(root).as_posix(): file.sha256 for file in files}
        try:
            found: Collected = self._cluster.run(
                _collect_on_node,
                dataclasses.replace(order, files=files, root=root),
                CORES_EACH,
                needs=self._needs,
                wanted=[Named.of(graph), Part(str(root), shas)],
            )
        except (NoNodeError, TaskError) as error:
            raise EnvironmentFailureError(
                f"--on ray: a shard failed: {error}", hint="run the command again: finished shards are cached"
            ) from error
        progress(len(files))
        return found

    def stop(self) -> None:
        self._cluster.stop()
