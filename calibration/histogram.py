"""Histograms with fixed bins that need no range: a bin is the leading bits of a float32.

Sign, exponent and the upper 10 bits of the mantissa give 2^19 bins, 1,024 per power of two. The bins are the same for
every tensor, batch and machine, so histograms merge by addition. The result is bit-identical for any order, batches and
shards of the images.
"""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import Any

import numpy as np
import numpy.typing as npt

SHIFT = 13
"""Number of mantissa bits that are dropped. With 16 bits left, bins near a tensor's maximum are 1/64 of it, too coarse
for a threshold search. With 19 bits left, bins are smaller than the steps of 8-bit quantization."""

BINS = 1 << (32 - SHIFT)
_SIGN = BINS >> 1
_INFINITY = 0x7F800000

SAMPLES = 16384
"""Maximum number of elements that are counted per image. Larger tensors are sampled at a stride: 300 images still give
five million values. Minimum and maximum always cover all elements."""

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Bits = npt.NDArray[np.uint32]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Histogram:
    """Counts of the occupied bins.

    Attributes:
        keys: uint32 [K], ascending: the leading bits of the values in each bin.
        counts: int64 [K], above 0.
    """

    keys: npt.NDArray[np.uint32]
    counts: Int64Array

    @classmethod
    def summed(cls, keys: npt.NDArray[np.uint32], counts: Int64Array) -> Histogram:
        """Build a histogram from keys in any order; a key may occur several times."""
        unique, inverse = np.unique(keys, return_inverse=True)
        total = np.zeros(len(unique), dtype=np.int64)
        np.add.at(total, inverse, counts)
        return cls(unique, total)

    def merged(self, other: Histogram) -> Histogram:
        """The histogram of both sets of values."""
        return self.summed(
            np.concatenate([self.keys, other.keys]), np.concatenate([self.counts, other.counts])
        )

    def values(self) -> tuple[Float64Array, Float64Array]:
        """Midpoints of the bins in ascending order, float64 [K], and their counts, float64 [K]."""
        bits = (self.keys << np.uint32(SHIFT)) | np.uint32(1 << (SHIFT - 1))
        middle = np.where(self.keys == 0, 0.0, bits.view(np.float32).astype(np.float64))
        order = np.argsort(middle)
        return middle[order], self.counts[order].astype(np.float64)

    def encode(self) -> str:
        """Encode as text: base64 of the zlib-compressed key differences and counts."""
        steps = np.diff(self.keys.astype(np.int64), prepend=0).astype("<u4")
        return base64.b64encode(
            zlib.compress(steps.tobytes() + self.counts.astype("<i8").tobytes(), 1)
        ).decode()

    @classmethod
    def decode(cls, text: str) -> Histogram:
        """Decode the text that `encode` returns. Raises ValueError if the text is not valid."""
        try:
            data = zlib.decompress(base64.b64decode(text, validate=True))
        except zlib.error as error:
            raise ValueError(f"not a histogram: {error}") from error
        size, rest = divmod(len(data), 12)
        keys = np.cumsum(np.frombuffer(data, "<u4", size).astype(np.int64)) if not rest else np.empty(0)
        counts = np.frombuffer(data, "<i8", size, 4 * size).astype(np.int64) if not rest else np.empty(0)
        if rest or not size or keys[-1] >= BINS or (np.diff(keys) <= 0).any() or (counts <= 0).any():
            raise ValueError("not a histogram: damaged")
        return cls(keys.astype(np.uint32), counts.astype(np.int64))


def _find_extremes(bits: Bits, signed: npt.NDArray[np.int32], most: Bits, least: Bits) -> None:
    """Write each row's largest value as int32, and its largest and smallest as uint32; gives vector instructions."""
    for row in range(bits.shape[0]):
        s, u, m = np.int32(-(2**31)), np.uint32(0), np.uint32(0xFFFFFFFF)
        for i in range(bits.shape[1]):
            b = bits[row, i]
            s, u, m = max(s, np.int32(b)), max(u, b), min(m, b)
        signed[row], most[row], least[row] = s, u, m


