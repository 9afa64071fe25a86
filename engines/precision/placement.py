"""The decisions of placement policies, and the graph queries that they use. `int8.qdq` applies a placement.

Each target has a policy in `placement.py` in its folder. It reads a graph and names tensors. It changes nothing.
Tables: docs/placement.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

ACTIVATIONS = frozenset({"Relu", "Clip"})
LAYOUT = frozenset({"Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity"})
SAME_SCALE = LAYOUT | {"MaxPool"}
"""Operators that only move or select values. Input and output are quantized with one scale, at no cost."""
AVERAGES = frozenset({"AveragePool", "GlobalAveragePool"})


@dataclass(frozen=True)
class QuantizedWeight:
    """A constant operand to store as int8: its input index, its output-channel axis, and the bias's input index."""

    index: int
    axis: int
    bias_index: int | None


@dataclass
class Placement:
    """The decisions of a policy for one graph."""

    activations: dict[str, str] = field(default_factory=dict)
    """Tensor name -> scale group; tensors of one group share scale and zero point."""
    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    """Node name -> its quantized weight."""

    def groups(self) -> dict[str, list[str]]:
        """Scale group -> its tensors."""
        members: dict[str, list[str]] = {}
        for tensor, group in self.activations.items():
            members.setdefault(group, []).append(tensor)
        return members


def constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None


def readers(value: ir.Value) -> list[ir.Node]:
    return [use.node for use in value.uses()]


def activated(value: ir.Value) -> ir.Value:
    """The output of the Relu or Clip that is the only reader of `value`. Otherwise, `value` itself."""
    nodes = readers(value)
    if len(nodes) == 1 and nodes[0].op_type in ACTIVATIONS and not value.is_graph_output():
        return nodes[0].outputs[0]
    return value


def ends_in_output(value: ir.Value) -> bool:
    """True if only layout operators are between `value` and the graph's output (the logits)."""
    return value.is_graph_output() or any(
        node.op_type in LAYOUT and ends_in_output(node.outputs[0]) for node in readers(value)
    )


def chooses_indices(node: ir.Node) -> bool:
    """Whether a node's result depends on which value is the largest, as pooling indices do that are read.

    Rounding makes values equal and moves the maximum: what reads the indices then finds another place.
    """
    if node.op_type == "MaxPool":
        return len(node.outputs) > 1 and bool(readers(node.outputs[1]))
    return node.op_type in ("ArgMax", "ArgMin", "TopK")


def layers_before_indices(graph: ir.Graph) -> frozenset[str]:
    """Names of the weighted layers whose output, after activations, goes to a node that chooses indices."""
    found = set()
    for node in graph:
        if weight_of(node) is None:
            continue
        value = node.outputs[0]
        while (after := activated(value)) is not value:
            value = after
        if any(map(chooses_indices, readers(value))):
            found.add(name_of(node))
    return frozenset(found)


def weight_of(node: ir.Node) -> QuantizedWeight | None:
    """The int8 weight that a node can have; None if the operand is computed or the layout is not supported."""
    if len(node.inputs) < 2 or not constant(node.inputs[1]) or constant(node.inputs[0]):
        return None
    weight = node.inputs[1]
    assert weight is not None
    rank = len(weight.shape) if weight.shape is not None else 0
    has_bias = len(node.inputs) > 2 and node.inputs[2] is not None
    if has_bias and not constant(node.inputs[2]):
        return None
    bias_index = 2 if has_bias else None
    match node.op_type:
        case "Conv" if rank == 4:
            return QuantizedWeight(1, 0, bias_index)
        case "Gemm" if rank == 2 and _plain_gemm(node):
            return QuantizedWeight(1, 0 if node.attributes.get_int("transB", 0) else 1, bias_index)
        case "MatMul" if rank == 2:
            return QuantizedWeight(1, 1, None)
    return None


def _plain_gemm(node: ir.Node) -> bool:
    attributes = node.attributes
    scaled = attributes.get_float("alpha", 1.0) != 1.0 or attributes.get_float("beta", 1.0) != 1.0
    return not scaled and not attributes.get_int("transA", 0)


def classifier_layers(graph: ir.Graph) -> tuple[str, ...]:
    """Names of the weighted layers after the last convolution; if there are none, the name of that convolution."""
    layers = [node for node in graph if weight_of(node) is not None]
    convolutions = [i for i, node in enumerate(layers) if node.op_type == "Conv"]
    last = convolutions[-1] if convolutions else -1
    return tuple(name_of(node) for node in layers[min(last + 1, len(layers) - 1) :])


def name_of(node: ir.Node) -> str:
    assert node.name is not None
    return node.name


def input_of(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value
