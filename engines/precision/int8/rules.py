"""Rules for the INT8 graph of a target."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass

import onnx_ir as ir

from export_zoo.engines.precision.placement import Placement


@dataclass(frozen=True)
class Int8Rules:
    """Where Q/DQ pairs go, and how a target's kernels represent numbers."""

    place: Callable[[ir.Graph, Set[str]], Placement]
    """The placement policy. Its arguments are a graph and the names of nodes that stay float."""
    symmetric: bool
    """Whether activations are int8 with zero point 0. Otherwise, they are uint8 with a zero point."""
    int32_bias: bool
    """Whether the bias is quantized to int32 here. Otherwise, it stays float, as TensorRT requires."""
    half: bool
    """Whether tensors that are not quantized run in FP16. The scales of their Q/DQ pairs must then be FP16 too."""
    sums_in_16_bits: bool
    """Whether some CPUs add two products in 16 bits. These sums must not overflow: see `saturation.pairs`.

    A first convolution is read in blocks then: `finish` must begin with `block_first_convolution`.
    """
    pairs_by_pixel: bool = False
    """Whether 16-bit sums are of channels of one pixel only. Otherwise, those of an odd number of channels go on at the
    next pixel of the kernel."""
    finish: Callable[[ir.Graph], object] | None = None
    """Last rewrite of the finished graph."""
    plain: Callable[[ir.Graph], object] | None = None
    """Rewrites the target's own integer operators, which `finish` makes, as Q/DQ pairs and standard operators."""
