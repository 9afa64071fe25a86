"""Who works on shards of images: this machine, or the nodes of a Ray cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from export_zoo.base.errors import EnvironmentFailureError
from export_zoo.base.machine import instruction_set, library_versions
from export_zoo.calibration.images import ImageFile, Progress, Unreadable, refuse_if_too_many_unreadable
from export_zoo.exporter.cluster.files import Part, Wanted
from export_zoo.exporter.cluster.ray_cluster import Needs, NoNodeError, RayCluster, TaskError
from export_zoo.exporter.options import ExportOptions
from export_zoo.exporter.run.at_once import CORES_EACH

if TYPE_CHECKING:
    from export_zoo.exporter.models.spec import ModelSpec

AT_ONCE = 256
"""Largest number of shards that wait for a cluster at once: each is a thread of this process."""

OrderT = TypeVar("OrderT")
ResultT = TypeVar("ResultT")

Work = Callable[[Sequence[str], OrderT, int, Progress], ResultT]
"""A module's function that works on one shard: work(places, order, threads, progress).

`places` are the paths of the wanted files and folders there; `threads` is the number of threads, 0 for all cores.
"""


def facts() -> dict[str, str]:
    """This machine's instruction set and libraries: the bits of results depend on them, beside the code."""
    libraries = ("onnxruntime", "numpy", "pillow", "torch", "torchvision")
    return {"instruction set": instruction_set(), **library_versions(*libraries)}


def images_wanted(files: Sequence[ImageFile], root: Path) -> Part:
    """The images of a shard, for `Workers.run`."""
    return Part(str(root.absolute()), {file.path.relative_to(root).as_posix(): file.sha256 for file in files})


def images_there(files: Sequence[ImageFile], root: Path, place: str) -> list[ImageFile]:
    """The same images where they are read: in the folder `place` instead of `root`."""
    return [dataclasses.replace(file, path=Path(place) / file.path.relative_to(root)) for file in files]


def refuse_unreadable(where: str, unreadable: Sequence[tuple[str, str]], total: int) -> None:
    """Raise BadInputError if too many images of all shards, given as (name, reason), cannot be decoded."""
    refuse_if_too_many_unreadable(where, [Unreadable(*pair) for pair in unreadable], total)


class Workers(Protocol):
    """Those who work on shards."""

    at_once: int
    """Number of shards that may wait at once."""
    shards: int
    """Number of shards that are worked on at once."""
    facts: Mapping[str, str]
    """See `facts`."""

    def run(
        self,
        work: Work[OrderT, ResultT],
        order: OrderT,
        wanted: Sequence[Wanted],
        images: int,
        progress: Progress,
    ) -> ResultT:
        """Work on one shard, and wait for the result. May be called from several threads at once.

        Args:
            wanted: the files and folders that it reads.
            images: number of images of the shard, for the progress.

        Raises:
            EnvironmentFailureError: the shard cannot be worked on.
            StoppedError: `stop` was called.
            ExportZooError: the function raised it.
        """

    def stop(self) -> None:
        """End all work."""


class Here:
    """This machine, with all its cores for one shard after the other."""

    at_once = shards = 1
    threads = 0
    """Number of threads; 0 for all cores."""

    def __init__(self) -> None:
        self.facts: Mapping[str, str] = facts()

    def run(
        self,
        work: Work[OrderT, ResultT],
        order: OrderT,
        wanted: Sequence[Wanted],
        images: int,
        progress: Progress,
    ) -> ResultT:
        del images
        return work([one.path for one in wanted], order, self.threads, progress)

    def stop(self) -> None:
        pass


def _untold(done: int) -> None:
    del done  # progress on a node, which nobody sees


class OnCluster:
    """The nodes of a Ray cluster: a task for each shard.

    Args:
        memory: bytes that a shard is expected to take.

    Raises:
        EnvironmentFailureError: nodes differ in what the bits of results depend on.
    """

    def __init__(self, cluster: RayCluster, memory: int) -> None:
        self._cluster, self._needs = cluster, Needs(memory, CORES_EACH)
        self.shards = max(1, cluster.cores // CORES_EACH)
        self.at_once = min(2 * self.shards, AT_ONCE)  # the next one waits on the cluster, not here
        found: dict[str, dict[str, str]] = cluster.on_each_node(facts, with_cores=True)
        first = next(iter(found), "")
        self.facts: Mapping[str, str] = found.get(first) or facts()
        for name, there in found.items():
            if differing := differences(there, self.facts):
                raise EnvironmentFailureError(
                    f"--on ray: node {name} has {differing} as {first}: results of shards could not be merged",
                    hint="use nodes of one kind, with the same libraries",
                )

    def run(
        self,
        work: Work[OrderT, ResultT],
        order: OrderT,
        wanted: Sequence[Wanted],
        images: int,
        progress: Progress,
    ) -> ResultT:
        try:
            found: Any = self._cluster.run(work, order, CORES_EACH, _untold, needs=self._needs, wanted=wanted)
        except (NoNodeError, TaskError) as error:
            raise EnvironmentFailureError(
                f"--on ray: a shard failed: {error}", hint="run the command again: finished shards are cached"
            ) from error
        progress(images)
        return found  # type: ignore[no-any-return]

    def stop(self) -> None:
        self._cluster.stop()


def workers_on(cluster: RayCluster, spec: ModelSpec, options: ExportOptions) -> OnCluster:
    """The cluster's nodes, for a network. Raises EnvironmentFailureError, see `OnCluster`."""
    from export_zoo.exporter.models import memory, zoo

    return OnCluster(cluster, zoo.expected_memory(spec, options) or memory.UNKNOWN)


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """How facts differ from others, for people; empty if they do not."""
    return ", ".join(
        f"{what} {there[what]}, not {have}" for what, have in here.items() if there[what] != have
    )
