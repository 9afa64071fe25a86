"""Synthetic images: seeded images with the spectrum of photographs, and test patterns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from export_zoo.calibration.images import ImageFile, ImageStream
from export_zoo.calibration.preprocess import Pixels, Preprocess


class SyntheticStream(ImageStream):
    """A stream of `synthetic_images`, used when no image folder is given.

    Args:
        count: number of images.
        seed: seed of the images.
    """

    def __init__(self, count: int, seed: int, preprocess: Preprocess, batch_size: int) -> None:
        files = [ImageFile(Path(), f"synthetic {i}", f"synthetic-{seed}-{i}", None) for i in range(count)]
        super().__init__(files, preprocess, batch_size, Path("synthetic images"))
        self._seed = seed

    def __iter__(self) -> Iterator[Pixels]:
        pixels = synthetic_images(len(self.files), self.preprocess, self._seed)
        self.images = list(self.files)
        for start in range(0, len(pixels), self.batch_size):
            yield pixels[start : start + self.batch_size]


TEST_PATTERNS = ("black", "white", "gray", "noise", "half", "checkerboard")
"""Names of `test_patterns`, in order."""


def test_patterns(preprocess: Preprocess) -> Pixels:
    """Images unlike photographs, [6, height, width, channels]: even, noisy and of the largest contrast.

    Photographs never show a graph that divides by zero where a channel is even, or that overflows at extremes.
    """
    height, width = preprocess.crop_height, preprocess.crop_width
    images = np.empty((len(TEST_PATTERNS), height, width, preprocess.channels), dtype=np.uint8)
    images[0], images[1], images[2] = 0, 255, 128
    images[3] = np.random.default_rng(0).integers(0, 256, images.shape[1:], dtype=np.uint8)
    images[4, :, : width // 2], images[4, :, width // 2 :] = 0, 255
    rows, columns = np.indices((height, width))
    images[5] = 255 * ((rows + columns) % 2)[..., None]
    return _of_scale(images, preprocess)


def _of_scale(images: Pixels, preprocess: Preprocess) -> Pixels:
    """8-bit images with the range of values that the preprocessing expects."""
    if not preprocess.keeps_values:
        return images
    return np.asarray(images * np.float32(preprocess.scale / 255), dtype=np.float32)


def synthetic_images(count: int, preprocess: Preprocess, seed: int) -> Pixels:
    """Seeded images with the 1/f spectrum of photographs; [count, height, width, channels].

    White noise hardly changes a network's logits. The amplitude spectrum of natural images falls as 1/f
    (Field 1987, J. Opt. Soc. Am. A 4:2379). Contrast and colour differ from image to image.
    """
    height, width, channels = preprocess.crop_height, preprocess.crop_width, preprocess.channels
    rng = np.random.default_rng(seed)
    fy = np.fft.fftfreq(height)[:, None]
    fx = np.fft.rfftfreq(width)[None, :]
    frequency = np.maximum(np.hypot(fy, fx), 1.0 / max(height, width))
    images = np.empty((count, height, width, channels), dtype=np.uint8)
    for index in range(count):
        slope = rng.uniform(0.8, 1.6)
        mixing = rng.normal(size=(channels, channels)) * 0.4 + np.eye(channels)
        planes_of = (channels, *frequency.shape)
        phase = rng.normal(size=planes_of) + 1j * rng.normal(size=planes_of)
        planes = np.fft.irfft2(phase / frequency**slope, s=(height, width))
        planes /= planes.std(axis=(1, 2), keepdims=True) + 1e-12
        mixed = np.einsum("ij,jhw->hwi", mixing, planes)
        brightness, contrast = rng.uniform(60, 190, size=channels), rng.uniform(15, 70)
        images[index] = np.clip(np.rint(brightness + contrast * mixed), 0, 255).astype(np.uint8)
    return _of_scale(images, preprocess)
