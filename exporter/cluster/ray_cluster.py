"""A Ray cluster: runs functions on its nodes, brings them their files, and tries again where a node dies.

Nodes need export-zoo of the same version and code.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from export_zoo.base.errors import EnvironmentFailureError, ExportZooError, TargetUnavailableError
from export_zoo.base.package import __version__
from export_zoo.exporter.cluster.files import Part, Wanted
from export_zoo.exporter.run.at_once import StoppedError
from export_zoo.exporter.run.cache import code_digest, work_directory

ATTEMPTS = 3
"""How often a task is tried whose node or worker dies."""

_POLL_SECONDS = 0.5


class TaskError(Exception):
    """A task has no result: its function raised an exception, or its node or worker died each time."""


class NoNodeError(Exception):
    """No node of the cluster can ever run the task."""


@dataclass(frozen=True)
class Needs:
    """The resources that a task asks of its node.

    Attributes:
        memory: in bytes.
        cores: number of cores; fewer if no node with the memory has as many.
        accelerators: types of GPU: it gets one of the first type that the cluster has. Empty: none.
    """

    memory: int
    cores: int
    accelerators: Sequence[str] = ()


@dataclass(frozen=True)
class _Missing:
    """A task's answer if its node lacks files: their indices."""

    indices: tuple[int, ...]


def _with_files(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    wanted: Sequence[Wanted],
    packs: Mapping[int, list[Any]],
) -> Any:
    """Run a function on a node: function(places, *arguments), with the node's paths of what is wanted, in order.

    Args:
        packs: references to what has travelled, by index, each in a list: Ray fetches it only if it is needed.
    """
    import ray

    with work_directory() as scratch:
        places, missing = [], []
        for index, one in enumerate(wanted):
            place = one.here()
            if place is None and index in packs:
                place = one.unpacked(bytes(ray.get(packs[index][0])), scratch)
            if place is None:
                missing.append(index)
            else:
                places.append(place)
        return _Missing(tuple(missing)) if missing else function(places, *arguments)


def _facts() -> dict[str, Any]:
    """This node's version and code of export-zoo. A task asks for them on each node."""
    return {"version": __version__, "code": code_digest()}


