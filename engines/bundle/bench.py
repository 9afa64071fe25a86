"""Measures the latency of several engines, as medians of runs in turn."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from export_zoo.engines.bundle.manifest import Latency


class Timed(Protocol):
    """Runs a batch, float32 [N, 3, H, W]."""

    def run_all(self, batch: npt.NDArray[np.float32], /) -> object: ...


class Effort(NamedTuple):
    """How long to measure: seconds per engine, and the least and the largest number of rounds."""

    seconds: float
    rounds_min: int
    rounds_max: int


FULL = Effort(seconds=2.0, rounds_min=5, rounds_max=50)
"""For latencies that a manifest or an attestation records."""
BRIEF = Effort(seconds=0.3, rounds_min=3, rounds_max=20)
"""For the choice of an engine while a program waits for it."""


def run_in_turn(
    engines: Mapping[str, Timed], batch: npt.NDArray[np.float32], effort: Effort
) -> dict[str, npt.NDArray[np.float64]]:
    """Time engines in turn (A B C A B C ...) on one batch, float32 [N, 3, H, W]. Returns seconds by engine and round.

    Before each timed run, an untimed run brings the engine's weights back into the processor's caches, as in a service
    that runs one engine.
    """
    times: dict[str, list[float]] = {name: [] for name in engines}
    begin = time.perf_counter()
    for rounds in range(1, effort.rounds_max + 1):
        for name, engine in engines.items():
            engine.run_all(batch)
            start = time.perf_counter()
            engine.run_all(batch)
            times[name].append(time.perf_counter() - start)
        late = time.perf_counter() - begin > effort.seconds * len(engines)
        if late and rounds >= effort.rounds_min:
            break
    return {name: np.asarray(seconds) for name, seconds in times.items()}


def measure(
    engines: Mapping[str, Timed], batch: npt.NDArray[np.float32], *, baseline: str, machine: str
) -> dict[str, Latency]:
    """Latencies of engines on one batch, float32 [N, 3, H, W]. Takes about two seconds per engine.

    Ratios are computed per round, so that a drift of the machine's speed cancels out.
    """
    times = run_in_turn(engines, batch, FULL)
    base = times[baseline]
    return {
        name: Latency(
            batch=batch.shape[0],
            median_ms=float(np.median(seconds)) * 1e3,
            fp32_median_ms=float(np.median(base)) * 1e3,
            speedup=float(np.median(base / seconds)),
            rounds=len(seconds),
            machine=machine,
        )
        for name, seconds in times.items()
    }
