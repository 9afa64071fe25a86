"""How sure shares of images are: intervals, and how many images would settle whether a limit holds."""

from __future__ import annotations

import math
from collections.abc import Mapping

from export_zoo.engines.parity.limits import limits_of

OF_IMAGES = ("top1", "top5", "nearest", "accuracy")
"""Metrics that are shares of images."""

QUANTILE = 1.96
"""Of the normal distribution, for 95 %."""


def interval(share: float, images: int) -> tuple[float, float]:
    """The 95 % interval of a share of images.

    Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference". It holds for few images and for
    shares near 1, too.
    """
    z = QUANTILE**2 / images
    middle = (share + z / 2) / (1 + z)
    half = QUANTILE / (1 + z) * math.sqrt(share * (1 - share) / images + z / (4 * images))
    return max(0.0, middle - half), min(1.0, middle + half)


def images_to_settle(share: float, limit: float) -> int | None:
    """Number of images from which the interval of this share would not contain the limit; None if they are equal."""
    if share == limit:
        return None
    count = 1
    while True:
        low, high = interval(share, count)
        if not low <= limit <= high:
            return count
        count = math.ceil(count * 1.1)


def _of_images(metrics: Mapping[str, float | int | None]) -> int:
    """Number of images that shares are of; 0 if they are shares of pixels or tokens, which are not independent."""
    return 0 if {"pixels", "tokens"} & metrics.keys() else int(metrics.get("images") or 0)


def described(metrics: Mapping[str, float | int | None]) -> str:
    """The interval of the agreement that is shown beside SQNR, such as " (95.6 to 99.9)"; empty if it has none."""
    images = _of_images(metrics)
    share = next((value for metric in OF_IMAGES if (value := metrics.get(metric)) is not None), None)
    if share is None or not images:
        return ""
    low, high = interval(float(share), images)
    return f" ({100 * low:.1f} to {100 * high:.1f})"


def accuracy(metrics: Mapping[str, float | int | None]) -> str:
    """The accuracy, its interval and how it differs from eager's, `84.0 % (76.6 to 89.4), -0.8 to eager`; or empty."""
    share, images = metrics.get("accuracy"), _of_images(metrics)
    if share is None or not images:
        return ""
    low, high = interval(float(share), images)
    difference = 0.0 - 100 * (metrics.get("accuracy_drop") or 0.0)
    return f"{100 * share:.1f} % ({100 * low:.1f} to {100 * high:.1f}), {difference:+.1f} to eager"


def unsettled(metrics: Mapping[str, float | int | None], tolerances: Mapping[str, float]) -> list[str]:
    """Texts about limits that lie in the interval of their metric: more images might change the verdict."""
    images, found = _of_images(metrics), list[str]()
    for limit in limits_of(tolerances):
        share = metrics.get(limit.metric)
        if limit.metric not in OF_IMAGES or share is None or not images:
            continue
        low, high = interval(float(share), images)
        if low <= limit.value <= high:
            needed = images_to_settle(float(share), limit.value)
            text = f"{limit.metric} is {share:.4g} on {images} images, which may be {low:.3g} to {high:.3g} on others"
            settle = (
                f"about {_rounded(needed)} would settle it"
                if needed is not None
                else "no number would settle it"
            )
            found.append(f"{text}: the limit {limit.value:g} lies in between, and {settle}")
    return found


def _rounded(count: int) -> int:
    """A count with two significant digits."""
    power = int("1".ljust(len(str(count)) - 1, "0"))
    return math.ceil(count / power) * power
