"""Regions of a network that can stay float as a whole, and models of one region alone, to be timed.

A *cut* is a quantized tensor through which everything passes that is computed later. A region is what lies between two
cuts: some layers in a row, or whole residual blocks. In float it needs one DequantizeLinear and one QuantizeLinear.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from export_zoo.engines.precision.placement import constant, name_of
from export_zoo.engines.precision.rewrites import add_constant

LONGEST = 3
"""Largest number of parts between neighbouring cuts in a region. In longer ones, the two conversions weigh little."""

_MEANINGLESS = {"dilations": 1, "group": 1, "kernel_shape": None, "ceil_mode": 0, "auto_pad": "NOTSET"}
"""Attributes that a signature leaves out at these values (in all elements), or always."""


@dataclass(frozen=True)
class Region:
    """A region lies between two cuts of an FP32 graph."""

    begin: int
    """Index of the cut before it, in the order of the graph."""
    end: int
    first: ir.Value
    last: ir.Value
    nodes: tuple[ir.Node, ...]
    layers: tuple[str, ...]
    """Names of its layers that would be quantized."""

    @property
    def signature(self) -> str:
        """Operators, their shapes and how they are connected, as a text that is the same for equal regions."""
        assert self.first.shape is not None
        where = "image " if self.first.producer() is None else ""
        numbers = {self.first: "x"}
        parts = []
        for index, node in enumerate(self.nodes):
            inputs = [_operand(value, numbers) for value in node.inputs]
            attributes = [text for name in sorted(node.attributes) if (text := _attribute(node, name))]
            numbers |= {value: str(index) + "'" * i for i, value in enumerate(node.outputs)}
            parts.append(f"{node.op_type}({', '.join([*inputs, *attributes])})")
        size = "x".join(map(str, list(self.first.shape)[1:]))
        return f"{where}{size}: {'; '.join(parts)}{'; output' if self.last.is_graph_output() else ''}"


_FEW = 16
"""Largest number of integers that a signature gives by their values."""


def _operand(value: ir.Value | None, numbers: dict[ir.Value, str]) -> str:
    if value is None:
        return "-"
    if value.const_value is None:
        return numbers[value]
    array = value.const_value.numpy()
    # What a node does depends on a target shape, axes or pads.
    if array.dtype.kind in "iu" and array.size <= _FEW:
        return str(array.tolist()).replace(" ", "")
    return "x".join(map(str, array.shape)) or "scalar"


def _attribute(node: ir.Node, name: str) -> str:
    given = node.attributes[name].value
    if isinstance(given, bytes):
        given = given.decode()
    values = list(given) if isinstance(given, tuple | list) else [given]
    if name in _MEANINGLESS and (
        _MEANINGLESS[name] is None or all(value == _MEANINGLESS[name] for value in values)
    ):
        return ""
    return f"{name}={','.join(map(str, values))}"


def _cuts(
    nodes: Sequence[ir.Node], graph: ir.Graph, quantized: Collection[str]
) -> list[tuple[int, ir.Value]]:
    """Cuts, each with the number of nodes before it: the graph's input, quantized tensors, and the graph's output."""
    waiting: dict[ir.Value, int] = {}
    """Number of readers that are still to come, by tensor."""
    for node in nodes:
        for value in node.inputs:
            if value is not None and not constant(value):
                waiting[value] = waiting.get(value, 0) + 1
    for value in graph.outputs:
        waiting[value] = waiting.get(value, 0) + 1
    live = {value for value in graph.inputs if value in waiting}
    found = [(0, graph.inputs[0])]
    for index, node in enumerate(nodes):
        for value in node.inputs:
            if value is not None and value in waiting:
                waiting[value] -= 1
                if not waiting[value]:
                    live.discard(value)
        live.update(value for value in node.outputs if waiting.get(value))
        if len(live) == 1:
            (only,) = live
            if only.name in quantized or (only.is_graph_output() and index + 1 == len(nodes)):
                found.append((index + 1, only))
    return found


def regions(graph: ir.Graph, quantized: Collection[str], layers: Collection[str]) -> Iterator[Region]:
    """Regions of an FP32 graph, of up to `LONGEST` parts; none if its height and width are not fixed.

    Args:
        quantized: names of the tensors that are quantized.
        layers: names of the nodes whose weights are quantized.
    """
    shape = graph.inputs[0].shape
    if shape is None or not all(isinstance(size, int) for size in list(shape)[1:]):
        return
    nodes = list(graph)
    cuts = _cuts(nodes, graph, quantized)
    for begin in range(len(cuts)):
        for end in range(begin + 1, min(begin + LONGEST, len(cuts) - 1) + 1):
            (start, first), (stop, last) = cuts[begin], cuts[end]
            inside = tuple(nodes[start:stop])
            found = tuple(name_of(node) for node in inside if node.name in layers)
            if found and first.shape is not None:
                yield Region(begin, end, first, last, inside, found)


def alone(region: Region, fp32: ir.Model, int8: ir.Model, *, quantized: bool) -> ir.Model:
    """A model of one region, as it is within an INT8 graph: 8-bit tensors with channels last come in and go out.

    So are ONNX Runtime's tensors between layers of 8 bits. An image comes in, and logits go out, in float.

    Args:
        fp32, int8: the whole graphs.
        quantized: whether the region is that of the INT8 graph. Otherwise, it is float between its conversions.

    Raises:
        ValueError: the INT8 graph has no such region, because `finish` rewrote nodes across its borders.
    """
    quantizers = {str(node.name): node for node in int8.graph if node.op_type == "QuantizeLinear"}

    def quantizer(value: ir.Value) -> ir.Node:
        name = f"{value.name}_QuantizeLinear"
        if name not in quantizers:
            raise ValueError(f"{value.name} is not quantized")
        return quantizers[name]

    from_image, to_output = region.first.producer() is None, region.last.is_graph_output()

    def end_of(value: ir.Value, outside: bool) -> str:
        return str(value.name if outside or not quantized else quantizer(value).outputs[0].name)

    source = int8 if quantized else fp32
    graph = ir.convenience.extract(
        source.graph, [end_of(region.first, from_image)], [end_of(region.last, to_output)]
    )
    graph.opset_imports.update(source.graph.opset_imports)
    if not from_image:
        _begin(graph, region.first, quantizer(region.first), quantized=quantized)
    if not to_output:
        _end(graph, region.last, quantizer(region.last), quantized=quantized)
    return ir.Model(graph, ir_version=source.ir_version, producer_name="export-zoo")


def _scale(graph: ir.Graph, like: ir.Node, name: str) -> list[ir.Value]:
    """Scale and zero point of a QuantizeLinear, as constants of another graph."""
    found = []
    for index, value in enumerate(like.inputs[1:]):
        assert value is not None
        assert value.const_value is not None
        found.append(add_constant(graph, f"region_{name}_{index}", np.asarray(value.const_value.numpy())))
    return found


def _begin(graph: ir.Graph, value: ir.Value, like: ir.Node, *, quantized: bool) -> None:
    """Let 8 bits with channels last come in."""
    (old,) = graph.inputs
    shape = list(value.shape or ())
    image = len(shape) == 4
    given = ir.Value(
        name="region_input",
        shape=ir.Shape([shape[0], *shape[2:], shape[1]] if image else shape),
        type=like.outputs[0].type,
    )
    made: list[ir.Node] = []
    last: ir.Value = given
    if image:
        made.append(ir.node("Transpose", [last], {"perm": [0, 3, 1, 2]}, name="region_channels_first"))
        last = made[-1].outputs[0]
    if not quantized:
        made.append(
            ir.node("DequantizeLinear", [last, *_scale(graph, like, "input")], name="region_dequantize")
        )
        last = made[-1].outputs[0]
    for node in made:
        node.outputs[0].name = f"{node.name}_output"
    graph.insert_before(graph[0], made)
    for use in [use for use in old.uses() if use.node not in made]:
        use.node.replace_input_with(use.idx, last)
    graph.inputs[0] = given


def _end(graph: ir.Graph, value: ir.Value, like: ir.Node, *, quantized: bool) -> None:
    """Let 8 bits with channels last go out."""
    (last,) = graph.outputs
    if not quantized:
        node = ir.node("QuantizeLinear", [last, *_scale(graph, like, "output")], name="region_quantize")
        node.outputs[0].name = "region_quantize_output"
        graph.append(node)
        last = node.outputs[0]
    if len(list(value.shape or ())) == 4:
        node = ir.node("Transpose", [last], {"perm": [0, 2, 3, 1]}, name="region_channels_last")
        node.outputs[0].name = "region_output"
        graph.append(node)
        last = node.outputs[0]
    last.type = like.outputs[0].type
    graph.outputs[0] = last
