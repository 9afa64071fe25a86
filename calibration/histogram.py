"""Histograms whose bins need no range: the leading bits of a float32.

Sign, exponent and the upper 10 bits of the mantissa are 2^19 bins, 1,024 to each power of two. They are the same for
every tensor, batch and machine, so histograms merge by addition: the order, batches and shards of the images do not
matter, to the bit.
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
"""Bits of the mantissa that are dropped. With 16 bits left, bins near a tensor's maximum are 1/64 of it, too coarse to
search a threshold by; with 19 they are below the steps of 8 bits."""

BINS = 1 << (32 - SHIFT)
_SIGN = BINS >> 1
_INFINITY = 0x7F800000

SAMPLES = 16384
"""Elements of one image that are counted at most. Larger tensors are sampled at a stride: 300 images still give five
million. Minimum and maximum are always of all elements."""

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
        """From keys in any order, also several times."""
        unique, inverse = np.unique(keys, return_inverse=True)
        total = np.zeros(len(unique), dtype=np.int64)
        np.add.at(total, inverse, counts)
        return cls(unique, total)

    def merged(self, other: Histogram) -> Histogram:
        """Of both sets of values."""
        return self.summed(
            np.concatenate([self.keys, other.keys]), np.concatenate([self.counts, other.counts])
        )

    def values(self) -> tuple[Float64Array, Float64Array]:
        """The middles of the bins in ascending order, float64 [K], and their counts, float64 [K]."""
        bits = (self.keys << np.uint32(SHIFT)) | np.uint32(1 << (SHIFT - 1))
        middle = np.where(self.keys == 0, 0.0, bits.view(np.float32).astype(np.float64))
        order = np.argsort(middle)
        return middle[order], self.counts[order].astype(np.float64)

    def encode(self) -> str:
        """As text: base64 of the zlib-compressed differences of the keys, and the counts."""
        steps = np.diff(self.keys.astype(np.int64), prepend=0).astype("<u4")
        return base64.b64encode(
            zlib.compress(steps.tobytes() + self.counts.astype("<i8").tobytes(), 1)
        ).decode()

    @classmethod
    def decode(cls, text: str) -> Histogram:
        """From `encode`'s text. Raises ValueError where it is none."""
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
    """Of each row: the largest as int32, the largest and the smallest as uint32. Vector instructions come of this."""
    for row in range(bits.shape[0]):
        s, u, m = np.int32(-(2**31)), np.uint32(0), np.uint32(0xFFFFFFFF)
        for i in range(bits.shape[1]):
            b = bits[row, i]
            s, u, m = max(s, np.int32(b)), max(u, b), min(m, b)
        signed[row], most[row], least[row] = s, u, m


def _count(bits: Bits, counts: npt.NDArray[np.uint64], stride: int) -> None:
    """Zeros, the most frequent value, take turns as +0 and -0: adding to one address again waits for the last time."""
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
    """Both loops as machine code, which lets other threads run, in 0.5 s. NumPy's bincount takes four times as long."""
    import numba

    extremes = numba.njit("void(uint32[:,::1], int32[::1], uint32[::1], uint32[::1])", nogil=True)
    count = numba.njit("void(uint32[:,::1], uint64[::1], int64)", nogil=True)
    return extremes(_find_extremes), count(_count)


def _stride(size: int) -> int:
    """Of the sample of an image's `size` elements: coprime with it, so that no row or column is left out."""
    stride = -(-size // SAMPLES)
    while gcd(stride, size) != 1:
        stride += 1
    return stride


def extremes(rows: Float32Array) -> tuple[Float32Array, Float32Array]:
    """Minimum and maximum of each row of float32 [R, N], float32 [R] each; NaN for a row that is not all finite.

    Found among the bits as integers: floats order like them but for the sign, and what is not finite has the largest.
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
    """Counts one tensor's values. Memory is taken for the powers of two that occurred: untouched pages cost nothing.

    Args:
        workers: threads that count at the same time, each for itself.
    """

    def __init__(self, workers: int) -> None:
        self._counts = np.zeros((workers, BINS), dtype=np.uint64)

    def add(self, rows: Float32Array, *, worker: int, sampled: bool) -> None:
        """Count the values of float32 [R, N], which must be finite.

        Args:
            worker: index of the thread.
            sampled: rows are images: count at most SAMPLES of each, at places that depend on N only.
        """
        bits = np.ascontiguousarray(rows).view(np.uint32)
        kernels()[1](bits, self._counts[worker], _stride(bits.shape[1]) if sampled else 1)

    def histogram(self, low: float, high: float) -> Histogram:
        """Of all values counted; they lie in [low, high]."""
        keys, counts = [], []
        for sign, end in ((0, high), (_SIGN, -low)):  # what cannot be occupied is not looked at
            last = int(np.float32(abs(max(end, 0.0))).view(np.uint32) >> SHIFT)  # of -0.0, too
            found = self._counts[:, sign : sign + last + 1].sum(axis=0, dtype=np.int64)
            occupied = np.flatnonzero(found)
            keys.append(np.where(occupied == 0, 0, occupied + sign))
            counts.append(found[occupied])
        return Histogram.summed(np.concatenate(keys).astype(np.uint32), np.concatenate(counts))
