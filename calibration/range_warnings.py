"""What makes a calibration doubtful, though nothing is wrong with it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from export_zoo.calibration.ranges import Ranges

FEW = 100
"""Images below which min/max still moves a lot from one set to another."""

MANY_ALIKE = 0.05
"""Share of images that look like another one from which the others are outweighed."""

ALONE = 2.0
"""A range so many times as wide as without one image costs all others a bit."""


def doubts(
    ranges: Ranges, names: Mapping[str, str], alike: Sequence[Sequence[str]] = (), *, whole: bool = True
) -> list[str]:
    """Warnings for people: too few images, many that look alike, those that alone widen ranges of quantized tensors.

    Args:
        names: of the images, by SHA-256.
        alike: names of images that look like another one, and of that one.
        whole: not a shard, whose images need not be enough.
    """
    found = []
    count = len(ranges.image_sha256)
    if whole and count < FEW:
        found.append(f"calibrated on {count} image{'s' if count > 1 else ''} only: 300 to 1,000 are usual")
    if len(alike) > MANY_ALIKE * count:
        found.append(
            f"{len(alike)} of {count} images look like another one, {alike[0][0]} like {alike[0][1]} for example: "
            "they calibrate as fewer would. Frames of a video, or copies?"
        )
    widened: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for name, tensor in ranges.tensors.items():
        magnitude = max(-tensor.min, tensor.max)
        if tensor.histogram and tensor.widest and magnitude > ALONE * tensor.others > 0:
            widened[tensor.widest].append((magnitude / tensor.others, tensor.module or name))
    for sha256, tensors in widened.items():
        factor, module = max(tensors)
        found.append(
            f"{names.get(sha256, sha256[:16])} alone widens the range of {len(tensors)} tensor(s), {factor:.1f} times "
            f"at {module}: is it like the others? A --method other than minmax is less moved by it"
        )
    return found