class RayCluster:
    """A connection to a Ray cluster. Its methods may be called from several threads at once.

    Args:
        address: of the cluster, `ray://HOST:PORT` for Ray's client; None for the one that runs on this machine, or a
            new one.

    Raises:
        TargetUnavailableError: Ray is not installed.
        EnvironmentFailureError: there is no cluster at the address, or a node has another export-zoo.
    """

    def __init__(self, address: str | None) -> None:
        try:
            import ray
        except ImportError as error:
            raise TargetUnavailableError(
                "--on ray: Ray is not installed", hint="pip install 'export-zoo[ray]', here and on all nodes"
            ) from error
        self._ray, self._stopped, self._lock = ray, threading.Event(), threading.Lock()
        try:
            if not ray.is_initialized():
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            hint = "start a cluster with `ray start --head`, or correct the address"
            if address is not None:
                hint += "; newer versions of Ray need more: docs/scale.md"
            raise EnvironmentFailureError(
                f"--on {address or 'ray'}: cannot connect: {str(error).strip()}", hint=hint
            ) from error
        self._packs: dict[str, Any] = {}
        self._remote = ray.remote(_with_files)
        self._nodes = [node for node in _nodes(ray) if node["Alive"]]
        self._check_nodes()

    @property
    def cores(self) -> int:
        """Number of cores of all nodes."""
        return sum(int(node["Resources"].get("CPU", 0)) for node in self._nodes)

    def on_each_node(
        self, function: Callable[..., Any], *arguments: Any, with_cores: bool = False
    ) -> dict[str, Any]:
        """Results of a function on each node, by the node's name. Nodes that are gone are forgotten.

        Args:
            with_cores: only on nodes that have cores for tasks.

        Raises:
            EnvironmentFailureError: a node cannot run it.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        asked = []
        for node in self._nodes:
            if with_cores and not node["Resources"].get("CPU", 0):
                continue
            there = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
            task = self._ray.remote(function).options(num_cpus=0, scheduling_strategy=there, max_retries=1)
            asked.append((node, task.remote(*arguments)))
        found = {}
        for node, reference in asked:
            name = f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})"
            try:
                found[name] = self._ray.get(reference)
            except (self._ray.exceptions.TaskUnschedulableError, self._ray.exceptions.NodeDiedError):
                # Ray may list it as alive for some seconds. Other threads may be reading the list.
                self._nodes = [other for other in self._nodes if other is not node]
            except self._ray.exceptions.RayError as error:
                raise EnvironmentFailureError(
                    f"--on ray: node {name} cannot run export-zoo: {_last_line(error)}",
                    hint=f"install export-zoo {__version__} on all nodes",
                ) from error
        return found

    def _check_nodes(self) -> None:
        own = _facts()
        for name, facts in self.on_each_node(_facts).items():
            if facts != own:
                same = facts["version"] == own["version"]
                raise EnvironmentFailureError(
                    f"--on ray: node {name} has export-zoo {facts['version']}, "
                    + ("but other code" if same else f"this machine {own['version']}"),
                    hint="install the same version on all nodes",
                )

    def accelerator(self, types: Sequence[str]) -> str:
        """The first of these types of GPU that the cluster has. Raises NoNodeError if it has none of them."""
        for name in types:
            if any(f"accelerator_type:{name}" in node["Resources"] for node in self._nodes):
                return name
        raise NoNodeError(f"no node of the cluster has a {' or '.join(types)}")

    def _options(self, needs: Needs) -> dict[str, Any]:
        """Ray's options of a task. Raises NoNodeError if no node can ever run it."""
        nodes = [node["Resources"] for node in self._nodes]
        options: dict[str, Any] = {"memory": needs.memory, "max_retries": 0}
        if needs.accelerators:
            kind = self.accelerator(needs.accelerators)
            options |= {"num_gpus": 1, "accelerator_type": kind}
            nodes = [node for node in nodes if f"accelerator_type:{kind}" in node and node.get("GPU", 0) >= 1]
        most = max((float(node.get("memory", 0)) for node in nodes), default=0.0)
        if needs.memory > most:
            raise NoNodeError(
                "no node of the cluster can take it: it is expected to take "
                f"{needs.memory / 2**30:.1f} GiB of memory, the largest node has {most / 2**30:.1f} GiB"
            )
        fitting = [node for node in nodes if float(node.get("memory", 0)) >= needs.memory]
        return options | {"num_cpus": min(needs.cores, max(int(node.get("CPU", 0)) for node in fitting))}

    def run(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        needs: Needs,
        wanted: Sequence[Wanted] = (),
    ) -> Any:
        """Run function(places, *arguments) on a node, and wait for its result.

        Files are read at the same path where the node has them there with the same contents. Otherwise they travel
        through Ray's object store.

        Args:
            wanted: files and folders that it reads; `places` are the node's paths of these.

        Raises:
            NoNodeError: no node of the cluster can ever run it.
            ExportZooError: the function raised it.
            TaskError: it raised another exception, or its node or worker died `ATTEMPTS` times.
            StoppedError: `stop` was called.
        """
        task, packs, died = self._remote.options(**self._options(needs)), dict[int, list[Any]](), 0
        while True:
            try:
                found = self._wait(task.remote(function, arguments, wanted, packs))
            except self._ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, ExportZooError):
                    raise error.cause from error
                raise TaskError(f"its task failed: {_last_line(error)}") from error
            except self._ray.exceptions.RayError as error:
                died += 1
                if died == ATTEMPTS:
                    raise TaskError(f"its node or worker died {died} times: {_last_line(error)}") from error
                continue
            if not isinstance(found, _Missing):
                return found
            packs |= {index: [self._sent(wanted[index])] for index in found.indices}

    def _sent(self, one: Wanted) -> Any:
        """A reference to something packed. What nodes keep is packed once, and one at a time: it may be large."""
        with self._lock:
            if isinstance(one, Part) and not one.kept:
                return self._ray.put(one.pack())
            key = repr(one)
            if key not in self._packs:
                self._packs[key] = self._ray.put(one.pack())
            return self._packs[key]

    def _wait(self, reference: Any) -> Any:
        while True:
            ready, _ = self._ray.wait([reference], timeout=_POLL_SECONDS)
            if ready:
                return self._ray.get(reference)
            if self._stopped.is_set():
                self._ray.cancel(reference)
                raise StoppedError

    def stop(self) -> None:
        """Cancel all tasks that run, and begin no more."""
        self._stopped.set()


def _nodes(ray: Any) -> list[dict[str, Any]]:
    """The cluster's nodes, as Ray describes them."""
    return list(ray.nodes())


def _last_line(error: Exception) -> str:
    return next(
        (line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__
    )
