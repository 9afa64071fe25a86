"""Find int8 weights whose products are added in 16 bits, and limit them so that no two overflow.

`vpmaddubsw` (x86-64 without VNNI) multiplies uint8 activations with int8 weights, adds two neighbouring products in
16 bits and saturates. Two weights of opposite signs cannot overflow. Two weights of one sign cannot overflow if their
magnitudes add up to 128 or less, whatever the activations: 255 x 128 is 32,640. A filter's neighbours are its elements
2j and 2j + 1, flattened as (kernel height, kernel width, input channel), for each group separately.
`benchmarks/saturation_pairs.py` checks this for the installed ONNX Runtime. Kernels of depthwise convolutions multiply
in 16 bits and add in 32 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from export_zoo.engines.precision.int8.first_conv import blocked_weight, blocks_of
from export_zoo.engines.precision.placement import QuantizedWeight, weight_of

Float64Array = npt.NDArray[np.float64]
IndexArray = npt.NDArray[np.intp]

LARGEST_SUM = 128
"""Largest magnitude of the sum of two neighbouring weights that cannot saturate: 255 x 129 is over 32,767."""

NONE = -1
"""Partner of a weight that is added alone."""


def _partners_in_order(order: IndexArray, size: int) -> IndexArray:
    """Partners of weights 0 to size - 1, which a kernel reads in this order. Negative entries hold no weight."""
    padded = order if len(order) % 2 == 0 else np.append(order, NONE)
    first, second = padded.reshape(-1, 2).T
    both = (first >= 0) & (second >= 0)
    partners = np.full(size, NONE, dtype=np.intp)
    partners[first[both]], partners[second[both]] = second[both], first[both]
    return partners


def depthwise(shape: tuple[int, ...], groups: int) -> bool:
    """Whether a Conv's weight of this shape has one input and one output channel in each group."""
    return shape[1] == 1 and groups == shape[0]


def partners_of(
    graph: ir.Graph,
    node: ir.Node,
    rule: QuantizedWeight,
    order: IndexArray | None = None,
    *,
    by_pixel: bool = False,
) -> IndexArray:
    """Partner of each weight of a layer's filters in 16-bit sums, once the FP32 graph is an INT8 graph for the CPU.

    Args:
        order: new order of the layer's input channels, as the old index of each; by default unchanged.
        by_pixel: see `Int8Rules.pairs_by_pixel`.

    Returns int [K], indices into a filter flattened in storage order (C, kH, kW for a Conv). NONE for a weight that is
    added alone.
    """
    value = node.inputs[rule.index]
    assert value is not None
    assert value.shape is not None
    shape = tuple(value.shape.numpy())
    if node.op_type != "Conv":
        size = shape[1 - rule.axis]
        return _partners_in_order(np.arange(size) if order is None else order, size)
    size = int(np.prod(shape[1:]))
    if depthwise(shape, node.attributes.get_int("group", 1)):
        return np.full(size, NONE, dtype=np.intp)
    places = np.arange(size).reshape(1, *shape[1:])
    if order is not None:
        places = places[:, order]
    if (blocks := blocks_of(graph)) is not None and blocks.conv is node:
        # 0 marks a block's place without a weight, so places count from 1.
        places = blocked_weight(places + 1, blocks.top_left) - 1
    return _partners_in_order(_read(np.moveaxis(places, 1, 3), by_pixel), size)


def _read(places: IndexArray, by_pixel: bool) -> IndexArray:
    """Places of a filter's weights [..., C] in the order in which a kernel reads them, flat; NONE where it reads none.

    Args:
        by_pixel: see `Int8Rules.pairs_by_pixel`.
    """
    if by_pixel and places.shape[-1] % 2 == 1:
        places = np.pad(places, [*[(0, 0)] * (places.ndim - 1), (0, 1)], constant_values=NONE)
    return places.reshape(-1)


def within_pairs(integers: Float64Array, partners: IndexArray) -> Float64Array:
    """Weights of which no two neighbours overflow. In a pair that does, both weights lose half of the excess.

    Args:
        integers: float64 [channels, K], whole numbers from -127 to 127.
        partners: see `partners_of`.
    """
    found = integers.copy()
    first, total = _sums(integers, partners)
    channels, pairs = np.nonzero(np.abs(total) > LARGEST_SUM)
    sums = total[channels, pairs]
    excess = sums - np.sign(sums) * LARGEST_SUM
    half = np.trunc(excess / 2)
    found[channels, first[pairs]] -= half
    found[channels, partners[first[pairs]]] -= excess - half
    return found


