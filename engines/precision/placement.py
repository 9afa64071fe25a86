"""Where Q/DQ pairs go: one policy a target. A policy decides, `int8.qdq` carries out.

Policies read a graph and name tensors; they change nothing. See docs/placement.md for the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field

import onnx_ir as ir

ACTIVATIONS = frozenset({"Relu", "Clip"})
LAYOUT = frozenset({"Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity"})
SAME_SCALE = LAYOUT | {"MaxPool"}
"""Operators that only move or select values: quantized in and out with one scale, at no cost."""
AVERAGES = frozenset({"AveragePool", "GlobalAveragePool"})


@dataclass(frozen=True)
class QuantizedWeight:
    """A constant operand to store as int8: its input index, its output-channel axis, and the bias beside it."""

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
    """The tensor after the Relu or Clip that alone reads `value`, else `value` itself."""
    nodes = readers(value)
    if len(nodes) == 1 and nodes[0].op_type in ACTIVATIONS and not value.is_graph_output():
        return nodes[0].outputs[0]
    return value


def ends_in_output(value: ir.Value) -> bool:
    """True where only layout operators stand between `value` and the graph's output (the logits)."""
    return value.is_graph_output() or any(
        node.op_type in LAYOUT and ends_in_output(node.outputs[0]) for node in readers(value)
    )


def weight_of(node: ir.Node) -> QuantizedWeight | None:
    """The int8 weight a node can have; None where the operand is computed or the layout is not supported."""
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
    """Names of the weighted layers behind the last convolution; that convolution, where it makes the logits itself."""
    layers = [node for node in graph if weight_of(node) is not None]
    convolutions = [i for i, node in enumerate(layers) if node.op_type == "Conv"]
    last = convolutions[-1] if convolutions else -1
    return tuple(_name(node) for node in layers[min(last + 1, len(layers) - 1) :])


