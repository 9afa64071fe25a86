"""Outputs as rows of values for the gate: one row per image or, for a dense output, per sampled pixel or token."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]

MAX_SIDE = 64
"""Maximum number of rows and of columns, or of tokens, of a dense output that are compared.

They are spread evenly and include both ends. All pixels of 520x520 are 23 MB per image, and neighbours give the same
information.
"""


def _kept(size: int) -> npt.NDArray[np.intp]:
    return np.linspace(0, size - 1, min(size, MAX_SIDE)).round().astype(np.intp)


def sampled(output: Float32Array) -> Float32Array:
    """An output with at most 64 rows and columns ([N, C, H, W]) or tokens ([N, T, C]); [N] and [N, C] unchanged."""
    if output.ndim == 3:
        return np.ascontiguousarray(output[:, _kept(output.shape[1])])
    if output.ndim != 4:
        return output
    rows, columns = _kept(output.shape[2]), _kept(output.shape[3])
    return np.ascontiguousarray(output[:, :, rows][:, :, :, columns])


def sampled_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one image's output after `sampled`."""
    if len(shape) == 2:
        return (min(shape[0], MAX_SIDE), shape[1])
    return shape if len(shape) != 3 else (shape[0], *(min(size, MAX_SIDE) for size in shape[1:]))


def as_rows(output: Float32Array, *, whole: bool = False) -> Float32Array:
    """Rows of values: [N] as [N, 1], [N, C] unchanged, [N, T, C] as [N * T, C], [N, C, h, w] as [N * h * w, C].

    Args:
        whole: one row for each image, with all of its values.
    """
    if output.ndim == 2:
        return output
    if whole or output.ndim == 1:
        return output.reshape(len(output), -1)
    if output.ndim == 4:
        output = np.moveaxis(output, 1, 3)
    return output.reshape(-1, output.shape[-1])
