"""Tolerances: limits on metrics, which of them a task has, and whether figures are within them.

See docs/parity.md for each default, and its reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from export_zoo.base.errors import ParityError
from export_zoo.engines.parity.metrics import Metrics
from export_zoo.engines.parity.tasks import Head


@dataclass(frozen=True)
class Limit:
    """One tolerance: `metric` must be at least (or at most) `value`."""

    metric: str
    value: float

    @property
    def at_least(self) -> bool:
        return self.metric in AT_LEAST

    def holds(self, metrics: Metrics) -> bool | None:
        """Whether the limit holds; None if the metric was not measured (accuracy without labels). NaN never holds."""
        measured = getattr(metrics, self.metric, None)
        if measured is None:
            return None
        return bool(measured >= self.value if self.at_least else measured <= self.value)

    def __str__(self) -> str:
        return f"{self.metric} {'>=' if self.at_least else '<='} {self.value:g}"


COMMON = frozenset({"max_abs", "max_rel", "sqnr", "cosine"})
"""Metrics of every output, whatever its task."""

SHARES = frozenset(
    {"cosine", "top1", "top5", "agreement", "correlation", "similarity", "nearest", "accuracy"}
)
AT_LEAST = SHARES | {"sqnr"}
AT_MOST = frozenset({"max_abs", "max_rel", "misplaced", "relative_error", "accuracy_drop"})
METRICS = AT_LEAST | AT_MOST


def fitting(tolerances: Mapping[str, float], head: Head) -> dict[str, float]:
    """The limits on metrics that outputs of this task have."""
    return {metric: value for metric, value in tolerances.items() if metric in COMMON | head.figures}


MIN_UNFUSED_COSINE = 0.5
"""Minimum cosine to eager for an engine with random weights (1 dB of SQNR). A wrong precision graph is below it."""


UNFUSED_SQNR_DB = (6.0, 20.0)
"""Bounds of the SQNR limit for engines with random weights; see `unfused_tolerances`."""


def unfused_tolerances(graph_sqnr: float) -> dict[str, float]:
    """Limits for an engine with random weights against its own precision graph, run without fusing.

    Engine and graph differ by rounding ties only, but a network of random weights amplifies each flipped tie
    nearly up to the quantization noise itself. So the engine must be at least as close to its graph as the graph
    is to eager (`graph_sqnr`, in dB), within 6 to 20 dB; a wrong scale or a wrong kernel gives 0 dB.
    """
    return {"sqnr": float(np.clip(graph_sqnr, *UNFUSED_SQNR_DB))}


def limits_of(tolerances: Mapping[str, float]) -> list[Limit]:
    return [Limit(metric, value) for metric, value in sorted(tolerances.items())]


def failures(metrics: Metrics, tolerances: Mapping[str, float]) -> list[str]:
    """Descriptions of the tolerances that do not hold, for people; empty if the gate passes.

    Raises:
        ParityError: a tolerance cannot be applied, or there is none (the gate would pass without a check).
    """
    judged = [(limit, limit.holds(metrics)) for limit in limits_of(tolerances)]
    unmeasured = [limit.metric for limit, holds in judged if holds is None]
    if newer := sorted(tolerances.keys() - METRICS):
        raise ParityError(
            f"this version does not know the metric {', '.join(newer)}",
            hint="update export-zoo to verify the bundle",
        )
    if unmeasured or not judged:
        raise ParityError(
            "the parity gate has nothing to judge by: " + (", ".join(unmeasured) or "no tolerance given"),
            hint="give a tolerance on a metric that is measured: accuracy needs labels, and some metrics are for other "
            "tasks (docs/parity.md)",
        )
    return [
        f"{limit.metric} is {getattr(metrics, limit.metric):.6g}, must be {limit}"
        + (f" (eager's is {metrics.reference_accuracy:.6g})" if limit.metric == "accuracy" else "")
        for limit, holds in judged
        if holds is False
    ]
