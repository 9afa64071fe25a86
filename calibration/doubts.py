"""What makes a calibration doubtful, though nothing is wrong with it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from calibration.ranges import Ranges

FEW = 100
"""Images below which min/max still moves a lot from one set to another."""

ALONE = 2.0
"""A range so many times as wide as without one image costs all others a bit."""


def doubts(ranges: Ranges, names: Mapping[str, str]) -> list[str]:
    """Warnings for people: too few images, and images that alone widen the ranges of quantized tensors.

    Args:
        names: of the images, by SHA-256.
    """
    found = []
    count = len(ranges.image_sha256)
    if count < FEW:
        found.append(f"calibrated on {count} images only: 300 to 1,000 are usual")
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
