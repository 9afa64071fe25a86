"""Latency and throughput of a bundle's engines over batch sizes, threads and streams, on this machine."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from export_zoo.base.errors import EnvironmentFailureError, TargetUnavailableError
from export_zoo.base.machine import cpu_model, usable_cores
from export_zoo.calibration.images import Progress
from export_zoo.calibration.preprocess import normalize
from export_zoo.engines.bundle import manifest as m
from export_zoo.engines.bundle import reader
from export_zoo.engines.bundle.bench import Timed
from export_zoo.engines.bundle.opening import opening_of, why_not_run
from export_zoo.engines.precision.registry import BASELINE
from export_zoo.engines.targets.base import Opening, Target
from export_zoo.engines.targets.registry import BASELINE_TARGET, TARGETS

Float32Array = npt.NDArray[np.float32]

ROUNDS = 5
"""Number of times that engines are measured in turn, so that a drift of the machine's speed cancels out of ratios."""

RUNS_OF_P90, RUNS_OF_P99 = 10, 100
"""Least number of runs that show such a percentile."""


class Setting(NamedTuple):
    """How engines are run: `streams` copies at once, each with `threads` threads, on batches of `batch` images."""

    batch: int
    threads: int
    streams: int

    def __str__(self) -> str:
        return f"batch {self.batch}, threads {self.threads}, streams {self.streams}"


class Point(BaseModel):
    """One engine in one setting."""

    model_config = ConfigDict(frozen=True)

    engine: str
    batch: int
    threads: int = Field(description="Threads of each stream.")
    streams: int = Field(description="Copies of the engine that run at once.")
    runs: int = Field(description="Number of timed runs, over all streams.")
    p50_ms: float = Field(description="Median latency of one run of a batch, in milliseconds.")
    p90_ms: float | None = Field(description="90th percentile; null with fewer than 10 runs.")
    p99_ms: float | None = Field(description="99th percentile; null with fewer than 100 runs.")
    images_per_second: float = Field(description="Throughput of all streams: the median over rounds.")
    speedup: float = Field(
        description="Throughput over that of the FP32 graph in ONNX Runtime in the same setting: the median over "
        "rounds."
    )


class Throughput(BaseModel):
    """Latency and throughput of a bundle's engines."""

    model_config = ConfigDict(frozen=True)

    bundle: str
    machine: str
    cores: int = Field(description="Number of cores that this process may use.")
    points: list[Point]
    left_out: dict[str, str] = Field(description="Engines that do not run here, and why.")