def _count(bits: Bits, counts: npt.NDArray[np.uint64], stride: int) -> None:
    """Count each row's values by bin.

    Zero is the most frequent value; every second zero is counted as -0: repeated additions to one address wait for each
    other.
    """
    for row in range(bits.shape[0]):
        i, n = 0, bits.shape[1]
        while i + stride < n:
            counts[bits[row, i] >> SHIFT] += 1
            key = np.int64(bits[row, i + stride] >> SHIFT)
            counts[key if key != 0 else _SIGN] += 1
            i += 2 * stride
        if i < n:
            counts[bits[row, i] >> SHIFT] += 1


@cache
def kernels() -> tuple[Any, Any]:
    """Compile both loops to machine code that lets other threads run; takes 0.5 s.

    NumPy's bincount takes four times as long as the compiled count.
    """
    import numba

    extremes = numba.njit("void(uint32[:,::1], int32[::1], uint32[::1], uint32[::1])", nogil=True)
    count = numba.njit("void(uint32[:,::1], uint64[::1], int64)", nogil=True)
    return extremes(_find_extremes), count(_count)


def _stride(size: int) -> int:
    """Sampling stride for an image's `size` elements: coprime with `size`, so that no row or column is left out."""
    stride = -(-size // SAMPLES)
    while gcd(stride, size) != 1:
        stride += 1
    return stride


def extremes(rows: Float32Array) -> tuple[Float32Array, Float32Array]:
    """Minimum and maximum of each row of float32 [R, N], float32 [R] each; NaN for a row that is not all finite.

    The bits are compared as integers: apart from the sign, floats have the same order, and values that are not finite
    have the largest bits.
    """
    bits = np.ascontiguousarray(rows).view(np.uint32)
    signed = np.empty(len(bits), np.int32)
    most, least = np.empty(len(bits), np.uint32), np.empty(len(bits), np.uint32)
    kernels()[0](bits, signed, most, least)
    finite = (signed < _INFINITY) & (most < _INFINITY + 0x80000000)
    highest = np.where(signed >= 0, signed.view(np.uint32), least).view(np.float32)
    lowest = np.where(most >= 0x80000000, most, least).view(np.float32)
    nothing = np.float32(np.nan)
    return np.where(finite, lowest, nothing) + np.float32(0), np.where(finite, highest, nothing) + np.float32(
        0
    )


class Accumulator:
    """Counts one tensor's values. Only the powers of two that occur take memory: untouched pages take none.

    Args:
        workers: number of threads that count at the same time, each in its own array.
    """

    def __init__(self, workers: int) -> None:
        self._counts = np.zeros((workers, BINS), dtype=np.uint64)

    def add(self, rows: Float32Array, *, worker: int, sampled: bool) -> None:
        """Count the values of float32 [R, N], which must be finite.

        Args:
            worker: index of the thread.
            sampled: whether rows are images. If so, at most SAMPLES values of each are counted, at positions that
                depend on N only.
        """
        bits = np.ascontiguousarray(rows).view(np.uint32)
        kernels()[1](bits, self._counts[worker], _stride(bits.shape[1]) if sampled else 1)

    def histogram(self, low: float, high: float) -> Histogram:
        """The histogram of all values counted; they lie in [low, high]."""
        keys, counts = [], []
        for sign, end in ((0, high), (_SIGN, -low)):  # skip bins that cannot be occupied
            last = int(np.float32(abs(max(end, 0.0))).view(np.uint32) >> SHIFT)  # also for -0.0
            found = self._counts[:, sign : sign + last + 1].sum(axis=0, dtype=np.int64)
            occupied = np.flatnonzero(found)
            keys.append(np.where(occupied == 0, 0, occupied + sign))
            counts.append(found[occupied])
        return Histogram.summed(np.concatenate(keys).astype(np.uint32), np.concatenate(counts))
