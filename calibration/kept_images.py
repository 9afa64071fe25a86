"""A stream that keeps its images in memory, so that further passes do not decode them again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from export_zoo.calibration.images import ImageStream
from export_zoo.calibration.preprocess import Pixels

MOST = 256 << 20
"""Maximum bytes of images that are kept. Above it, each pass decodes them: memory does not grow with their number."""


@dataclass
class KeptStream(ImageStream):
    """An `ImageStream` that decodes once, if all images take at most MOST bytes."""

    _kept: list[Pixels] = field(default_factory=list, init=False)

    def __iter__(self) -> Iterator[Pixels]:
        p = self.preprocess
        bytes_each = p.crop_height * p.crop_width * p.channels * (4 if p.keeps_values else 1)
        if len(self.files) * bytes_each > MOST:
            yield from super().__iter__()
            return
        if not self._kept:
            self._kept = list(super().__iter__())
        yield from self._kept

    def first(self, count: int) -> Pixels:
        """The first images, at most `count`, [N, crop_height, crop_width, channels]."""
        taken: list[Pixels] = []
        for pixels in self:
            taken.append(pixels[: count - sum(map(len, taken))])
            if sum(map(len, taken)) == count:
                break
        return np.concatenate(taken)
