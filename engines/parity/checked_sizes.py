"""Batch sizes and input sizes that the parity gate checks, of those that an engine may get."""

from __future__ import annotations

from collections.abc import Sequence

Size = tuple[int, int]
"""Height and width of the input, in pixels."""


def odd_batch(minimum: int, maximum: int, beside: Sequence[int]) -> int | None:
    """An odd batch size in [minimum, maximum] that is not in `beside`, near the middle; None if there is none."""
    middle = (minimum + maximum) / 2
    odd = [n for n in range(minimum, maximum + 1) if n % 2 and n not in beside]
    return min(odd, key=lambda n: abs(n - middle), default=None)


def batches_to_check(minimum: int, optimum: int, maximum: int) -> list[int]:
    """Batch sizes of the gate: min, opt, max and an odd one in the range; sorted, each once."""
    sizes = {minimum, optimum, maximum}
    odd = odd_batch(minimum, maximum, sorted(sizes))
    return sorted(sizes | ({odd} if odd is not None else set()))


def odd_size(least: Size, most: Size) -> Size | None:
    """An input size (height, width) in the range and unlike its ends; None if there is none.

    Height and width are odd and differ if the range allows it. They divide the range by the golden section: thirds of
    round numbers are close to multiples of 32, where strided layers round as they do at those multiples.
    """

    def near(axis: int, share: float, beside: int) -> int:
        low, high = least[axis], most[axis]
        wanted = low + share * (high - low)
        return min(range(low, high + 1), key=lambda n: (n % 2 == 0, n == beside, abs(n - wanted)))

    height = near(0, 0.382, 0)
    found = height, near(1, 0.618, height)
    return found if found not in (least, most) else None


def sizes_to_check(least: Size, optimum: Size, most: Size) -> list[Size]:
    """Input sizes of the gate in addition to opt: min, an odd one in the range, and max; each once."""
    sizes = (least, odd_size(least, most), most)
    return list(dict.fromkeys(size for size in sizes if size is not None and size != optimum))