def _sums(rows: npt.NDArray[Any], partners: IndexArray) -> tuple[IndexArray, npt.NDArray[Any]]:
    """The first of each pair, int [pairs], and the sums of neighbours [channels, pairs]."""
    first = np.flatnonzero(partners > np.arange(len(partners)))
    return first, rows[:, first] + rows[:, partners[first]]


def sums_that_overflow(
    scaled: npt.NDArray[np.floating], partners: IndexArray
) -> tuple[IndexArray, npt.NDArray[np.floating]]:
    """Channel and magnitude of each sum of neighbours over 128, for weights in units of int8 [channels, K]."""
    _, total = _sums(scaled, partners)
    magnitudes = np.abs(total)
    channels, pairs = np.nonzero(magnitudes > LARGEST_SUM)
    return channels, magnitudes[channels, pairs]


def overflowing(integers: npt.NDArray[np.generic], partners: IndexArray) -> npt.NDArray[np.bool_]:
    """Whether each filter of integers [channels, K] has neighbours that can overflow, bool [channels]."""
    _, total = _sums(integers.astype(np.int16), partners)
    return np.asarray((np.abs(total) > LARGEST_SUM).any(axis=1))


def quantized_weights(graph: ir.Graph) -> list[tuple[ir.Node, ir.Node, ir.Value]]:
    """The layers of a Q/DQ graph with an int8 weight: node, the weight's DequantizeLinear, and the weight."""
    found = []
    for node in graph:
        operand = node.inputs[1] if len(node.inputs) > 1 else None
        dequantize = operand.producer() if operand is not None else None
        if node.op_type not in ("Conv", "Gemm", "MatMul") or dequantize is None:
            continue
        weight = dequantize.inputs[0] if dequantize.op_type == "DequantizeLinear" else None
        if weight is not None and weight.const_value is not None and weight.dtype == ir.DataType.INT8:
            found.append((node, dequantize, weight))
    return found


def saturating_layers(graph: ir.Graph, *, by_pixel: bool = False) -> list[str]:
    """Names of the layers of a finished Q/DQ graph that can saturate.

    An empty list proves that the graph cannot saturate. Layers whose activations are int8 (TensorRT's) count, too.

    Args:
        by_pixel: see `Int8Rules.pairs_by_pixel`.
    """
    found = []
    products = ((node, node.inputs[1]) for node in graph if node.op_type == "MatMulIntegerToFloat")
    layers = [*products, *((node, weight) for node, _, weight in quantized_weights(graph))]
    for node, weight in layers:
        if weight is None or weight.const_value is None or weight.dtype != ir.DataType.INT8:
            continue
        integers = weight.const_value.numpy()
        if node.op_type == "Conv":
            if depthwise(integers.shape, node.attributes.get_int("group", 1)):
                continue
            filters = np.moveaxis(integers, 1, -1)
            rows = filters.reshape(len(integers), -1)
            order = _read(np.arange(rows.shape[1]).reshape(filters.shape[1:]), by_pixel)
        elif node.op_type == "Gemm" and node.attributes.get_int("transB", 0) != 0:
            rows, order = integers, np.arange(integers.shape[1])
        else:
            rows = np.moveaxis(integers, -2, -1).reshape(-1, integers.shape[-2])
            order = np.arange(rows.shape[1])
        if overflowing(rows, _partners_in_order(order, rows.shape[1])).any():
            found.append(str(node.name))
    return found


def layers_with_partners(
    graph: ir.Graph, orders: Mapping[str, IndexArray], *, by_pixel: bool = False
) -> dict[str, IndexArray]:
    """Result of `partners_of` for each layer of an FP32 graph that can have an int8 weight, by node name.

    Args:
        orders: new orders of layers' input channels, by node name, see `saturation.channel_order`.
        by_pixel: see `Int8Rules.pairs_by_pixel`.
    """
    rules = ((node, weight_of(node)) for node in graph)
    return {
        str(node.name): partners_of(graph, node, rule, orders.get(str(node.name)), by_pixel=by_pixel)
        for node, rule in rules
        if rule is not None
    }
