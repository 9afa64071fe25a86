"""How much better one candidate is than another on the same images, and how far chance moves that."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]

_LEAST, _MOST = 1e-30, 1e30
"""Sums of squares are kept within, so that a perfect candidate and one that is not finite have figures, too."""


class Gain(NamedTuple):
    """In dB: what the noise of all images together falls by, and the standard error of that."""

    decibels: float
    error: float


def gain(before: Float64Array, after: Float64Array) -> Gain:
    """What a change brings.

    The images are the same, so what is hard for both candidates cancels: the error is of the difference. It is the
    jackknife's (Efron and Tibshirani 1993, An Introduction to the Bootstrap, 11.5), of leaving out each image in turn.

    Args:
        before, after: squared errors of each image's logits, [N], N > 1.
    """
    parts = np.stack([before, after])
    parts = np.where(np.isfinite(parts), np.minimum(parts, _MOST), _MOST)
    totals = parts.sum(axis=1, keepdims=True)

    def decibels(noise: Float64Array) -> Float64Array:
        levels: Float64Array = 10 * np.log10(np.maximum(noise, _LEAST))
        difference: Float64Array = levels[0] - levels[1]
        return difference

    count = parts.shape[1]
    # Sums over the others: a difference of sums would lose what is small beside the one left out.
    without = decibels(parts @ (1 - np.eye(count)))
    error = np.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum())
    return Gain(float(decibels(totals)[0]), float(error))
