"""Finds near-duplicate images. Their bytes differ, but the second one adds no information to a calibration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from export_zoo.calibration.images import ImageStream
from export_zoo.calibration.preprocess import Pixels

Float32Array = npt.NDArray[np.float32]

CELLS = 8
"""Number of rows and of columns of cells over which an image's brightness is averaged."""

ALIKE = 0.995
"""Correlation from which two images look alike: the same image compressed or darkened, or the next video frame. Of
1,797 handwritten digits, scaled up from 8x8, two reach it."""

_FLAT = 0.1
"""Length of a fingerprint before scaling, in brightness levels, below which an image counts as one colour."""


def fingerprints(pixels: Pixels, scale: float = 255.0) -> Float32Array:
    """Brightness of CELLS x CELLS cells minus its mean, scaled to length 1: independent of overall brightness.

    Images of one colour are all alike.

    Args:
        pixels: [N, H, W, C], with values up to `scale`.

    Returns float32 [N, 1 + up to CELLS²]; the first column is 1 for an image of one colour.
    """
    grey = pixels.mean(axis=3, dtype=np.float32)
    if scale != 255:
        grey *= np.float32(255 / scale)
    edges = [np.unique(np.linspace(0, size, CELLS, endpoint=False).astype(int)) for size in grey.shape[1:]]
    sums = np.add.reduceat(np.add.reduceat(grey, edges[0], axis=1), edges[1], axis=2)
    sizes = [np.diff(starts, append=size) for starts, size in zip(edges, grey.shape[1:], strict=True)]
    cells = (sums / np.outer(*sizes)).reshape(len(pixels), -1)
    cells -= cells.mean(axis=1, keepdims=True)
    length = np.linalg.norm(cells, axis=1, keepdims=True)
    flat = length < _FLAT
    return np.concatenate(
        [flat, np.where(flat, 0, cells / np.maximum(length, _FLAT))], axis=1, dtype=np.float32
    )


def alike(found: Float32Array) -> dict[int, int]:
    """Index of each image that looks like an earlier one, with the index of the earlier image it resembles most.

    Args:
        found: fingerprints of all images.
    """
    pairs = {}
    for index in range(1, len(found)):
        likeness = found[:index] @ found[index]
        if likeness.max() >= ALIKE:
            pairs[index] = int(likeness.argmax())
    return pairs


@dataclass
class FingerprintedStream(ImageStream):
    """A stream that computes the fingerprints of `images` while they are read."""

    fingerprints: list[Float32Array] = field(default_factory=list, init=False)
    """Fingerprints of each batch."""

    def __iter__(self) -> Iterator[Pixels]:
        self.fingerprints.clear()
        for pixels in super().__iter__():
            self.fingerprints.append(fingerprints(pixels, self.preprocess.scale))
            yield pixels

    def found(self) -> Float32Array:
        """Fingerprints of `images`, in order; see `fingerprints`."""
        return np.concatenate(self.fingerprints) if self.fingerprints else np.empty((0, 0), np.float32)
