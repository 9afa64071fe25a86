"""What each layer's roundings do to an engine's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from export_zoo.engines.diagnosis.mixtures import Float32Array
from export_zoo.engines.parity.outputs import as_rows, sampled
from export_zoo.engines.targets.base import Runner

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Effect:
    """Difference of the first output from a reference, by image: float64 [N].

    Attributes:
        noise: sum of squared differences.
        divergence: Kullback-Leibler divergence of the softmax from the reference's, in nats, summed over pixels or
            tokens; of probabilities for a classification only, else zeros.
    """

    noise: Float64Array
    divergence: Float64Array


def outputs(engine: Runner, batches: Sequence[Float32Array]) -> Float32Array:
    """First output of all batches, `sampled`."""
    return np.concatenate([sampled(engine.run_all(batch)[0]) for batch in batches])


def effect(reference: Float32Array, found: Float32Array) -> Effect:
    """Difference of values from a reference, both float32 [N, ...]; infinite where they are not finite."""
    count = len(reference)
    with np.errstate(invalid="ignore", over="ignore"):
        noise = ((found.astype(np.float64) - reference) ** 2).reshape(count, -1).sum(axis=1)
        p, q = (_log_softmax(as_rows(values)) for values in (reference, found))
        divergence = (np.exp(p) * (p - q)).sum(axis=1).reshape(count, -1).sum(axis=1)
    infinite = ~np.isfinite(found.reshape(count, -1)).all(axis=1)
    return Effect(np.where(infinite, np.inf, noise), np.where(infinite, np.inf, divergence))


def _log_softmax(rows: Float32Array) -> Float64Array:
    long = rows.astype(np.float64)
    long -= long.max(axis=1, keepdims=True)
    return np.asarray(long - np.log(np.exp(long).sum(axis=1, keepdims=True)))
