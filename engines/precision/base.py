"""Base class of precisions: what a precision is to the rest of the program."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from export_zoo.calibration.ranges import Ranges


class Precision:
    """One precision, such as FP16. Instances are in `precision.registry`; importing them loads nothing heavy.

    Args:
        name: as in `--precision` and in engines' names.
        tolerances: default limits of the parity gate, by metric (see `parity.metrics`).
        uses_ranges: its graph depends on activation ranges, of calibration images or of synthetic ones.
        quantized: Q/DQ pairs are written: needs images to calibrate on, histograms, and tuning.
        integer_sums: products are added as integers, which saturates on some CPUs (see `saturation.pairs`).
        float16: the graph's tensors are float16.
        unsupported: reasons by target, for targets that cannot build it.
    """

    def __init__(
        self,
        name: str,
        tolerances: Mapping[str, float],
        *,
        uses_ranges: bool = False,
        quantized: bool = False,
        integer_sums: bool = False,
        float16: bool = False,
        unsupported: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.tolerances = tolerances
        self.uses_ranges = uses_ranges
        self.quantized = quantized
        self.integer_sums = integer_sums
        self.float16 = float16
        self.unsupported = unsupported or {}

    def write(self, graph: Path, out: Path, ranges: Ranges | None) -> None:
        """Write the precision graph of an FP32 graph, the same for all targets.

        FP32 is the graph itself; quantized precisions are written by the stage that tunes them.
        """
        raise NotImplementedError(self.name)
