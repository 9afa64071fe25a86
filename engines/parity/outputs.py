"""Outputs as the gate compares them: rows of logits, one an image or, of a dense output, one a pixel looked at."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]

MAX_SIDE = 64
"""Rows and columns of a dense output that are compared, spread evenly, both borders among them: all pixels of 520x520
are 23 MB an image and class map, and neighbours say the same."""


def _kept(size: int) -> npt.NDArray[np.intp]:
    return np.linspace(0, size - 1, min(size, MAX_SIDE)).round().astype(np.intp)


def sampled(output: Float32Array) -> Float32Array:
    """[N, classes] as it is; of [N, classes, H, W] at most 64 rows and columns: [N, classes, h, w]."""
    if output.ndim != 4:
        return output
    rows, columns = _kept(output.shape[2]), _kept(output.shape[3])
    return np.ascontiguousarray(output[:, :, rows][:, :, :, columns])


def sampled_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of one image's output, after `sampled`."""
    return shape if len(shape) != 3 else (shape[0], *(min(size, MAX_SIDE) for size in shape[1:]))


def as_rows(output: Float32Array) -> Float32Array:
    """[N, classes] as it is; [N, classes, h, w] to [N * h * w, classes]."""
    return output if output.ndim != 4 else np.moveaxis(output, 1, 3).reshape(-1, output.shape[1])
