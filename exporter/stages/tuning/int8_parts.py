"""The parts of the INT8 graph of one target, and how they are combined."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from export_zoo.base.graph_io import sha256_of
from export_zoo.calibration.ranges import Ranges
from export_zoo.engines.precision.int8.qdq import quantize
from export_zoo.engines.precision.int8.saturation.channel_order import ChannelOrder
from export_zoo.engines.targets.base import Target
from export_zoo.exporter.options import ExportOptions


@dataclass(frozen=True)
class Int8Parts:
    """A graph, its ranges, and the choices of `tuning.tune`."""

    graph: Path
    ranges: Ranges
    method: str
    clipped: tuple[str, ...] = ()
    """Tensors whose range minimizes the squared error, whatever the method."""
    means: Path | None = None
    """Mean inputs of layers, .safetensors by node name; None if biases are not corrected."""
    rounding: Path | None = None
    """Steps from the nearest integers, .safetensors by node name; None if all weights are rounded to nearest."""
    kept: tuple[str, ...] = ()
    """Patterns of layers that stay float, in addition to those of --keep-float."""

    def with_float(self, layers: Collection[str]) -> Int8Parts:
        """The same parts, with more layers in float.

        Args:
            layers: names of nodes.
        """
        return replace(self, kept=(*self.kept, *map(escape, sorted(layers))))

    def write(
        self, out: Path, target: Target, options: ExportOptions, order: ChannelOrder | None = None
    ) -> list[Path]:
        """Write the INT8 graph of a target; see `int8.qdq.quantize` for `order` and for the errors."""
        return quantize(
            self.graph,
            self.ranges,
            out,
            rules=target.int8,
            keep_float=(*options.keep_float, *self.kept),
            method=self.method,
            clipped=self.clipped,
            means=_arrays(self.means),
            rounding=_arrays(self.rounding),
            order=order,
        )

    def key(self, target: Target, options: ExportOptions) -> dict[str, Any]:
        """Everything that the result of `write` depends on, except library versions."""
        return {
            "graph": sha256_of(self.graph),
            "target": target.name,
            "ranges": self.ranges.digest(),
            "keep_float": [*options.keep_float, *self.kept],
            "method": self.method,
            "clipped": self.clipped,
            "means": sha256_of(self.means) if self.means is not None else None,
            "rounding": sha256_of(self.rounding) if self.rounding is not None else None,
        }


def _arrays(path: Path | None) -> Mapping[str, Any] | None:
    return load_file(path) if path is not None else None
