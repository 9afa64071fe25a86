"""Measures the latency of several engines, as medians of runs in turn."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from export_zoo.engines.bundle.manifest import Latency
from export_zoo.engines.targets.base import Runner

ROUNDS_MIN, ROUNDS_MAX = 5, 50
SECONDS = 2.0


def measure(
    engines: Mapping[str, Runner], batch: npt.NDArray[np.float32], *, baseline: str, machine: str
) -> dict[str, Latency]:
    """Time engines in turn (A B C A B C ...) on one batch, float32 [N, 3, H, W].

    Ratios are computed per round, so that a drift of the machine's speed cancels out. Before each timed run, an untimed
    run brings the engine's weights back into the processor's caches, as in a service that runs one engine. Takes about
    two seconds per engine, and at least five rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in engines}
    begin = time.perf_counter()
    while True:
        for name, engine in engines.items():
            engine.run_all(batch)
            start = time.perf_counter()
            engine.run_all(batch)
            times[name].append(time.perf_counter() - start)
        rounds = len(times[baseline])
        late = time.perf_counter() - begin > SECONDS * len(engines)
        if rounds >= ROUNDS_MAX or (late and rounds >= ROUNDS_MIN):
            break
    base = np.asarray(times[baseline])
    return {
        name: Latency(
            batch=batch.shape[0],
            median_ms=float(np.median(seconds)) * 1e3,
            fp32_median_ms=float(np.median(base)) * 1e3,
            speedup=float(np.median(base / np.asarray(seconds))),
            rounds=len(seconds),
            machine=machine,
        )
        for name, seconds in times.items()
    }
