"""Base class of precisions: the interface that the rest of the program uses."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from export_zoo.calibration.ranges import Ranges


class Precision:
    """A precision, such as FP16. The instances are in `precision.registry`. Importing them loads no heavy libraries.

    Args:
        name: its name in `--precision` and in the names of engines.
        tolerances: default limits of the parity gate, by metric (see `parity.metrics`).
        uses_ranges: whether its graph depends on activation ranges, from calibration images or synthetic images.
        quantized: whether its graph has Q/DQ pairs. It then needs calibration images, histograms and tuning.
        integer_sums: whether products are added as integers. Such sums saturate on some CPUs (see `saturation.pairs`).
        float16: whether the graph's tensors are float16.
        unsupported: targets that cannot build it, each with the reason.
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

    def write(self, graph: Path, out: Path, ranges: Ranges | None, kept: Set[str] = frozenset()) -> None:
        """Write the precision graph of an FP32 graph. It is the same for all targets.

        Nodes whose names are in `kept` stay float32.

        FP32's precision graph is the FP32 graph itself. The tuning stage writes the graphs of quantized precisions.
        """
        raise NotImplementedError(self.name)
