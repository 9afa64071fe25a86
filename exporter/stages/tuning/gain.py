"""Gain of one candidate over another on the same images, with its standard error."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]

_LEAST, _MOST = 1e-30, 1e30
"""Limits of sums of squares, so that perfect and non-finite candidates have finite gains, too."""


class Gain(NamedTuple):
    """Decrease of the total noise of all images, and its standard error, in dB."""

    decibels: float
    error: float


def gain(before: Float64Array, after: Float64Array) -> Gain:
    """Gain of `after` over `before`.

    Both candidates see the same images, so the difficulty of an image cancels: the standard error is that of the
    difference. It is the jackknife's, which leaves out each image in turn (Efron and Tibshirani 1993, An Introduction
    to the Bootstrap, 11.5).

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
    # Sum the other images directly: subtracting a large image from the total would lose the small ones.
    without = decibels(parts @ (1 - np.eye(count)))
    error = np.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum())
    return Gain(float(decibels(totals)[0]), float(error))
