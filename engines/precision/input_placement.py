"""Where Q/DQ pairs go for runtimes that fuse them themselves."""

from __future__ import annotations

from collections.abc import Mapping, Set

import onnx_ir as ir

from export_zoo.engines.precision.placement import (
    Placement,
    constant,
    gate_layers,
    input_of,
    layers_before_indices,
    name_of,
    readers,
    weight_of,
)


def place_at_inputs(graph: ir.Graph, kept: Set[str] = frozenset()) -> Placement:
    """Placement for runtimes that move and fuse Q/DQ pairs themselves: at inputs of layers, float everywhere else.

    | operator         | rule                                                                             |
    |------------------|----------------------------------------------------------------------------------|
    | Conv, Gemm,      | input; weight; never the output by itself: Conv + activation (+ Add) fuse, and    |
    | MatMul           | the next layer's input quantizer becomes their output                            |
    | Add of a Conv    | its other input, the identity, so that Conv + Add + Relu is one int8 kernel; of two |
    |                  | convolutions the shallower is the shortcut and counts as identity               |
    | Conv of a gate   | nothing: it sees one pixel an image (`placement.gate_layers`)                    |
    | MaxPool, Concat, | nothing of their own: the builder moves a reader's quantizer up through them      |
    | layout           |                                                                                  |
    | average pooling  | nothing of its own: it sums, and does not commute with a quantizer                |
    | MaxPool's indices| if they are read, the layer before stays float; also for ArgMax, ArgMin, TopK    |
    | all else, `kept` | float                                                                            |

    Source: NVIDIA, TensorRT documentation, "Working with Quantized Types", section "Q/DQ Layer-Placement
    Recommendations".
    """
    placement = Placement()
    kept = kept | layers_before_indices(graph) | gate_layers(graph)
    depth: dict[int, int] = {}
    """Number of weighted layers on the longest path from the input to a value, by the value's id."""

    def want(value: ir.Value | None) -> None:
        if value is not None and not constant(value) and value.name is not None:
            placement.activations[value.name] = value.name

    for node in graph:
        weight = None if node.name in kept else weight_of(node)
        deepest = max((depth.get(id(value), 0) for value in node.inputs), default=0)
        depth.update((id(value), deepest + (weight is not None)) for value in node.outputs)
        if weight is not None:
            placement.weights[name_of(node)] = weight
            want(input_of(node, 0))
        elif node.op_type == "Add" and len(node.inputs) == 2:
            want(_identity(node, placement, depth))
    placement.activations = dict(sorted(placement.activations.items()))
    return placement


def _identity(add: ir.Node, placement: Placement, depth: Mapping[int, int]) -> ir.Value | None:
    """The input of a residual Add that does not come directly from the int8 convolution that the Add fuses with.

    None if the Add fuses with no convolution.
    """

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
