"""Layers that --keep-float leaves unquantized: by module path, by node, or by kind."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from export_zoo.base import graph_io
from export_zoo.base.errors import UsageError
from export_zoo.engines.precision.patterns import is_named
from export_zoo.engines.precision.placement import is_depthwise, weight_of

FEW = 16
"""Minimum number of channels for an int8 convolution. With fewer, most of a tensor core's tile stays empty (NVIDIA
ModelOpt uses the same limit)."""


def _has_few_channels(node: ir.Node) -> bool:
    weight = node.inputs[1]
    assert weight is not None
    assert weight.shape is not None
    return node.op_type == "Conv" and not is_depthwise(node) and min(weight.shape.numpy()[:2]) < FEW


KINDS = {"@depthwise": is_depthwise, "@few-channels": _has_few_channels}
"""Layer kinds. `@few-channels`: convolutions with fewer than 16 output channels or fewer than 16 input channels per
group, except depthwise."""


def kept_float(graph: ir.Graph, patterns: Sequence[str]) -> frozenset[str]:
    """Names of the layers (nodes with an int8 weight) that a pattern matches.

    A pattern is a glob over module paths or node names, or one of `KINDS`. A module's path matches all layers in it.

    Raises:
        UsageError: a pattern is a glob that matches no such layer.
    """
    layers = {str(node.name): node for node in graph if weight_of(node) is not None}
    kept: set[str] = set()
    for pattern in patterns:
        if pattern in KINDS:
            kept.update(name for name, node in layers.items() if KINDS[pattern](node))
            continue
        found = {name for name, node in layers.items() if is_named(node, pattern)}
        if not found:
            some = [graph_io.module_of(node) or name for name, node in layers.items()][:4]
            raise UsageError(
                f"--keep-float {pattern!r}: no layer that would be quantized has this name",
                hint=f"give a module path, such as {', '.join(some)}, a node name, or a kind: {', '.join(KINDS)}",
            )
        kept |= found
    return frozenset(kept)
