"""A Ray cluster as a place for cells: each is a task of its own, on a node that has what it needs.

Nodes need export-zoo of the same version and code. Files and folders that a cell names are read at the same path if a
node has them there with the same contents; otherwise they travel through Ray's object store. Results and bundles come
back to the driver, which alone writes to --out.
"""

from __future__ import annotations

import io
import logging
import socket
import tarfile
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from export_zoo.base.cuda import device_name
from export_zoo.base.errors import EnvironmentFailureError, TargetUnavailableError
from export_zoo.base.files import cache_directory
from export_zoo.base.package import __version__
from export_zoo.exporter.matrix import cell as cells
from export_zoo.exporter.matrix.cell import Limits
from export_zoo.exporter.matrix.inputs import content_of, fingerprints, named_paths
from export_zoo.exporter.matrix.plan import Cell
from export_zoo.exporter.matrix.process import StoppedError
from export_zoo.exporter.matrix.results import CellResult
from export_zoo.exporter.publish import failed_place
from export_zoo.exporter.run.cache import code_digest

ATTEMPTS = 3
"""How often a cell is tried whose node or worker dies."""

AT_ONCE = 256
"""Largest number of cells that wait for the cluster at once."""

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class _Order:
    """An order tells a node what to do."""

    cell: Cell
    exported: CellResult | None
    bundle: str
    """Name of the bundle's folder."""
    limits: Limits
    contents: Mapping[str, str]
    """SHA-256 of the files and folders that the cell names, by absolute path."""
    accelerator: str
    """Type of the node's GPU; empty if the cell needs none."""


@dataclass(frozen=True)
class _Delivery:
    """A delivery is what a node gives back."""

    result: CellResult
    bundles: bytes
    """The folders that it wrote, as a tar archive."""


def _packed(root: Path, *names: str) -> bytes:
    """Files and folders of a folder as an uncompressed tar archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            archive.add(root / name, arcname=name)
    return buffer.getvalue()


def _unpack(data: bytes, folder: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(folder, filter="data")


def _here(path: str, content: str, fetch: Callable[[], bytes]) -> str:
    """Where this node has a file or folder: at the same path, or in its cache, where it is put if it is not there."""
    own = Path(path)
    if own.exists() and content_of(own) == content:
        return path
    kept = cache_directory() / "inputs" / content / own.name
    if not kept.exists():
        kept.parent.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent.parent, prefix=".new-") as directory:
            _unpack(fetch(), Path(directory))
            try:
                Path(directory).rename(kept.parent)
            except OSError:
                if not kept.exists():  # another task was not faster
                    raise
            Path(directory).mkdir(exist_ok=True)  # for its removal
    return str(kept)


def _moved(cell: Cell, places: Mapping[str, str]) -> Cell:
    """The cell, with its files and folders where this node has them."""
    arguments = []
    for argument in cell.arguments:
        option, equals, value = argument.partition("=")
        arguments.append(f"{option}{equals}{places.get(value, value)}")
    source, colon, function = cell.model.rpartition(":")
    model = f"{places[source]}:{function}" if colon and source in places else cell.model
    return replace(cell, model=model, arguments=tuple(arguments))


def _run_on_node(order: _Order, inputs: Mapping[str, list[Any]]) -> _Delivery:
    """The task of a cell, on its node."""
    import ray

    if order.accelerator and order.accelerator not in (device_name() or ""):
        why = f"node {socket.gethostname()} calls itself {order.accelerator}; its GPU is {device_name() or 'absent'}"
        return _Delivery(_failed(order.cell, why), _packed(Path()))
    with tempfile.TemporaryDirectory(prefix="export-zoo-ray-") as directory:
        folder = Path(directory)
        places = {}
        for path, content in order.contents.items():

            def fetch(path: str = path) -> bytes:
                return bytes(ray.get(inputs[path][0]))

            places[path] = _here(path, content, fetch)
        cell, bundle = _moved(order.cell, places), folder / order.bundle
        if order.exported is None:
            result = cells.run_cell(cell, bundle, order.limits)
        else:
            _unpack(bytes(ray.get(inputs[""][0])), folder)
            result = cells.run_on_cpu(cell, order.exported, bundle, order.limits)
        made = [path.name for path in (bundle, failed_place(bundle)) if path.exists()]
        return _Delivery(result, _packed(folder, *made))


def _facts() -> dict[str, Any]:
    """This node's version and code of export-zoo. A task asks for them on each node."""
    return {"version": __version__, "code": code_digest()}


