"""FP16 as a precision."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING

from export_zoo.engines.precision.base import Precision

if TYPE_CHECKING:
    from export_zoo.calibration.ranges import Ranges


class _FP16(Precision):
    def write(self, graph: Path, out: Path, ranges: Ranges | None, kept: Set[str] = frozenset()) -> None:
        from export_zoo.engines.precision.fp16.half import to_half

        to_half(graph, out, ranges, kept)


# Half has 11 significant bits (66 dB per rounding). After tens of layers, 40 dB or more are left.
FP16 = _FP16(
    "fp16",
    {
        "sqnr": 35.0,
        "top1": 0.97,
        "agreement": 0.97,
        "correlation": 0.999,
        "similarity": 0.999,
        "nearest": 0.97,
        "misplaced": 0,
    },
    uses_ranges=True,
    float16=True,
)
