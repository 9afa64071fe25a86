"""Reorder channels so that two large weights of one sign are not added in 16 bits.

The order of a tensor's channels is arbitrary: its producers and its readers can be reordered together. Kernels add
channels 2j and 2j + 1 of a filter in 16 bits (`saturation.pairs`). So partners are chosen such that no filter that
reads them has two large weights of one sign. This is a matching of least cost. The function stays the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from export_zoo.engines.precision.int8.saturation.pairs import IndexArray, depthwise
from export_zoo.engines.precision.placement import constant, weight_of
from export_zoo.engines.precision.rewrites import add_constant

Float64Array = npt.NDArray[np.float64]

CHANNELWISE = frozenset(
    {
        *(
            "Relu",
            "Clip",
            "LeakyRelu",
            "Elu",
            "Selu",
            "Sigmoid",
            "HardSigmoid",
            "HardSwish",
            "Softplus",
            "Gelu",
            "Mish",
        ),
        *("Tanh", "Erf", "Neg", "Abs", "Sqrt", "Exp", "Identity"),
        *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"),
    }
)
"""Operators on one tensor that do the same to every channel, whatever its position."""

ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div"})

_BODIES = frozenset({ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS})

_PASSES = 50
"""Maximum number of exchange passes. A matching settles after about ten."""

_MAX_WORK = 500_000_000
"""Maximum number of weight comparisons to find the cost of partners in a layer: half a second."""


@dataclass
class _Channels:
    """Channels that can be reordered, and all layers that must be reordered alike."""

    size: int
    made: list[ir.Node] = field(default_factory=list)
    """Layers with these output channels, including depthwise layers and factors, which pass them on."""
    read: list[ir.Node] = field(default_factory=list)
    """Layers with these input channels."""


@dataclass(frozen=True)
class ChannelOrder:
    """New channel order of layers, by node name: int [channels], the old index of each new channel."""

    made: Mapping[str, IndexArray]
    """Order of output channels."""
    read: Mapping[str, IndexArray]
    """Order of input channels."""


def _channels_of(value: ir.Value | None) -> int | None:
    """Size of axis 1 of an image-like or flat tensor; None if that is not a plain channel axis."""
    if value is None or value.shape is None or len(value.shape) not in (2, 4):
        return None
    size = value.shape[1]
    return size if isinstance(size, int) else None


class _Groups:
    """Union-find over tensors, some of which must keep their order."""

    def __init__(self) -> None:
        self._parent: dict[int, int] = {}
        self._fixed: set[int] = set()

    def find(self, value: ir.Value) -> int:
        key = id(value)
        while (parent := self._parent.get(key, key)) != key:
            key = parent
        return key

    def join(self, *values: ir.Value) -> None:
        first = self.find(values[0])
        for value in values[1:]:
            if (other := self.find(value)) != first:
                self._parent[other] = first
                if other in self._fixed:
                    self._fixed.add(first)

    def fix(self, value: ir.Value) -> None:
        self._fixed.add(self.find(value))

    def fixed(self, value: ir.Value) -> bool:
        return self.find(value) in self._fixed


def _scalar(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and value.const_value.size == 1


def _one_number_a_channel(value: ir.Value, channels: int | None, rank: int) -> bool:
    """Whether a constant has one number per channel of [N, C, H, W] or [N, C], with the channels as its axis 0."""
    return value.shape is not None and tuple(value.shape) == (channels, *[1] * (rank - 2))


def _one_bias_a_channel(node: ir.Node) -> bool:
    """Whether a layer has no bias, or one per output channel. A Gemm's bias may be [1] or [N, channels] instead."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return True
    return bias.shape is not None and tuple(bias.shape) == (_channels_of(node.outputs[0]),)


def _factors(node: ir.Node) -> ir.Value | None:
    """The second operand of an elementwise node, if it is a constant with one number per channel."""
    if node.op_type not in ELEMENTWISE or not constant(node.inputs[1]):
        return None
    value, output = node.inputs[1], node.outputs[0]
    assert value is not None
    rank = len(output.shape) if output.shape is not None else 0
    return value if _one_number_a_channel(value, _channels_of(output), rank) else None


