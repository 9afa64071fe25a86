"""FP16 precision graphs: float32 input and output, half inside, except for values that half cannot hold."""

from __future__ import annotations

from collections.abc import Iterable, Set
from pathlib import Path

import numpy as np
import onnx_ir as ir

from export_zoo.base import graph_io
from export_zoo.calibration.ranges import Ranges
from export_zoo.engines.precision.placement import ACTIVATIONS, LAYOUT, chooses_indices, constant
from export_zoo.engines.precision.rewrites import remove_unused_initializers

KEEP_FLOAT = frozenset(
    {
        "GroupNormalization",
        "InstanceNormalization",
        "LayerNormalization",
        "LogSoftmax",
        "LRN",
        "LpNormalization",
        "ReduceL2",
        "ReduceLogSumExp",
        "ReduceMean",
        "ReduceProd",
        "ReduceSum",
        "ReduceSumSquare",
        "Resize",
        "Softmax",
    }
)
"""Operators that stay float: exponentials, sums of squares and large sums exceed half's range or lose too much
to its 11 bits."""

MAX_ABS = 32768.0
"""Largest calibrated magnitude of a half tensor. Half ends at 65,504; other images may have larger values than the
calibration images."""

_LEAST_NORMAL, _LARGEST = float(np.finfo(np.float16).tiny), float(np.finfo(np.float16).max)


QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})
_CARRY_EPSILON = LAYOUT | {"Expand", "Sqrt"}
_GUARDS = LAYOUT | ACTIVATIONS | {"Abs", "Add", "BatchNormalization", "Expand", "Max", "Sqrt"}
"""Operators between a value and an operator that is steep near zero, or that chooses indices."""


def _needs_exact_input(node: ir.Node) -> bool:
    """Whether a small error of the input is not a small error of the output.

    Logarithms, reciprocals and negative powers are steep near zero, where half has few bits or none: log(1e-7) is off
    by 0.18. Indices of the largest value change where rounding makes values equal.
    """
    if node.op_type == "Pow":
        exponent = node.inputs[1]
        return constant(exponent) and _least(exponent) < 0
    return node.op_type in ("Log", "Reciprocal") or chooses_indices(node)


def _least(value: ir.Value | None) -> float:
    assert value is not None
    assert value.const_value is not None
    array = value.const_value.numpy()
    return float(array.min()) if array.size else 0.0


def _exact(nodes: Iterable[ir.Node]) -> set[int]:
    """Ids of the nodes that need exact inputs, of their guards, and of the nodes that compute the guarded values."""
    found: set[int] = set()
    todo = [node for node in nodes if _needs_exact_input(node)]
    while todo:
        node = todo.pop()
        if id(node) in found:
            continue
        found.add(id(node))
        if _needs_exact_input(node) or node.op_type in _GUARDS:
            todo += [
                producer for value in node.inputs if value is not None and (producer := value.producer())
            ]
    return found


def _largest(value: ir.Value) -> float:
    assert value.const_value is not None
    array = value.const_value.numpy()
    return float(np.abs(array).max()) if array.size else 0.0


LEAST_SCALE = 2.0**-20
"""Smallest scale of a Q/DQ pair in half. Half's steps there are 1/16 of the scale, and the integers are computed with
the scale that half holds."""


def _scales_fit(node: ir.Node) -> bool:
    """Whether a Q or DQ may run in half: half must hold its scales and the weights that it makes from integers."""
    scale, source = node.inputs[1], node.inputs[0]
    if scale is None or not constant(scale):
        return False
    levels = 127.0 if constant(source) else 1.0
    return _largest(scale) >= LEAST_SCALE and levels * _largest(scale) <= _LARGEST


def _fits_half(value: ir.Value) -> bool:
    """Whether half can hold a constant: it must not overflow, nor vanish as an epsilon would. Single tiny weights may
    vanish."""
    largest = _largest(value)
    return largest == 0 or _LEAST_NORMAL <= largest <= _LARGEST


def _decide(nodes: Iterable[ir.Node], beyond: Set[str], kept: Set[str]) -> dict[int, bool]:
    """Whether each node runs in half, by id, for nodes in graph order.

    An epsilon guards a division: `x / max(norm, 1e-12)` is 0 / 0 if the maximum is cast to half before the division.
    So all nodes from the epsilon to the division stay float. So do those of `_exact`.

    Args:
        beyond: names of tensors that half might not hold. Their producers and readers stay float.
        kept: names of nodes that stay float.
    """
    decisions: dict[int, bool] = {}
    nodes = list(nodes)
    exact = _exact(nodes)
    unfit = set(beyond)
    # Ranges lack the values that an activation cuts off below: its input is at least as large as its output.
    for node in reversed(nodes):
        if node.op_type in ACTIVATIONS and node.outputs[0].name in unfit and node.inputs[0] is not None:
            unfit.add(str(node.inputs[0].name))
    guarded: set[int] = set()
    for node in nodes:
        operands = [value for value in node.inputs if value is not None and _is_float(value)]
        epsilon = node.op_type not in QDQ and any(
            constant(value) and 0 < _largest(value) < _LEAST_NORMAL for value in operands
        )
        carries = node.op_type in _CARRY_EPSILON and any(id(value) in guarded for value in operands)
        divides = node.op_type in ("Div", "Reciprocal") and id(node.inputs[-1]) in guarded
        if epsilon or carries:
            guarded.update(id(value) for value in node.outputs)
        outside = any(v is not None and v.name in unfit for v in [*node.inputs, *node.outputs])
        if node.op_type in QDQ and (outside or (constant(node.inputs[0]) and not runs_in_half(node))):
            unfit.update(str(value.name) for value in node.outputs)  # the same values
        stays = carries or divides or outside or id(node) in exact or node.name in kept
        decisions[id(node)] = runs_in_half(node) and not stays
    return decisions


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype is ir.DataType.FLOAT


