"""The check of a batch before an engine of the CPU runs it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from export_zoo.base.errors import BadInputError


def checked_batch(batch: npt.NDArray[np.float32], expected: Sequence[int | str]) -> npt.NDArray[np.float32]:
    """The batch, if an engine takes it.

    Args:
        expected: shape of the engine's input; names stand for any size.

    Raises:
        BadInputError: wrong dtype or shape.
    """
    batch = np.asarray(batch)
    fits = batch.ndim == len(expected) and all(
        isinstance(want, str) or want == have for want, have in zip(expected, batch.shape, strict=True)
    )
    if batch.dtype != np.float32 or not fits or batch.shape[0] < 1:
        raise BadInputError(
            f"input {batch.dtype} {list(batch.shape)}, expected float32 {list(expected)}",
            hint="use the bundle's preprocess() to make the input",
        )
    return batch
