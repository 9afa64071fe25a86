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
FLOAT_ACTIVATIONS = frozenset(
    {"Sigmoid", "HardSigmoid", "HardSwish", "Gelu", "Erf", "Tanh", "Softplus", "Mish", "Elu", "Selu", "Mul"}
)
"""Operators after a layer that are computed in float everywhere. Mul is the product of x * Sigmoid(x), or of a gate."""
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
    """Whether a node's result depends on which value is the largest, as with a MaxPool whose indices are read.

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


def is_pointwise(node: ir.Node) -> bool:
    """Whether a Conv is a product of each pixel with a matrix: 1x1 kernel, one group, stride 1 and no padding."""
    value = node.inputs[1] if len(node.inputs) > 1 else None
    shape = list(value.shape) if value is not None and value.shape is not None else []
    attributes = node.attributes
    return (
        node.op_type == "Conv"
        and shape[2:] == [1, 1]
        and attributes.get_int("group", 1) == 1
        and not any(attributes.get_ints("pads", []))
        and all(stride == 1 for stride in attributes.get_ints("strides", []))
    )


def is_depthwise(node: ir.Node) -> bool:
    """Whether a Conv has one input channel in each of several groups."""
    value = node.inputs[1] if len(node.inputs) > 1 else None
    shape = list(value.shape) if value is not None and value.shape is not None else []
    return node.op_type == "Conv" and shape[1:2] == [1] and node.attributes.get_int("group", 1) > 1


def silu_input(node: ir.Node) -> ir.Value | None:
    """x, if a node is the Mul of x * Sigmoid(x). Otherwise, None."""
    if node.op_type != "Mul":
        return None
    for factor, other in (node.inputs, node.inputs[::-1]):
        gate = factor.producer() if factor is not None else None
        if gate is not None and gate.op_type == "Sigmoid" and gate.inputs[0] is other:
            return other
    return None


def gate_of(node: ir.Node) -> ir.Value | None:
    """The computed factor of a Mul that has one pixel an image, if the other factor has more. Otherwise, None."""
    if node.op_type != "Mul" or any(map(constant, node.inputs)):
        return None
    single = [value for value in node.inputs if value is not None and _pixels(value) == 1]
    return single[0] if len(single) == 1 else None


def gate_layers(graph: ir.Graph) -> frozenset[str]:
    """Names of the weighted layers of squeeze-and-excitation gates, which weight the channels of an image.

    They see one pixel an image, so that they cost no time in float, and all that comes after depends on them.
    Source: Hu et al. 2018, "Squeeze-and-Excitation Networks", arXiv 1709.01507, section 3.
    """
    found: set[str] = set()
    for gate in filter(None, map(gate_of, graph)):
        waiting = [gate.producer()]
        seen: set[ir.Node] = set()
        while waiting:
            layer = waiting.pop()
            if layer is None or layer in seen or layer.op_type in AVERAGES | {"ReduceMean"}:
                continue
            seen.add(layer)
            if weight_of(layer) is not None:
                found.add(name_of(layer))
            waiting += [v.producer() for v in layer.inputs if v is not None and _pixels(v) == 1]
    return frozenset(found)


def _pixels(value: ir.Value) -> int | None:
    """Number of pixels of [N, C, H, W], and 1 for [N, C]; None if unknown."""
    if value.shape is None or len(value.shape) not in (2, 4):
        return None
    sizes = list(value.shape)[2:]
    product = 1
    for size in sizes:
        if not isinstance(size, int):
            return None
        product *= size
    return product


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


def first_layers(graph: ir.Graph) -> tuple[str, ...]:
    """Names of the first weighted layer and of the depthwise convolutions behind it; () if there are none.

    Only activations lie between them. Such a convolution sees each channel alone, so it cannot average the rounding
    errors of its input; and as an edge filter it takes differences of neighbours, which are smaller than the values.
    """
    first = next((node for node in graph if weight_of(node) is not None), None)
    if first is None:
        return ()
    behind: list[str] = []
    waiting, seen = readers(first.outputs[0]), set[ir.Node]()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if weight_of(node) is not None:
            behind += [name_of(node)] if is_depthwise(node) else []
        elif node.op_type in ACTIVATIONS | FLOAT_ACTIVATIONS:
            waiting += readers(node.outputs[0])
    return (name_of(first), *sorted(behind)) if behind else ()


def name_of(node: ir.Node) -> str:
    assert node.name is not None
    return node.name


def input_of(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value
