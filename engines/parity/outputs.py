"""Outputs as rows of logits for the gate: one row per image or, for a dense output, one per sampled pixel."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]

MAX_SIDE = 64
"""Maximum number of rows and of columns of a dense output that are compared. They are spread evenly and include both
borders. All pixels of 520x520 are 23 MB per image, and neighbours give the same information."""


def _kept(size: int) -> npt.NDArray[np.intp]:
    return np.linspace(0, size - 1, min(size, MAX_SIDE)).round().astype(np.intp)


def sampled(output: Float32Array) -> Float32Array:
    """[N, classes] unchanged; [N, classes, H, W] reduced to at most 64 rows and columns: [N, classes, h, w]."""
    if output.ndim != 4:
        return output
    rows, columns = _kept(output.shape[2]), _kept(output.shape[3])
    return np.ascontiguousarray(output[:, :, rows][:, :, :, columns])


def sampled_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one image's output after `sampled`."""
    return shape if len(shape) != 3 else (shape[0], *(min(size, MAX_SIDE) for size in shape[1:]))


def as_rows(output: Float32Array) -> Float32Array:
    """[N, classes] unchanged; [N, classes, h, w] as [N * h * w, classes]."""
    return output if output.ndim != 4 else np.moveaxis(output, 1, 3).reshape(-1, output.shape[1])
