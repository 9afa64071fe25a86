"""Runs several things at once in threads, until one of them fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

ResultT = TypeVar("ResultT")

CORES_EACH = 2
"""Number of cores of a cell of a matrix, or a shard of images, that runs beside others. Much of an export runs on one
core, calibration on all."""


class StoppedError(Exception):
    """The run ended while this was running."""


def run_at_once(
    tasks: Sequence[Callable[[], ResultT]], at_once: int, stop: Callable[[], None]
) -> Iterator[tuple[int, ResultT]]:
    """Run the tasks, and yield index and result of each as it ends.

    An exception, or Ctrl-C, ends those that run: `stop` is called, and the first exception is raised.

    Args:
        at_once: number of tasks that run at once; with 1, they run in this thread, in order.
        stop: makes running tasks end soon.
    """
    if at_once == 1:
        yield from ((index, task()) for index, task in enumerate(tasks))
        return
    errors: list[BaseException] = []  # the first one is why the others end

    def run(task: Callable[[], ResultT]) -> ResultT:
        if errors:
            raise StoppedError
        try:
            return task()
        except BaseException as error:
            errors.append(error)
            raise

    with ThreadPoolExecutor(min(at_once, max(1, len(tasks))), thread_name_prefix="tasks") as pool:
        started = {pool.submit(run, task): index for index, task in enumerate(tasks)}
        try:
            for future in as_completed(started):
                yield started.pop(future), future.result()  # popped: results may be large
        except BaseException as error:
            cause = errors[0] if errors else error
            stop()  # other errors follow from this
            pool.shutdown(wait=False, cancel_futures=True)
            raise cause from None
