"""Methods that choose a quantization range from a histogram of a tensor's values.

The searches evaluate candidates in closed form. Sums over the values of one quantization level are differences of
running sums, so the cost of a candidate depends on the number of levels, not on the number of values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np

from export_zoo.calibration.histogram import SHIFT, Float64Array, Histogram

PERCENTILE = 99.99
"""Percentage of the values that is kept. Wu et al. 2020 (arXiv 2004.09602) compare 99.9 to 99.9999."""

UNIFORM = 2048
"""Number of equal bins of the entropy search, as in NVIDIA's talk."""

_COARSE, _FINE = 64, 16

Range = tuple[float, float]


class Method(Protocol):
    """A method that chooses a range.

    Args:
        histogram: histogram of the tensor's values; not empty.
        low, high: exact minimum and maximum of the tensor; low <= 0 <= high is not required.
        symmetric: whether the range is [-t, t] (int8); otherwise it is [low, high] with a zero point (uint8).

    Returns the range, within [low, high] extended to 0 (asymmetric), or [-max abs, max abs].
    """

    def __call__(self, histogram: Histogram, low: float, high: float, symmetric: bool) -> Range: ...


def minmax(histogram: Histogram, low: float, high: float, symmetric: bool) -> Range:
    """The whole range: nothing is cut off."""
    del histogram
    if symmetric:
        return -max(-low, high), max(-low, high)
    return min(low, 0.0), max(high, 0.0)


def percentile(histogram: Histogram, low: float, high: float, symmetric: bool) -> Range:
    """The range that keeps PERCENTILE of the magnitudes (symmetric), or of the values, with equal cuts at each end.

    Wu et al. 2020, "Integer Quantization for Deep Learning Inference" (arXiv 2004.09602), section 3.2.
    """
    low, high = minmax(histogram, low, high, symmetric)
    values, counts = histogram.values()
    kept = PERCENTILE / 100
    if symmetric:
        order = np.argsort(np.abs(values), kind="stable")
        end = min(high, abs(_quantile(values[order], counts[order], kept)))
        return -end, end
    cut = (1 - kept) / 2
    return (
        max(low, min(0.0, _quantile(values, counts, cut))),
        min(high, max(0.0, _quantile(values, counts, 1 - cut))),
    )


def _quantile(values: Float64Array, counts: Float64Array, share: float) -> float:
    total = np.cumsum(counts)
    return float(values[min(int(np.searchsorted(total, share * total[-1])), len(values) - 1)])


def mse(histogram: Histogram, low: float, high: float, symmetric: bool) -> Range:
    """The range with the least mean squared error between the values and their 8-bit quantization.

    Sung et al. 2015 (arXiv 1511.06488). The ends of an asymmetric range are searched in turn, each twice.
    """
    low, high = minmax(histogram, low, high, symmetric)
    error = _SquaredError(histogram)
    if symmetric:
        end = _least(lambda ends: error(-ends, ends, 254), high)
        return -end, end
    lowest, highest = low, high
    for _ in range(2):
        high = _least(partial(error.of_high, low), highest)
        low = -_least(partial(error.of_low, high), -lowest)
    return low, high


def squared_error(histogram: Histogram, low: float, high: float, symmetric: bool) -> float:
    """Mean squared error of quantizing the values to 8 bits in a range; for [0, 0], their mean square."""
    error = _SquaredError(histogram)
    return float(error(np.array([low]), np.array([high]), 254 if symmetric else 255)[0])


class _SquaredError:
    """Mean squared error of quantizing a histogram's values, for many candidate ranges at once."""

    def __init__(self, histogram: Histogram) -> None:
        self._values, counts = histogram.values()
        moments = np.stack([counts, counts * self._values, counts * self._values**2])
        self._sums = np.concatenate([np.zeros((3, 1)), np.cumsum(moments, axis=1)], axis=1)

    def __call__(self, lows: Float64Array, highs: Float64Array, steps: int) -> Float64Array:
        """Error for each range [low, high], float64 [C], in `steps` steps (254 steps have zero in the middle)."""
        step = np.maximum((highs - lows) / steps, np.finfo(np.float64).tiny)
        zero = np.rint(-lows / step)
        levels = (np.arange(steps + 1) - zero[:, None]) * step[:, None]
        edges = levels[:, 1:] - step[:, None] / 2
        inner = np.searchsorted(self._values, edges)
        ends = np.zeros((len(step), 1), dtype=inner.dtype)
        bounds = np.concatenate([ends, inner, ends + len(self._values)], axis=1)
        count, first, second = np.diff(self._sums[:, bounds], axis=2)
        total = (second - 2 * levels * first + levels**2 * count).sum(axis=1)
        return np.asarray(total / self._sums[0, -1], dtype=np.float64)

    def of_high(self, low: float, highs: Float64Array) -> Float64Array:
        return self(np.full_like(highs, low), highs, 255)

    def of_low(self, high: float, magnitudes: Float64Array) -> Float64Array:
        return self(-magnitudes, np.full_like(magnitudes, high), 255)