def runs_in_half(node: ir.Node) -> bool:
    """True for operators with float inputs that compute in half."""
    inputs = [value for value in node.inputs if value is not None and _is_float(value)]
    if node.op_type in KEEP_FLOAT or not inputs or node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type in QDQ:
        return _scales_fit(node)
    if any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for attribute in node.attributes.values()
    ):
        return False
    # A bias may vanish: half does not hold the sum that it is added to any better.
    biases = [*node.inputs[2:3]] if node.op_type in ("Conv", "ConvTranspose", "Gemm") else []
    if any(_largest(value) > _LARGEST for value in biases if value is not None and constant(value)):
        return False
    return all(_fits_half(value) for value in inputs if constant(value) and value not in biases)


class _Converter:
    def __init__(self, graph: ir.Graph, beyond: Set[str], kept: Set[str]) -> None:
        self.graph = graph
        self.beyond, self.kept = beyond, kept
        self.casts: dict[tuple[str, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        nodes = list(self.graph)
        decisions = _decide(nodes, self.beyond, self.kept)
        floats = {
            id(v) for node in nodes for v in [*node.inputs, *node.outputs] if v is not None and _is_float(v)
        }
        for node in nodes:
            dtype = ir.DataType.FLOAT16 if decisions[id(node)] else ir.DataType.FLOAT
            for index, value in enumerate(node.inputs):
                if (
                    value is not None
                    and id(value) in floats
                    and (constant(value) or value.dtype is not dtype)
                ):
                    node.replace_input_with(index, self._as(value, dtype, before=node))
            for output in node.outputs:
                if id(output) in floats and node.op_type != "Cast":
                    output.dtype = dtype
            if node.op_type == "Cast" and decisions[id(node)] and id(node.outputs[0]) in floats:
                node.outputs[0].dtype = ir.DataType.FLOAT
        for index, output in enumerate(self.graph.outputs):
            if output.dtype is ir.DataType.FLOAT16:
                self._float_output(index, output)

    def _as(self, value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        """`value` as `dtype`: a converted constant, or a Cast that all readers share."""
        key = (str(value.name), dtype)
        if key in self.casts:
            return self.casts[key]
        if constant(value):
            assert value.const_value is not None
            if dtype is ir.DataType.FLOAT:
                return value
            array = value.const_value.numpy().astype(np.float16)
            tensor = ir.tensor(array, name=f"{value.name}_half")
            made = ir.Value(
                name=f"{value.name}_half",
                shape=value.shape,
                type=ir.TensorType(ir.DataType.FLOAT16),
                const_value=tensor,
            )
            self.graph.register_initializer(made)
        else:
            suffix = "half" if dtype is ir.DataType.FLOAT16 else "float"
            cast = _cast(value, dtype, f"{value.name}_{suffix}")
            producer = value.producer()
            if producer is None:
                self.graph.insert_before(before, cast)
            else:
                self.graph.insert_after(producer, cast)
            made = cast.outputs[0]
        self.casts[key] = made
        return made

    def _float_output(self, index: int, output: ir.Value) -> None:
        name = str(output.name)
        output.name = f"{name}_half"
        cast = _cast(output, ir.DataType.FLOAT, name)
        producer = output.producer()
        assert producer is not None
        self.graph.insert_after(producer, cast)
        self.graph.outputs[index] = cast.outputs[0]


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{name}_Cast")
    module = graph_io.module_of(value.producer())
    if module:
        node.metadata_props[graph_io.MODULE_KEY] = module
    node.outputs[0].name = name
    node.outputs[0].dtype = dtype
    node.outputs[0].shape = value.shape
    return node


def beyond_half(ranges: Ranges | None) -> set[str]:
    """Tensors whose largest magnitude on the calibration images is over MAX_ABS, or below half's normal numbers.

    Of the latter, half has fewer than 11 bits even of the largest value. Tensors that are all 0 fit.
    """
    tensors = ranges.tensors if ranges is not None else {}
    largest = {name: max(-found.min, found.max) for name, found in tensors.items()}
    return {name for name, value in largest.items() if value > MAX_ABS or 0 < value < _LEAST_NORMAL}


def halve(graph: ir.Graph, ranges: Ranges | None, kept: Set[str] = frozenset()) -> None:
    """Convert a graph to FP16 in place. Values that half cannot hold, the input and the logits stay float32.

    Args:
        ranges: activation ranges, to find tensors that overflow or underflow; None without calibration.
        kept: names of nodes that stay float32.
    """
    _Converter(graph, beyond_half(ranges), kept).run()


def to_half(graph: Path, out: Path, ranges: Ranges | None = None, kept: Set[str] = frozenset()) -> list[Path]:
    """Write the FP16 precision graph of an FP32 graph (see `halve`). Returns the files written."""
    model = graph_io.load(graph)
    halve(model.graph, ranges, kept)
    remove_unused_initializers(model.graph)
    return graph_io.save(model, out)
