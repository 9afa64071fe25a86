"""Warnings about calibrations that are valid but may be poor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from export_zoo.calibration.ranges import Ranges

FEW = 100
"""Number of images below which min/max still varies a lot from one set to another."""

MANY_ALIKE = 0.05
"""Share of images that look like another one, above which they outweigh the others."""

ALONE = 2.0
"""Ratio of a tensor's range to its range without one image, above which that image costs all others a bit."""


def warnings_of(
    ranges: Ranges, names: Mapping[str, str], alike: Sequence[Sequence[str]] = (), *, whole: bool = True
) -> list[str]:
    """Warnings for people.

    They are about few images, images that look alike, tensors that are always 0, and single images that widen ranges.

    Args:
        names: image names by SHA-256.
        alike: pairs of names: an image that looks like another one, and that other image.
        whole: whether this is a whole calibration; a shard may have few images.
    """
    found = []
    count = len(ranges.image_sha256)
    if whole and count < FEW:
        found.append(f"calibrated on {count} image{'s' if count > 1 else ''} only: 300 to 1,000 are usual")
    if len(alike) > MANY_ALIKE * count:
        found.append(
            f"{len(alike)} of {count} images look like another image, for example {alike[0][0]} like {alike[0][1]}: "
            "they add little to the calibration. Check for video frames and copies"
        )
    dead = [t.module or name for name, t in ranges.tensors.items() if t.histogram and t.min == t.max == 0]
    if dead:
        found.append(
            f"{len(dead)} tensor(s) are 0 on all calibration images, the first at {dead[0]}: INT8 gives them a scale "
            "of 1, and what other images give there is lost. Check the weights, or leave the layers unquantized with "
            f"--keep-float {dead[0].rpartition('.')[0] or 'PATTERN'}"
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
            f"at {module}: check that it resembles the others. A --method other than minmax is less affected by it"
        )
    return found
