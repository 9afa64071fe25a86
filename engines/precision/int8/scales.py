"""Scales of quantized tensors: the real value of one integer step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from export_zoo.engines.precision.fp16.half import LEAST_SCALE

TINY = np.float64(np.finfo(np.float32).tiny) * 2**24
"""Smallest scale. Products of two scales must stay normal in float32."""


@dataclass(frozen=True)
class ActivationScale:
    """real = scale * (q - zero_point). q is uint8, or int8 with zero point 0."""

    scale: np.float32
    zero_point: np.uint8 | np.int8


def half_scale(scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Scales rounded to FP16 values, never to 0. TensorRT requires scales in the type of the tensor beside them.

    Round scales before quantizing with them. Otherwise, the integers belong to other scales. Below half's normal
    numbers, where its steps are coarse, scales are rounded up, so that nothing is clipped.
    """
    half = scale.astype(np.float16)
    coarse = (half < np.finfo(np.float16).tiny) & (half < scale)
    half = np.where(coarse, np.nextafter(half, np.float16(np.inf)), half)
    least = np.finfo(np.float16).smallest_subnormal
    return np.asarray(np.maximum(half, least), dtype=np.float32)


def symmetric_scale(low: float, high: float) -> ActivationScale:
    """Scale of an int8 tensor whose range is [low, high]. 127 is the larger of both magnitudes; the zero point is 0.

    Scales are rounded to FP16, except those below LEAST_SCALE. Those stay float32, and so do their Q/DQ pairs.
    """
    scale = np.float32(max(abs(low), abs(high)) / 127.0)
    if not scale > TINY:
        return ActivationScale(np.float32(1.0), np.int8(0))
    if scale >= LEAST_SCALE:
        scale = np.float32(half_scale(np.asarray(scale)))
    return ActivationScale(scale, np.int8(0))


def activation_scale(low: float, high: float) -> ActivationScale:
    """Scale and zero point of a uint8 tensor whose range is [low, high], extended to contain 0.

    Zero must be exact, because padding and Relu produce it (Jacob et al. 2018, arXiv 1712.05877, section 2.1).
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255.0)
    if not scale > TINY:
        return ActivationScale(np.float32(1.0), np.uint8(0))
    zero_point = int(np.clip(np.rint(-low / np.float64(scale)), 0, 255))
    return ActivationScale(scale, np.uint8(zero_point))
