"""Latencies of a bundle's engines on this machine, in turn with FP32. Export and `verify` measure alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from export_zoo.base.machine import cpu_model
from export_zoo.calibration.preprocess import Pixels, normalize
from export_zoo.engines.bundle import bench
from export_zoo.engines.bundle.manifest import Latency, Recipe
from export_zoo.engines.precision.registry import BASELINE
from export_zoo.engines.targets.base import Opening, Runner
from export_zoo.engines.targets.registry import BASELINE_TARGET, TARGETS


class TimedEngine(NamedTuple):
    """An engine to time."""

    target: str
    opening: Opening


def measure_latencies(
    engines: Mapping[str, TimedEngine], fp32: Path, recipe: Recipe, pixels: Pixels
) -> dict[str, Latency]:
    """Latency of each engine, by name, at batch OPT. All engines must run on this machine.

    Args:
        fp32: the simplified FP32 graph. ONNX Runtime's latency with it is the reference of all speedups.
        pixels: images after resize and crop, [N, H, W, C]; repeated if there are fewer than OPT.

    Raises:
        TargetUnavailableError: this machine cannot load an engine, or cannot run it exactly.
    """
    baseline = f"{BASELINE_TARGET.name}-{BASELINE.name}"
    runners: dict[str, Runner] = {baseline: BASELINE_TARGET.open(Opening(fp32, BASELINE))}
    for name, (target, opening) in engines.items():
        if name != baseline:
            runners[name] = TARGETS[target].open(opening)
    batch = normalize(pixels[np.arange(recipe.batch.opt) % len(pixels)], recipe.preprocess)
    found = bench.measure(runners, batch, baseline=baseline, machine=cpu_model())
    return {name: found[name] for name in engines}
