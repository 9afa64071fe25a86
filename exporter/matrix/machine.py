"""This machine's cores and memory, shared by the cells that run at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

from export_zoo.base.machine import available_memory, usable_cores

CORES_EACH = 2
"""Cores for each cell with `--jobs auto`: much of an export runs on one core, its calibration on all."""

Group = TypeVar("Group")
Result = TypeVar("Result")


def automatic_jobs() -> int:
    """How many cells run at once with `--jobs auto`, if memory allows."""
    return max(1, usable_cores() // CORES_EACH)


class Machine:
    """Gives cells their cores, and lets them begin when there is memory for them.

    Args:
        jobs: number of cells that may run at once.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.stopped = threading.Event()
        """Set when cells must end."""
        self._changed = threading.Condition()
        self._running = 0
        self._promised = 0
        """Bytes that the running cells are expected to take."""
        self._memory = available_memory()
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._shares = [frozenset(cores[i::jobs]) or None for i in range(jobs)]

    @contextmanager
    def room(self, expected: int) -> Iterator[frozenset[int] | None]:
        """Wait until a cell of `expected` bytes fits beside those that run. Yields its cores, None for all.

        One that never fits runs alone.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._running == 0
                    or (self._running < self.jobs and self._promised + expected <= self._memory)
                )
            )
            self._running += 1
            self._promised += expected
            cores = self._shares.pop()
        try:
            yield cores if self.jobs > 1 else None
        finally:
            with self._changed:
                self._running -= 1
                self._promised -= expected
                self._shares.append(cores)
                self._changed.notify_all()

    def run_all(self, groups: Sequence[Group], run: Callable[[Group], list[Result]]) -> list[Result]:
        """Run the groups, `jobs` at once, and return their results in the order of the groups.

        An exception, or Ctrl-C, ends those that run.
        """
        if self.jobs == 1:
            return [result for group in groups for result in run(group)]
        with ThreadPoolExecutor(self.jobs, thread_name_prefix="cell") as pool:
            started: list[Any] = [pool.submit(run, group) for group in groups]
            try:
                wait(started, return_when=FIRST_EXCEPTION)
                for future in started:
                    if future.done() and (error := future.exception()) is not None:
                        raise error
                return [result for future in started for result in future.result()]
            except BaseException:
                self.stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
