"""Where the cells of a matrix run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Protocol

from export_zoo.exporter.matrix.cell import Limits
from export_zoo.exporter.matrix.plan import Cell
from export_zoo.exporter.matrix.results import CellResult


class Place(Protocol):
    """One machine, or many. Its methods may be called from several threads at once."""

    at_once: int
    """Largest number of cells that run at once."""

    def run(
        self,
        cell: Cell,
        exported: CellResult | None,
        bundle: Path,
        limits: Limits,
        expected: Callable[[], int],
    ) -> CellResult:
        """Run one cell when there is room for it, and wait until it has ended.

        Args:
            exported: for a cell of an emulated CPU, the result of the export.
            bundle: path that the bundle is written to; that of the exported bundle for a cell of an emulated CPU.
            expected: tells the bytes of memory that the cell is expected to take.

        Raises:
            StoppedError: `stop` was called.
        """

    def versions(self, cell: Cell) -> Collection[Mapping[str, str]]:
        """Versions of the libraries that a cell depends on: those that a result may have to be current."""

    def stop(self) -> None:
        """End all cells that run, and begin no more."""
