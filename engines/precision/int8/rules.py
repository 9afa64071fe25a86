"""How a target wants its INT8 graph."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass

import onnx_ir as ir

from export_zoo.engines.precision.placement import Placement


@dataclass(frozen=True)
class Int8Rules:
    """Where Q/DQ pairs go, and how a target's kernels represent numbers."""

    place: Callable[[ir.Graph, Set[str]], Placement]
    """The placement policy: a graph, and names of nodes that stay float."""
    symmetric: bool
    """Activations are int8 around 0; else uint8 with a zero point."""
    int32_bias: bool
    """The bias is quantized by us; else it stays float, which TensorRT wants."""
    half: bool
    """What is not quantized runs in FP16, and so must the scales beside it."""
    sums_in_16_bits: bool
    """On some CPUs two products are added in 16 bits, which must not overflow: see `saturation.pairs`."""
    finish: Callable[[ir.Graph], object] | None = None
    """Last rewrite of the finished graph."""
