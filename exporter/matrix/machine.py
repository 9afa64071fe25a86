"""This machine's cores and memory, shared by the cells that run at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from export_zoo.base.machine import available_memory, usable_cores
from export_zoo.exporter.matrix import cell as cells
from export_zoo.exporter.matrix.cell import Limits
from export_zoo.exporter.matrix.plan import Cell
from export_zoo.exporter.matrix.results import CellResult
from export_zoo.exporter.run.at_once import CORES_EACH


def automatic_jobs() -> int:
    """How many cells run at once with `--jobs auto`, if memory allows."""
    return max(1, usable_cores() // CORES_EACH)


class Machine:
    """Gives cells their cores, and lets them begin when there is memory for them.

    Args:
        jobs: number of cells that may run at once.
    """

    def __init__(self, jobs: int) -> None:
        self.at_once = jobs
        self._stopped = threading.Event()
        self._changed = threading.Condition()
        self._running = 0
        self._promised = 0
        """Bytes that the running cells are expected to take."""
        self._memory = available_memory()
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._shares = [frozenset(cores[i::jobs]) or None for i in range(jobs)]

    def run(
        self,
        cell: Cell,
        exported: CellResult | None,
        bundle: Path,
        limits: Limits,
        expected: Callable[[], int],
    ) -> CellResult:
        with self.room(expected() if self.at_once > 1 else 0) as cores:
            within = replace(limits, cores=cores, stopped=self._stopped)
            if exported is None:
                return cells.run_cell(cell, bundle, within)
            return cells.run_on_cpu(cell, exported, bundle, within)

    def versions(self, cell: Cell) -> list[dict[str, str]]:
        return [cells.versions(cell)]

    def stop(self) -> None:
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()

    @contextmanager
    def room(self, expected: int) -> Iterator[frozenset[int] | None]:
        """Wait until a cell of `expected` bytes fits beside those that run. Yields its cores, None for all.

        One that never fits runs alone.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._running == 0
                    or (self._running < self.at_once and self._promised + expected <= self._memory)
                )
            )
            self._running += 1
            self._promised += expected
            cores = self._shares.pop()
        try:
            yield cores if self.at_once > 1 else None
        finally:
            with self._changed:
                self._running -= 1
                self._promised -= expected
                self._shares.append(cores)
                self._changed.notify_all()