def _join(node: ir.Node, groups: _Groups) -> None:
    """Join the tensors of a node whose channels belong together, and fix those that must keep their order."""
    inputs = [value for value in node.inputs if value is not None]
    computed = [value for value in inputs if not constant(value)]
    tensors = [*computed, *node.outputs]
    sizes = {_channels_of(value) for value in tensors}
    alike = None not in sizes and len(sizes) == 1
    same_rank = len({len(value.shape) for value in tensors if value.shape is not None}) == 1
    rule = weight_of(node)
    if rule is not None and len(computed) == 1 and node.op_type in ("Conv", "Gemm"):
        weight = inputs[rule.index]
        assert weight.shape is not None
        groups_of_conv = node.attributes.get_int("group", 1)
        if node.op_type == "Gemm" or groups_of_conv == 1:
            if None not in sizes and _one_bias_a_channel(node):
                return
        elif depthwise(tuple(weight.shape.numpy()), groups_of_conv) and alike:
            groups.join(computed[0], node.outputs[0])
            return
    elif node.op_type in CHANNELWISE and len(computed) == 1 and alike and len(node.outputs) == 1:
        if all(_scalar(value) for value in inputs[1:]):
            groups.join(*tensors)
            return
    elif node.op_type in ELEMENTWISE and alike and same_rank:
        if all(constant(v) <= (_scalar(v) or _factors(node) is v) for v in inputs):
            groups.join(*tensors)
            return
    elif node.op_type == "Flatten" and alike and node.attributes.get_int("axis", 1) == 1:
        groups.join(*tensors)  # [N, C, 1, 1] -> [N, C]
        return
    for value in tensors:
        groups.fix(value)


def _found(graph: ir.Graph) -> list[_Channels]:
    """All channels of a graph that can be reordered and that a layer reads."""
    groups = _Groups()
    for node in graph:
        _join(node, groups)
    for value in (*graph.inputs, *graph.outputs):
        groups.fix(value)
    found: dict[int, _Channels] = {}

    def at(value: ir.Value | None) -> _Channels | None:
        size = _channels_of(value)
        if value is None or size is None or groups.fixed(value):
            return None
        return found.setdefault(groups.find(value), _Channels(size))

    for node in graph:
        if _factors(node) is not None and (channels := at(node.outputs[0])) is not None:
            channels.made.append(node)
        rule = weight_of(node)
        if rule is None or node.op_type not in ("Conv", "Gemm"):
            continue
        if (channels := at(node.outputs[0])) is not None:
            channels.made.append(node)
        handed_on = node.op_type == "Conv" and node.attributes.get_int("group", 1) != 1
        if not handed_on and (channels := at(node.inputs[0])) is not None:
            channels.read.append(node)
    return [channels for channels in found.values() if channels.made and channels.read]


def _filters(node: ir.Node) -> Float64Array:
    """A layer's filters in units of int8, the largest weight 127: float64 [output channels, input channels, taps]."""
    value = node.inputs[1]
    assert value is not None
    assert value.const_value is not None
    weight = np.asarray(value.const_value.numpy(), dtype=np.float64)
    if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 0:
        weight = weight.T
    rows = weight.reshape(*weight.shape[:2], -1)
    largest = np.abs(rows).max(axis=(1, 2), keepdims=True)
    return rows * (127 / np.where(largest > 0, largest, 1.0))


def _add_excess(rows: Float64Array, cost: Float64Array) -> None:
    """Add to cost [channels, channels] the squared excess of two weights of one sign, over rows [filters, channels].

    The channel with the larger weight is the row of `cost`, so the caller must add up both orders. Without a branch in
    the inner loop, the compiled code is eight times as fast.
    """
    count, channels = rows.shape
    for row in range(count):
        for i in range(channels):
            large = abs(rows[row, i])
            if large > 64.0:  # if two are too large together, one is over half
                sign = 1.0 if rows[row, i] > 0 else -1.0
                for j in range(channels):
                    other = sign * rows[row, j]
                    excess = max(large + other - 128.0, 0.0)
                    once = 0.5 if other > 64.0 else 1.0  # two large ones count twice
                    cost[i, j] += once * excess * excess


@cache
def _kernel() -> Any:
    """`_add_excess` as machine code, compiled in a second. NumPy takes a hundred times as long."""
    import numba

    return numba.njit("void(float64[:,::1], float64[:,::1])", nogil=True)(_add_excess)


