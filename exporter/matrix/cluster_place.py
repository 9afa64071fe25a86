"""A Ray cluster as a place for cells: each is a task of its own, on a node that has what it needs.

Results and bundles come back to the driver, which alone writes to --out.
"""

from __future__ import annotations

import re
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from export_zoo.base.cuda import device_name
from export_zoo.exporter.cluster.files import Named, Part, Wanted, packed, unpack
from export_zoo.exporter.cluster.ray_cluster import Needs, NoNodeError, RayCluster, TaskError
from export_zoo.exporter.matrix import cell as cells
from export_zoo.exporter.matrix.cell import Limits
from export_zoo.exporter.matrix.inputs import fingerprints, named_paths
from export_zoo.exporter.matrix.plan import Cell
from export_zoo.exporter.matrix.results import CellResult
from export_zoo.exporter.publish import failed_place
from export_zoo.exporter.run.cache import work_directory

AT_ONCE = 256
"""Largest number of cells that wait for the cluster at once."""


@dataclass(frozen=True)
class Order:
    """An order tells a node what to do.

    Attributes:
        paths: absolute paths, on the driver, of the files and folders that the cell names.
        bundle: name of the bundle's folder.
        accelerator: type of the node's GPU; empty if the cell needs none.
    """

    cell: Cell
    exported: CellResult | None
    paths: Sequence[str]
    bundle: str
    limits: Limits
    accelerator: str


@dataclass(frozen=True)
class Delivery:
    """A delivery is what a node gives back.

    Attributes:
        bundles: the folders that it wrote, as a tar archive.
    """

    result: CellResult
    bundles: bytes


Task = Callable[[Sequence[str], Order], Delivery]
"""Runs a cell on its node. The first argument is where the node has `Order.paths`, and the exported bundle's parent."""


def _moved(cell: Cell, places: Mapping[str, str]) -> Cell:
    """The cell, with its files and folders at other places."""
    arguments = []
    for argument in cell.arguments:
        option, equals, value = argument.partition("=")
        arguments.append(f"{option}{equals}{places.get(value, value)}")
    source, colon, function = cell.model.rpartition(":")
    model = f"{places[source]}:{function}" if colon and source in places else cell.model
    return replace(cell, model=model, arguments=tuple(arguments))


CAPABILITIES = {
    **dict.fromkeys(("V100",), "7.0"),
    **dict.fromkeys(("T4",), "7.5"),
    **dict.fromkeys(("A100",), "8.0"),
    **dict.fromkeys(("A10", "A10G", "A40", "A6000"), "8.6"),
    **dict.fromkeys(("L4", "L40", "L40S"), "8.9"),
    **dict.fromkeys(("H20", "H100", "H200", "GH200"), "9.0"),
    **dict.fromkeys(("B200", "GB200"), "10.0"),
    **dict.fromkeys(("B300", "GB300"), "10.3"),
}
"""Compute capability by type of GPU, as NVIDIA lists them (developer.nvidia.com/cuda-gpus)."""


def why_not_accelerator(kind: str, device: str | None) -> str:
    """The reason why a node's GPU is not what the node calls it; empty if it is.

    Args:
        kind: a type as Ray names it: "H100", "A100-80G".
        device: see `device_name`.
    """
    model, *memory = kind.split("-")
    if device is None:
        return "its GPU is absent"
    name, _, capability = device.rpartition(", ")
    known = CAPABILITIES.get(model, capability)
    same = re.search(rf"\b{re.escape(model)}\b", name) and all(size in name for size in memory)
    return "" if same and capability == known else f"its GPU is {device}"


def run_on_node(places: Sequence[str], order: Order) -> Delivery:
    """The task of a cell, on its node."""
    if order.accelerator and (why_not := why_not_accelerator(order.accelerator, device_name())):
        why = f"node {socket.gethostname()} calls itself {order.accelerator}; {why_not}"
        return Delivery(_failed(order.cell, why), packed(Path()))
    cell = _moved(order.cell, dict(zip(order.paths, places, strict=False)))
    with work_directory() as folder:
        if order.exported is None:
            bundle = folder / order.bundle
            result = cells.run_cell(cell, bundle, order.limits)
            made = [path.name for path in (bundle, failed_place(bundle)) if path.exists()]
            return Delivery(result, packed(folder, *made))
        exported = Path(places[-1]) / order.bundle
        return Delivery(cells.run_on_cpu(cell, order.exported, exported, order.limits), packed(Path()))


class ClusterPlace:
    """Runs cells as tasks of a Ray cluster.

    Args:
        cores: number of cores of each cell.
        task: what runs a cell on its node.
    """

    def __init__(self, cluster: RayCluster, *, cores: int, task: Task = run_on_node) -> None:
        self.at_once = AT_ONCE
        self._cluster, self._cores, self._task = cluster, cores, task
        self._known_versions: dict[tuple[str, ...], list[dict[str, str]]] = {}

    def versions(self, cell: Cell) -> list[dict[str, str]]:
        key = (cell.cpu, *cells.libraries(cell))
        if key not in self._known_versions:
            self._known_versions[key] = [*self._cluster.on_each_node(cells.versions, cell).values()]
        return self._known_versions[key]

    def run(
        self,
        cell: Cell,
        exported: CellResult | None,
        bundle: Path,
        limits: Limits,
        expected: Callable[[], int],
    ) -> CellResult:
        paths = [path.resolve() for path in named_paths(cell)]
        given = _moved(cell, {str(path): str(path.resolve()) for path in named_paths(cell)})
        wanted: list[Wanted] = [Named.of(path) for path in paths]
        if exported is not None:
            wanted.append(Part.of(bundle.parent.resolve(), bundle.name))
        needs = Needs(expected(), self._cores, cell.accelerators)
        try:
            accelerator = self._cluster.accelerator(cell.accelerators) if cell.accelerators else ""
            order = Order(given, exported, [*map(str, paths)], bundle.name, limits, accelerator)
            delivery: Delivery = self._cluster.run(self._task, order, needs=needs, wanted=wanted)
        except (NoNodeError, TaskError) as error:
            return _failed(cell, str(error))
        if exported is None:
            _deliver(delivery.bundles, bundle)
        # As this machine names its files.
        inputs_here = fingerprints(cell) or {} if exported is None else delivery.result.inputs
        return replace(delivery.result, model=cell.model, command=tuple(cell.command()), inputs=inputs_here)

    def stop(self) -> None:
        self._cluster.stop()


def _deliver(bundles: bytes, bundle: Path) -> None:
    """Put a node's bundle, or the one of a failed gate, beside earlier ones, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=bundle.parent, prefix=".new-") as directory:
        unpack(bundles, Path(directory))
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