def _least(error: Callable[[Float64Array], Float64Array], top: float) -> float:
    """The end in (0, top] with the least error: tries all 64ths of `top`, then 16ths of that step around the best one.

    If the smallest candidate is the best, as with an extreme outlier, the search restarts with it as `top`.
    """
    if not top > 0:
        return top
    while True:
        ends = top * np.arange(1, _COARSE + 1) / _COARSE
        best = int(np.argmin(error(ends)))
        if best or ends[0] < 1e-30:
            break
        top = float(ends[0])
    width = top / _COARSE
    fine = np.clip(ends[best] + width * np.arange(-_FINE + 1, _FINE) / _FINE, ends[0] / 2, top)
    fine = np.append(fine, ends[best])
    return float(fine[int(np.argmin(error(fine)))])


def entropy(histogram: Histogram, low: float, high: float, symmetric: bool) -> Range:
    """The range that loses the least information: the least Kullback-Leibler divergence of the quantized distribution
    from the clipped one.

    Migacz 2017, "8-bit Inference with TensorRT" (NVIDIA GTC). As there, counts beyond a candidate are added to its last
    bin, and a level spreads its count over its occupied bins. Zeros, which are always exact, are left out. The end of a
    symmetric range is searched over the magnitudes with 128 levels. The ends of an asymmetric range are searched
    separately, with 128 levels each, or with 256 if there is only one end.
    """
    low, high = minmax(histogram, low, high, symmetric)
    values, counts = histogram.values()
    if symmetric:
        end = _entropy_end(np.abs(values), counts, high, 128)
        return -end, end
    levels = 128 if low < 0 < high else 256
    return -_entropy_end(-values, counts, -low, levels), _entropy_end(values, counts, high, levels)


def _entropy_end(values: Float64Array, counts: Float64Array, top: float, levels: int) -> float:
    """The end in (0, top] with the least divergence, for the values above zero in `levels` levels."""
    kept = values > 0
    values, counts = values[kept], counts[kept]
    if not top > 0 or not len(values):
        return max(top, 0.0)
    order = np.argsort(values, kind="stable")
    values, running = values[order], np.cumsum(counts[order])
    half = np.spacing(values.astype(np.float32)).astype(np.float64) * 2 ** (SHIFT - 1)
    corners = np.stack([values - half, values + half], axis=1).ravel()
    heights = np.stack([running - counts[order], running], axis=1).ravel()
    while True:
        edges = top * np.arange(1, UNIFORM + 1) / UNIFORM
        # The histogram's bins overlap the equal bins: their counts are distributed in proportion to the overlap.
        below = np.interp(edges, corners, heights)
        bins = np.diff(below, prepend=0.0)
        bins[-1] += running[-1] - below[-1]
        candidates = np.arange(levels, UNIFORM + 1, 16)
        best = int(candidates[np.argmin(_divergence(bins, candidates, levels))])
        if best > levels or top < 1e-30:
            break
        top *= levels / UNIFORM
    near = np.arange(max(levels, best - 15), min(UNIFORM, best + 15) + 1)
    return float(top * near[np.argmin(_divergence(bins, near, levels))] / UNIFORM)


def _divergence(
    bins: Float64Array, candidates: np.ndarray[tuple[int, ...], np.dtype[np.int64]], levels: int
) -> Float64Array:
    """KL(P || Q) for each number of bins kept: P is the clipped histogram, Q its quantization to `levels` levels."""
    occupied = bins > 1e-9
    sums = np.concatenate([[0.0], np.cumsum(bins)])
    used = np.concatenate([[0], np.cumsum(occupied)])
    logs = np.concatenate(
        [[0.0], np.cumsum(np.where(occupied, bins * np.log(np.maximum(bins, 1e-300)), 0.0))]
    )
    bounds = candidates[:, None] * np.arange(levels + 1) // levels
    inside = np.diff(sums[bounds], axis=1)
    slots = np.diff(used[bounds], axis=1)
    beyond = sums[-1] - sums[candidates]
    last = bins[candidates - 1]
    slots[:, -1] += (beyond > 0) & ~occupied[candidates - 1]  # the last bin also holds the counts beyond it
    average = inside / np.maximum(slots, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        own = logs[candidates] - np.where(last > 1e-9, last * np.log(last), 0.0)
        clipped = last + beyond
        own += np.where(clipped > 1e-9, clipped * np.log(clipped), 0.0)
        weight = inside.copy()
        weight[:, -1] += beyond
        cross = np.where(weight > 1e-9, weight * np.log(average), 0.0).sum(axis=1)
        divergence: Float64Array = (own - cross) / sums[-1] - np.log(sums[-1]) + np.log(sums[candidates])
    return np.where(np.isfinite(divergence), divergence, np.inf)


METHODS: dict[str, Method] = {"minmax": minmax, "percentile": percentile, "entropy": entropy, "mse": mse}