def _cost(channels: _Channels) -> Float64Array:
    """Cost of each pair of channels as partners: float64 [channels, channels].

    The cost is the squared excess of both weights over what 16 bits hold, summed over all filters, in units of int8.
    """
    cost = np.zeros((channels.size, channels.size))
    for node in channels.read:
        filters = _filters(node)
        if filters.shape[2] > 1 and channels.size % 2:
            continue  # partners belong to neighbouring pixels then
        rows = np.moveaxis(filters, 2, 1).reshape(-1, channels.size)
        work = np.count_nonzero(np.abs(rows) > 64.0) * channels.size
        # Every nth filter of a VGG's dense layer is enough; all of them would take minutes.
        _kernel()(np.ascontiguousarray(rows[:: work // _MAX_WORK + 1]), cost)
    np.fill_diagonal(cost, 0.0)
    return cost + cost.T


def _matched(cost: Float64Array) -> npt.NDArray[np.intp]:
    """Pairs of channels with a low total cost, int [channels // 2, 2]: chosen greedily, then improved by exchanges."""
    free = np.ones(len(cost), dtype=bool)
    pairs = []
    for channel in np.argsort(-cost.sum(axis=1), kind="stable"):
        if free[channel] and free.sum() > 1:
            free[channel] = False
            partner = int(np.argmin(np.where(free, cost[channel], np.inf)))
            free[partner] = False
            pairs.append((int(channel), partner))
    found = np.array(pairs, dtype=np.intp).reshape(-1, 2)
    neighbours = np.arange(2 * len(found)).reshape(-1, 2)
    if cost[neighbours[:, 0], neighbours[:, 1]].sum() < cost[found[:, 0], found[:, 1]].sum():
        found = neighbours
    for _ in range(_PASSES):
        if not _exchange(found, cost):
            break
    return found


def _exchange(pairs: npt.NDArray[np.intp], cost: Float64Array) -> bool:
    """Let pairs exchange a partner if that lowers their total cost, each pair at most once. False if no pair does."""
    first, second = pairs.T
    now = cost[first, second]
    costly = np.flatnonzero(now > 0)
    if not len(costly):
        return False
    # Pairs (a, b) and (c, d) become (a, c) and (b, d), or (a, d) and (b, c).
    a, b = first[costly], second[costly]
    along = cost[np.ix_(a, first)] + cost[np.ix_(b, second)]
    across = cost[np.ix_(a, second)] + cost[np.ix_(b, first)]
    gain = now[costly][:, None] + now[None, :] - np.minimum(along, across)
    gain[np.arange(len(costly)), costly] = 0.0
    best = gain.argmax(axis=1)
    gains = gain[np.arange(len(costly)), best]
    touched: set[int] = set()
    for index in np.argsort(-gains, kind="stable"):
        one, other = int(costly[index]), int(best[index])
        if gains[index] <= 1e-9 * now.sum() or touched & {one, other}:
            continue
        touched |= {one, other}
        (a1, b1), (c1, d1) = pairs[one].tolist(), pairs[other].tolist()
        if along[index, other] <= across[index, other]:
            pairs[one], pairs[other] = (a1, c1), (b1, d1)
        else:
            pairs[one], pairs[other] = (a1, d1), (b1, c1)
    return bool(touched)


def choose_order(graph: ir.Graph) -> ChannelOrder:
    """The channel order with the least loss for the layers of an FP32 graph; see the docstring of this module.

    Channels keep their order if no pair of partners has a cost in it.
    """
    made: dict[str, IndexArray] = {}
    read: dict[str, IndexArray] = {}
    if any(attribute.type in _BODIES for node in graph for attribute in node.attributes.values()):
        return ChannelOrder(made, read)  # reads inside branches and loops are not followed
    for channels in _found(graph):
        cost = _cost(channels)
        even = np.arange(0, channels.size - 1, 2)
        if not cost[even, even + 1].any():
            continue
        pairs = _matched(cost)
        rest = np.setdiff1d(np.arange(channels.size), pairs)
        order = np.concatenate([pairs.reshape(-1), rest])
        made |= {str(node.name): order for node in channels.made}
        read |= {str(node.name): order for node in channels.read}
    return ChannelOrder(made, read)


def _operands(node: ir.Node, index: int) -> Iterator[tuple[ir.Node, int, bool]]:
    """Where the constants of an operand are stored, and whether they have only one number per channel."""
    value = node.inputs[index] if index < len(node.inputs) else None
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "DequantizeLinear":
        yield producer, 0, index > 1
        yield producer, 1, True
        yield producer, 2, True
    elif constant(value):
        yield node, index, index > 1


def _reorder(graph: ir.Graph, node: ir.Node, index: int, order: IndexArray, axis: int) -> None:
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    array = np.ascontiguousarray(np.take(value.const_value.numpy(), order, axis=axis))
    name = f"{value.name}_reordered" if len(value.uses()) == 1 else f"{value.name}_of_{node.name}_reordered"
    node.replace_input_with(index, add_constant(graph, name, array))


def reorder(graph: ir.Graph, order: ChannelOrder) -> None:
    """Reorder the channels of a Q/DQ graph or of the FP32 graph. The function stays the same.

    Float layers add their products in another order.
    """
    for node in list(graph):
        name = str(node.name)
        transposed = node.op_type != "Gemm" or node.attributes.get_int("transB", 0) != 0
        if (places := order.made.get(name)) is not None:
            for index in (1, 2):
                for holder, operand, flat in list(_operands(node, index)):
                    _reorder(graph, holder, operand, places, 0 if flat or transposed else 1)
        if (places := order.read.get(name)) is not None:
            holder, operand, _ = next(_operands(node, 1))
            _reorder(graph, holder, operand, places, 1 if transposed else 0)