class RayCluster:
    """Runs cells as tasks of a Ray cluster.

    Args:
        address: of the cluster, `ray://HOST:PORT` for Ray's client; None for the one that runs on this machine, or a
            new one.
        cores: number of cores of each cell.
        task: what runs a cell on its node.

    Raises:
        TargetUnavailableError: Ray is not installed.
        EnvironmentFailureError: there is no cluster at the address, or a node has another export-zoo.
    """

    def __init__(
        self,
        address: str | None,
        *,
        cores: int,
        task: Callable[[_Order, Mapping[str, list[Any]]], _Delivery] = _run_on_node,
    ) -> None:
        try:
            import ray
        except ImportError as error:
            raise TargetUnavailableError(
                "--on ray: Ray is not installed", hint="pip install 'export-zoo[ray]', here and on all nodes"
            ) from error
        self._ray, self._cores, self._task, self._stopped = ray, cores, task, threading.Event()
        try:
            if not ray.is_initialized():
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise EnvironmentFailureError(
                f"--on {address or 'ray'}: cannot connect: {error}",
                hint="start a cluster with `ray start --head`, or correct the address",
            ) from error
        self.at_once = AT_ONCE
        self._packs: dict[str, Any] = {}
        self._packing = threading.Lock()
        self._nodes = [node for node in _nodes(ray) if node["Alive"]]
        self._check_nodes()
        self._known_versions: dict[tuple[str, ...], list[dict[str, str]]] = {}

    def _on_each_node(self, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """Results of a function on each node, by the node's name."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        asked = {}
        for node in self._nodes:
            there = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
            task = self._ray.remote(function).options(num_cpus=0, scheduling_strategy=there, max_retries=1)
            asked[f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})"] = task.remote(*arguments)
        return {name: self._ray.get(reference) for name, reference in asked.items()}

    def _check_nodes(self) -> None:
        own = _facts()
        try:
            found = self._on_each_node(_facts)
        except self._ray.exceptions.RayError as error:
            raise EnvironmentFailureError(
                f"--on ray: a node cannot run export-zoo: {_last_line(error)}",
                hint=f"install export-zoo {__version__} on all nodes",
            ) from error
        for name, facts in found.items():
            if facts != own:
                same = facts["version"] == own["version"]
                raise EnvironmentFailureError(
                    f"--on ray: node {name} has export-zoo {facts['version']}, "
                    + ("but other code" if same else f"this machine {own['version']}"),
                    hint="install the same version on all nodes",
                )

    def versions(self, cell: Cell) -> list[dict[str, str]]:
        key = (cell.cpu, *cells.libraries(cell))
        if key not in self._known_versions:
            found = self._on_each_node(cells.versions, cell)
            self._known_versions[key] = [*found.values()]
        return self._known_versions[key]

    def _needs(self, cell: Cell, expected: int) -> tuple[dict[str, Any], str]:
        """The resources that a task of a cell asks for, and why no node can ever take it: empty if one can."""
        nodes = [node["Resources"] for node in self._nodes]
        needs: dict[str, Any] = {"memory": expected, "max_retries": 0}
        if cell.accelerators:
            found = [
                name
                for name in cell.accelerators
                if any(f"accelerator_type:{name}" in node for node in nodes)
            ]
            if not found:
                return needs, f"no node of the cluster has a {' or '.join(cell.accelerators)}"
            needs |= {"num_gpus": 1, "accelerator_type": found[0]}
            nodes = [
                node for node in nodes if f"accelerator_type:{found[0]}" in node and node.get("GPU", 0) >= 1
            ]
        most = max((float(node.get("memory", 0)) for node in nodes), default=0.0)
        if expected > most:
            return needs, (
                f"no node of the cluster can take it: it is expected to take {expected / 2**30:.1f} GiB of memory, the "
                f"largest node has {most / 2**30:.1f} GiB"
            )
        fitting = [node for node in nodes if float(node.get("memory", 0)) >= expected]
        return needs | {"num_cpus": min(self._cores, max(int(node.get("CPU", 0)) for node in fitting))}, ""

    def run(
        self,
        cell: Cell,
        exported: CellResult | None,
        bundle: Path,
        limits: Limits,
        expected: Callable[[], int],
    ) -> CellResult:
        needs, why_never = self._needs(cell, expected())
        if why_never:
            return _failed(cell, why_never)
        given = _absolute(cell)
        inputs = {str(path): self._pack(path) for path in named_paths(given)}
        if exported is not None:
            inputs[""] = [self._ray.put(_packed(bundle.parent, bundle.name))]
        contents = {path: content_of(Path(path)) for path in inputs if path}
        accelerator = needs.get("accelerator_type", "")
        order = _Order(given, exported, bundle.name, limits, contents, accelerator)
        reason = ""
        for _ in range(ATTEMPTS):
            task = self._ray.remote(self._task).options(**needs)
            try:
                delivery = self._wait(task.remote(order, inputs))
            except self._ray.exceptions.RayTaskError as error:
                return _failed(cell, f"its task failed: {_last_line(error)}")
            except self._ray.exceptions.RayError as error:
                reason = _last_line(error)
                continue
            if exported is None:
                _deliver(delivery.bundles, bundle)
            # As this machine names its files.
            inputs_here = fingerprints(cell) or {} if exported is None else delivery.result.inputs
            return replace(
                delivery.result, model=cell.model, command=tuple(cell.command()), inputs=inputs_here
            )
        return _failed(cell, f"its node or worker died {ATTEMPTS} times: {reason}")

    def _wait(self, reference: Any) -> _Delivery:
        while True:
            ready, _ = self._ray.wait([reference], timeout=_POLL_SECONDS)
            if ready:
                found: _Delivery = self._ray.get(reference)
                return found
            if self._stopped.is_set():
                self._ray.cancel(reference)
                raise StoppedError

    def _pack(self, path: Path) -> list[Any]:
        """A reference to the packed file or folder, in a list: so that a task fetches it only if it needs it."""
        with self._packing:
            key = f"{path} {content_of(path)}"
            if key not in self._packs:
                self._packs[key] = self._ray.put(_packed(path.parent, path.name))
            return [self._packs[key]]

    def stop(self) -> None:
        self._stopped.set()


def _nodes(ray: Any) -> list[dict[str, Any]]:
    """The cluster's nodes, as Ray describes them."""
    return list(ray.nodes())


def _absolute(cell: Cell) -> Cell:
    return _moved(cell, {str(path): str(path.resolve()) for path in named_paths(cell)})


def _deliver(bundles: bytes, bundle: Path) -> None:
    """Put a node's bundle, or the one of a failed gate, beside earlier ones, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=bundle.parent, prefix=".new-") as directory:
        _unpack(bundles, Path(directory))
        for place in (bundle, failed_place(bundle)):
            new, old = Path(directory) / place.name, Path(directory) / f"{place.name}.old"
            if not new.exists():  # an export that failed leaves an earlier bundle as it is
                continue
            if place.exists():
                place.rename(old)
            new.rename(place)


def _failed(cell: Cell, reason: str) -> CellResult:
    return CellResult(
        cell.model, cell.target, cell.precision, tuple(cell.command()), "failed", reason, cpu=cell.cpu
    )


def _last_line(error: Exception) -> str:
    return next(
        (line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__
    )