class _Groups:
    """Union-find over tensor names."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def find(self, name: str) -> str:
        while (parent := self._parent.get(name, name)) != name:
            name = parent
        return name

    def join(self, first: str, second: str) -> None:
        self._parent[self.find(second)] = self.find(first)


def place_onnxruntime(graph: ir.Graph, kept: Set[str] = frozenset()) -> Placement:
    """The `onnxruntime` (CPU) column: what its kernels fuse into QLinearConv, QLinearAdd and their kin.

    | operator         | rule                                                                             |
    |------------------|----------------------------------------------------------------------------------|
    | Conv             | input; weight; output after Relu/Clip, else directly                             |
    | Gemm, MatMul     | input; weight; the output only where a quantized reader asks for it              |
    | Add              | all inputs and the output (after Relu), where every input is quantized           |
    | MaxPool, layout  | in and out share one scale, where the input is quantized and a reader wants it   |
    | average pooling  | input and output, where the input is quantized                                   |
    | Concat           | inputs and output share one scale, unless a BatchNormalization reads it (DenseNet)|
    | all else, `kept` | FP32, as is everything between which and the logits there is only layout         |
    """
    placement = Placement()
    groups = _Groups()
    wanted: set[str] = set()

    def want(value: ir.Value, *, needed: bool = False) -> bool:
        """Quantize a tensor, for its readers; an output, and what it is a view of, only where a layer reads it, too."""
        if constant(value) or value.name is None or (ends_in_output(value) and not needed):
            return False
        wanted.add(value.name)
        return True

    for node in graph:
        weight = None if node.name in kept else weight_of(node)
        if weight is None:
            continue
        placement.weights[_name(node)] = weight
        want(_input(node, 0), needed=True)
        if node.op_type == "Conv":
            want(activated(node.outputs[0]))

    def quantized(values: Iterator[ir.Value]) -> bool:
        return all(value.name in wanted for value in values)

    # Operators without weights follow their neighbours; in graph order one pass settles each chain.
    for node in graph:
        inputs = [value for value in node.inputs if value is not None and not constant(value)]
        output = node.outputs[0]
        if not inputs or not quantized(iter(inputs)):
            continue
        if node.op_type == "Add" and len(inputs) == 2:
            want(activated(output))
        elif node.op_type in AVERAGES:
            want(output)
        elif node.op_type in SAME_SCALE:
            if node.op_type == "MaxPool" or _asked_for(output, wanted):
                _share(groups, [*inputs, output], want(output))
        elif node.op_type == "Concat" and len(inputs) == len(node.inputs):
            pre_activation = any(reader.op_type == "BatchNormalization" for reader in readers(output))
            if not pre_activation:
                _share(groups, [*inputs, output], want(output))
    placement.activations = {name: groups.find(name) for name in sorted(wanted)}
    return placement


def place_tensorrt(graph: ir.Graph, kept: Set[str] = frozenset()) -> Placement:
    """The `tensorrt` column: Q/DQ where TensorRT's builder fuses it into int8 kernels, float everywhere else.

    | operator         | rule                                                                             |
    |------------------|----------------------------------------------------------------------------------|
    | Conv, Gemm,      | input; weight; never the output by itself: Conv + activation (+ Add) fuse, and    |
    | MatMul           | the next layer's input quantizer becomes their output                            |
    | Add of a Conv    | its other input, the identity, so that Conv + Add + Relu is one int8 kernel; of two |
    |                  | convolutions the shallower is the shortcut and counts as identity               |
    | MaxPool, Concat, | nothing of their own: the builder moves a reader's quantizer up through them      |
    | layout           |                                                                                  |
    | average pooling  | nothing of its own: it sums, and does not commute with a quantizer                |
    | all else, `kept` | float                                                                            |

    Source: NVIDIA, TensorRT documentation, "Working with Quantized Types", section "Q/DQ Layer-Placement
    Recommendations".
    """
    placement = Placement()
    depth: dict[int, int] = {}
    """Weighted layers on the longest way from the input to a value, by id."""

    def want(value: ir.Value | None) -> None:
        if value is not None and not constant(value) and value.name is not None:
            placement.activations[value.name] = value.name

    for node in graph:
        weight = None if node.name in kept else weight_of(node)
        deepest = max((depth.get(id(value), 0) for value in node.inputs), default=0)
        depth.update((id(value), deepest + (weight is not None)) for value in node.outputs)
        if weight is not None:
            placement.weights[_name(node)] = weight
            want(_input(node, 0))
        elif node.op_type == "Add" and len(node.inputs) == 2:
            want(_identity(node, placement, depth))
    placement.activations = dict(sorted(placement.activations.items()))
    return placement


def _identity(add: ir.Node, placement: Placement, depth: Mapping[int, int]) -> ir.Value | None:
    """The input of a residual Add that is not straight from the int8 convolution it fuses with; None if none is."""

    def fuses(value: ir.Value | None) -> bool:
        producer = value.producer() if value is not None else None
        if producer is None or producer.op_type != "Conv" or producer.name not in placement.weights:
            return False
        return len(readers(producer.outputs[0])) == 1

    first, second = add.inputs
    if not fuses(first) and not fuses(second):
        return None
    if fuses(first) and fuses(second):
        return first if depth.get(id(first), 0) < depth.get(id(second), 0) else second
    return second if fuses(first) else first


def _share(groups: _Groups, values: list[ir.Value], quantized: bool) -> None:
    if quantized:
        for value in values[1:]:
            groups.join(str(values[0].name), str(value.name))


def _asked_for(value: ir.Value, wanted: set[str]) -> bool:
    """A reader behind any chain of layout operators wants `value` quantized."""
    return value.name in wanted or any(
        node.op_type in SAME_SCALE and _asked_for(node.outputs[0], wanted) for node in readers(value)
    )


def _name(node: ir.Node) -> str:
    assert node.name is not None
    return node.name


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


POLICIES = {
    "onnxruntime": place_onnxruntime,
    "tensorrt": place_tensorrt,
    "tensorrt-rtx": place_tensorrt,
}


def quantized_tensors(graph: ir.Graph, kept: Set[str] = frozenset()) -> frozenset[str]:
    """Activations that any target quantizes: one calibration serves them all."""
    return frozenset(name for place in POLICIES.values() for name in place(graph, kept).activations)
