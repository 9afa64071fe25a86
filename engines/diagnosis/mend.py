"""What would mend an engine that failed its gate: an estimate, within bounded time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from export_zoo.engines.diagnosis.diagnose import LOOKED_AT, NOTHING, Subject
from export_zoo.engines.diagnosis.local import local_errors
from export_zoo.engines.diagnosis.ranking import effect
from export_zoo.engines.parity.limits import failures
from export_zoo.engines.parity.metrics import compare

MAX_IMAGES = 128
"""Number of held-out images that the limits are checked on."""

SECONDS = 60.0
"""Time after which no more layers are rounded alone; those with the largest error of their own output come first."""


@dataclass(frozen=True)
class Mending:
    """What would mend an engine.

    Attributes:
        worst: module paths of layers, the worst first.
        layers: number of these that must be float; None if the limits do not hold with all of them in float.
        total: number of layers of the engine.
        images: number of images that the limits were checked on.
    """

    worst: list[str]
    layers: int | None
    total: int
    images: int


def mending(
    bundle: Path,
    name: str,
    limits: Mapping[str, float],
    *,
    seconds: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Mending:
    """Find the worst layers of an engine, and how many of them have to be float for the limits to hold.

    The engine's graph is run with the worst layers in float; how many is found by bisection. Raises what `Subject`
    raises.

    Args:
        seconds: instead of SECONDS.
    """
    seconds = SECONDS if seconds is None else seconds
    began, subject = time.monotonic(), Subject(bundle, name)
    held, total = subject.held, len(subject.layers)
    few = subject.batches(0, min(LOOKED_AT, len(held.pixels)))
    local = local_errors(subject.counterparts, subject.layers, iter(few))

    def own(layer: str) -> float:
        found = local.get(layer, NOTHING)
        return (found.weights + found.clipping + found.rounding) / (found.signal or 1.0)

    order = sorted((layer.name for layer in subject.layers), key=own, reverse=True)
    exact, noise = subject.outputs((), few), dict[str, float]()
    for layer in order:
        noise[layer] = float(effect(exact, subject.outputs([layer], few)).noise.sum())
        progress(1, total)
        if time.monotonic() - began > seconds:
            break
    order.sort(key=lambda layer: noise.get(layer, -1.0), reverse=True)  # the others keep their order behind
    count = min(MAX_IMAGES, len(held.pixels))
    head, batches = subject.manifest.recipe.output.head, subject.batches(0, count)
    labels = held.labels[:count] if held.labels is not None else None

    def holds(floats: int) -> bool:
        found = subject.outputs(order[floats:], batches)
        return not failures(compare(head.rows(held.logits[:count]), head.rows(found), labels, head), limits)

    modules = {layer.name: layer.module for layer in subject.layers}
    low, high = 0, total
    if not holds(total):
        return Mending([modules[layer] for layer in order], None, total, count)
    while low + 1 < high:  # the limits do not hold with `low`, or it is 0, and do with `high`
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return Mending([modules[layer] for layer in order], high, total, count)