def settings(
    batch: m.Batch, batches: Sequence[int] = (), threads: Sequence[int] = (), streams: Sequence[int] = ()
) -> list[Setting]:
    """The settings to measure: all combinations of what is given.

    By default, batches are the bundle's MIN, OPT and MAX; threads are one and the number of cores; streams are one and
    as many as use all cores. Where only streams are given, there are no more threads in all than cores or streams.
    """
    cores = usable_cores()
    found: list[Setting] = []
    for size in batches or sorted({batch.min, batch.opt, batch.max}):
        for count in threads or (1, cores):
            found += [Setting(size, count, copies) for copies in streams or (1, max(1, cores // count))]
        if streams and not threads:
            found = [one for one in found if one.threads * one.streams <= max(cores, *streams)]
    return list(dict.fromkeys(found))


def measure(
    bundle: Path,
    chosen: Sequence[Setting],
    *,
    engines: Sequence[str] = (),
    seconds: float = 2.0,
    progress: Progress = lambda _: None,
) -> Throughput:
    """Run engines in each setting, in turn with the FP32 graph in ONNX Runtime, on the bundle's held-out images.

    That graph has points, too, whether it is an engine of the bundle or not.

    Args:
        engines: names of engines; all that run here if there are none.
        seconds: for each engine in each setting.
        progress: called with the number of settings that were finished.

    Raises:
        BadInputError: not a bundle, damaged, or without one of the engines.
        TargetUnavailableError: none of the engines runs here.
        EnvironmentFailureError: there is too little memory, or there are too many threads.
    """
    manifest = reader.read_manifest(bundle)
    reader.check_files(bundle, manifest)
    recipe = manifest.recipe
    pixels = reader.held_out(bundle, manifest).pixels
    wanted = [reader.named(bundle, manifest, name) for name in engines] or manifest.artifacts.engines
    left_out = {engine.name: why for engine in wanted if (why := why_not_run(engine))}
    here = [engine for engine in wanted if engine.name not in left_out]
    if not here:
        listed = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise TargetUnavailableError(
            f"{bundle}: no engine that runs here: {listed}",
            hint="run it where one of them runs, or export for this machine",
        )
    points: list[Point] = []
    for setting in chosen:
        batch = normalize(pixels[np.arange(setting.batch) % len(pixels)], recipe.preprocess)
        openings: dict[str, tuple[Target, Opening]] = {
            _FP32: (BASELINE_TARGET, Opening(bundle / recipe.graph.path, BASELINE, threads=setting.threads))
        }
        for engine in here:
            if engine.name != _FP32:
                opening = opening_of(bundle, engine, threads=setting.threads)
                openings[engine.name] = TARGETS[engine.target], opening
        try:
            running = {
                name: [target.open(opening) for _ in range(setting.streams)]
                for name, (target, opening) in openings.items()
            }
            points += in_turn(running, batch, setting, seconds)
        except (MemoryError, RuntimeError) as error:  # RuntimeError: a thread cannot be started
            raise EnvironmentFailureError(
                f"{bundle}: {setting}: memory or threads do not suffice: {error}",
                hint="give fewer --streams or --threads, or a smaller --batch",
            ) from error
        progress(1)
    return Throughput(
        bundle=str(bundle), machine=cpu_model(), cores=usable_cores(), points=points, left_out=left_out
    )


_FP32 = f"{BASELINE_TARGET.name}-{BASELINE.name}"


def in_turn(
    running: Mapping[str, Sequence[Timed]], batch: Float32Array, setting: Setting, seconds: float
) -> list[Point]:
    """Measure engines in turn.

    Args:
        running: copies of each engine, as many as the setting has streams. One is the FP32 graph in ONNX Runtime,
            under the name of such an engine.
        batch: preprocessed images, float32 [N, C, H, W].
        seconds: for each engine.
    """
    times: dict[str, list[float]] = {name: [] for name in running}
    rates: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(ROUNDS):
        for name, copies in running.items():
            found = _at_once(copies, batch, seconds / ROUNDS)
            times[name] += [one for stream in found for one in stream]
            rates[name].append(sum(len(stream) * len(batch) / sum(stream) for stream in found))
    base = np.array(rates[_FP32])
    points = []
    for name, durations in times.items():
        ms, rate = 1e3 * np.array(durations), np.array(rates[name])
        points.append(
            Point(
                engine=name,
                **setting._asdict(),
                runs=len(ms),
                p50_ms=float(np.median(ms)),
                p90_ms=float(np.percentile(ms, 90)) if len(ms) >= RUNS_OF_P90 else None,
                p99_ms=float(np.percentile(ms, 99)) if len(ms) >= RUNS_OF_P99 else None,
                images_per_second=float(np.median(rate)),
                speedup=float(np.median(rate / base)),
            )
        )
    return points


def _at_once(copies: Sequence[Timed], batch: Float32Array, seconds: float) -> list[list[float]]:
    """Seconds of each run of each copy, while all of them run. Each runs once before: that run is not timed."""

    def run(engine: Timed) -> list[float]:
        found: list[float] = []
        begin = now = time.perf_counter()
        while not found or now - begin < seconds:
            engine.run_all(batch)
            before, now = now, time.perf_counter()
            found.append(now - before)
        return found

    for engine in copies:
        engine.run_all(batch)
    with ThreadPoolExecutor(len(copies)) as pool:
        return list(pool.map(run, copies))
