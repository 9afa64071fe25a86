"""Weights as int8 with a scale for each output channel, and biases as int32."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from export_zoo.engines.precision.int8.saturation.pairs import (
    LARGEST_SUM,
    IndexArray,
    sums_that_overflow,
    within_pairs,
)
from export_zoo.engines.precision.int8.scales import TINY, half_scale

Float64Array = npt.NDArray[np.float64]

MAX_WEIGHT = 127
"""Largest integer of a weight; -128 is not used, so that the range is symmetric."""

_MAX_BIAS = 2.0**30
"""Bound of abs(int32 bias): half of int32's range is left for the accumulator."""

_FACTORS = 2.0 ** (np.arange(17) / 16)
"""Factors of a filter's scale that are tried if neighbours overflow. With 2, no two neighbours can overflow."""

_BLOCK_ELEMENTS = 1 << 22
"""Number of weight elements that are processed in float64 at a time. VGG's first Linear layer has 100 million."""


def blocks_of_rows(channels: npt.NDArray[Any]) -> list[slice]:
    """Slices that divide the rows of a matrix into blocks."""
    step = max(1, _BLOCK_ELEMENTS // max(1, channels[0].size))
    return [slice(start, start + step) for start in range(0, len(channels), step)]


def _integers(
    rows: npt.NDArray[np.float32], scale: npt.NDArray[np.floating], partners: IndexArray | None
) -> Float64Array:
    scaled = rows.astype(np.float64) / scale.astype(np.float64)[:, None]
    nearest = np.clip(np.rint(scaled), -MAX_WEIGHT, MAX_WEIGHT)
    return nearest if partners is None else within_pairs(nearest, partners)


def _spread(rows: npt.NDArray[np.float32], scale: Float64Array, partners: IndexArray) -> Float64Array:
    """Scales of filters, raised if neighbours overflow, by the factor with the least expected squared error.

    A larger scale makes all weights of a filter coarser. Their rounding errors are uniform (a twelfth of a step squared
    each). In return, neighbours that are too large together lose less (half of the excess each).
    """
    channels, sums = sums_that_overflow(rows / scale.astype(np.float32)[:, None], partners)
    if not len(channels):
        return scale
    weights = np.count_nonzero(rows, axis=1)
    least, best = np.full(len(rows), np.inf), np.ones(len(rows))
    for factor in _FACTORS:
        excess = np.maximum(sums - LARGEST_SUM * factor, 0.0)
        error = weights * factor**2 / 12 + np.bincount(channels, excess**2 / 2, minlength=len(rows))
        best = np.where(error < least, factor, best)
        least = np.minimum(error, least)
    return scale * best


def quantize_weight(
    weight: npt.NDArray[np.float32],
    axis: int,
    bias: npt.NDArray[np.float32] | None,
    input_scale: np.float32,
    *,
    partners: IndexArray | None = None,
    half: bool = False,
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32], npt.NDArray[np.int32] | None]:
    """Symmetric int8 weight per output channel, its scales, and the int32 bias in units of s_x * s_w.

    A channel's scale is raised until its bias fits in 2^30. ONNX Runtime would quantize a float bias itself. That bias
    would overflow silently if the weights of a channel are (nearly) zero.

    Args:
        weight: any shape; `axis` is the output channel.
        bias: float32 [channels] or None.
        input_scale: scale s_x of the quantized input.
        partners: weights that kernels add in 16 bits, see `saturation.pairs`. No two may overflow. None if kernels add
            in 32 bits.
        half: round the scales to FP16 first.
    """
    channels = np.moveaxis(weight, axis, 0)
    rows = channels.reshape(len(channels), -1)
    blocks = blocks_of_rows(rows)
    scale = np.concatenate([np.abs(rows[b]).max(axis=1) for b in blocks]).astype(np.float64) / MAX_WEIGHT
    scale = np.maximum(scale, TINY)
    if partners is not None:
        scale = np.concatenate([_spread(rows[b], scale[b], partners) for b in blocks])
    if bias is not None:
        scale = np.maximum(scale, np.abs(bias.astype(np.float64)) / (np.float64(input_scale) * _MAX_BIAS))
    scale32 = np.maximum(scale, TINY / min(np.float64(input_scale), 1.0)).astype(np.float32)
    if half:
        scale32 = half_scale(scale32)
    integers = np.empty(rows.shape, dtype=np.int8)
    for b in blocks:
        integers[b] = _integers(rows[b], scale32[b], partners)
    quantized = np.ascontiguousarray(np.moveaxis(integers.reshape(channels.shape), 0, axis))
    if bias is None:
        return quantized, scale32, None
    unit = (input_scale * scale32).astype(np.float64)
    return quantized, scale32, np.rint(bias.astype(np.float64) / unit).astype(np.int32)


def rounded_otherwise(
    quantized: npt.NDArray[np.int8], steps: npt.NDArray[np.int8], axis: int, partners: IndexArray | None
) -> npt.NDArray[np.int8]:
    """Add steps to a weight (see `int8.rounding`), within the bounds of `quantize_weight`."""
    stepped = np.clip(quantized.astype(np.int16) + steps, -MAX_WEIGHT, MAX_WEIGHT)
    if partners is not None:
        channels = np.moveaxis(stepped, axis, 0)
        kept = within_pairs(channels.reshape(len(channels), -1).astype(np.float64), partners)
        stepped = np.moveaxis(kept.reshape(channels.shape), 0, axis)
    return np.asarray(stepped, dtype=np.int8, order="C")
