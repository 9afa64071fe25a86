"""What the roundings of one layer do to its own output, while all that comes before it is float."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from export_zoo.base import graph_io
from export_zoo.engines.diagnosis.counterparts import Counterparts, nodes_by_name
from export_zoo.engines.diagnosis.layers import PARTS, Layer, measurable
from export_zoo.engines.diagnosis.mixtures import CAST, QUANTIZE, Float32Array, constant_array
from export_zoo.engines.precision.placement import activated, constant
from export_zoo.engines.precision.rewrites import add_constant
from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine

HALF_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Rounding:
    """How a tensor is rounded: a Q/DQ pair, or casts to half and back.

    Attributes:
        scale: of one integer step; 0 for casts.
        low, high: the smallest and the largest value that is left.
    """

    scale: float
    zero_point: int
    signed: bool
    low: float
    high: float

    @classmethod
    def of(cls, quantize: ir.Node) -> Rounding:
        """That of a QuantizeLinear of constants."""
        scale, zero = (constant_array(quantize.inputs[index]) for index in (1, 2))
        assert scale is not None
        assert zero is not None
        step, at = float(scale.reshape(-1)[0]), int(zero.reshape(-1)[0])
        signed = zero.dtype == np.int8
        limits = np.iinfo(np.int8 if signed else np.uint8)
        low, high = ((limit - at) * step for limit in (limits.min, limits.max))
        return cls(step, at, signed, low, high)


HALF = Rounding(0.0, 0, signed=True, low=-HALF_LARGEST, high=HALF_LARGEST)


def roundings(graph: ir.Graph) -> dict[str, Rounding]:
    """How an engine's graph rounds each tensor, by its name."""
    found = {}
    for node in graph:
        name = str(node.name)
        if node.op_type == "QuantizeLinear":
            found[name.removesuffix(QUANTIZE)] = Rounding.of(node)
        elif node.op_type == "Cast" and name.endswith(CAST):
            found.setdefault(name.removesuffix(CAST), HALF)
    return found


def rounding_of(value: ir.Value | None, how: Mapping[str, Rounding]) -> Rounding | None:
    """How the engine rounds a value, or that which it is a view of: rewrites of kernels put views in between."""
    while value is not None:
        if found := how.get(str(value.name)):
            return found
        producer = value.producer()
        view = producer is not None and producer.op_type in ("Transpose", "SpaceToDepth")
        value = producer.inputs[0] if view and producer is not None else None
    return None


@dataclass(frozen=True)
class Local:
    """Powers of a layer's output and of its errors: sums of squares over all values and images.

    Attributes:
        signal: of the output; behind SiLU, GELU or Hardswish, if one of them alone reads it.
        weights: of the error by rounded weights and biases alone.
        clipping: by values of the input and the output that are outside their ranges.
        rounding: by all other roundings of the input and the output.
    """

    signal: float
    weights: float
    clipping: float
    rounding: float


class _Measured:
    """A float graph with sums of squares as further outputs."""

    def __init__(self, counterparts: Counterparts) -> None:
        self.model = counterparts.exact.clone()
        self.graph = self.model.graph
        self.rounded = nodes_by_name(counterparts.rounded.graph)
        self.how = roundings(counterparts.rounded.graph)
        self.count = len(self.graph.outputs)
        self._made = 0

    def node(
        self,
        after: ir.Node,
        op: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
    ) -> ir.Node:
        self._made += 1
        made = ir.node(op, inputs, dict(attributes or {}), domain="", name=f"measured {self._made}")
        made.outputs[0].name = f"{made.name} output"
        made.outputs[0].dtype = ir.DataType.FLOAT
        self.graph.insert_after(after, made)
        return made

    def constant(self, array: npt.NDArray[np.generic]) -> ir.Value:
        self._made += 1
        return add_constant(self.graph, f"measured {self._made}", array)

    def power(self, after: ir.Node, value: ir.Value, other: ir.Value | None = None) -> None:
        """Add the power of a value, or of the difference of two values, to the outputs."""
        if other is not None:
            after = self.node(after, "Sub", [value, other])
            value = after.outputs[0]
        total = self.node(after, "ReduceSumSquare", [value], {"keepdims": 0})
        total.outputs[0].shape = ir.Shape([])
        self.graph.outputs.append(total.outputs[0])

    def clipped(self, after: ir.Node, value: ir.Value, how: Rounding) -> ir.Node:
        limits = [self.constant(np.array(limit, np.float32)) for limit in (how.low, how.high)]
        return self.node(after, "Clip", [value, *limits])

    def rounded_node(self, after: ir.Node, value: ir.Value, how: Rounding) -> ir.Node:
        if not how.scale:
            down = self.node(after, "Cast", [value], {"to": int(ir.DataType.FLOAT16)})
            down.outputs[0].dtype = ir.DataType.FLOAT16
            return self.node(down, "Cast", [down.outputs[0]], {"to": int(ir.DataType.FLOAT)})
        dtype = np.int8 if how.signed else np.uint8
        scale, zero = (
            self.constant(np.array(how.scale, np.float32)),
            self.constant(np.array(how.zero_point, dtype)),
        )
        down = self.node(after, "QuantizeLinear", [value, scale, zero])
        down.outputs[0].dtype = ir.DataType.INT8 if how.signed else ir.DataType.UINT8
        return self.node(down, "DequantizeLinear", [down.outputs[0], scale, zero])

    def layer(self, node: ir.Node) -> None:
        """Add the powers of a layer: signal, and errors by weights, clipped and rounded inputs, and of its output."""
        output, engines = node.outputs[0], self.rounded[str(node.name)]
        weights, clipped, inputs = list(node.inputs), list(node.inputs), list(node.inputs)
        after = node
        for index, value in enumerate(node.inputs):
            stored = constant_array(engines.inputs[index]) if value is not None and constant(value) else None
            if stored is not None and stored.dtype == np.float32:
                weights[index] = self.constant(stored)
            elif (
                value is not None
                and not constant(value)
                and value.dtype == ir.DataType.FLOAT
                and (how := rounding_of(value, self.how)) is not None
            ):
                after = self.clipped(after, value, how)
                clipped[index] = after.outputs[0]
                after = self.rounded_node(after, value, how)
                inputs[index] = after.outputs[0]
        result = output if rounding_of(output, self.how) is not None else activated(output)
        function = _function(result)
        last = node if function is None else function

        def error(after: ir.Node, value: ir.Value, exact: ir.Value) -> None:
            if function is not None:
                after = self.copy(after, function, [value, *function.inputs[1:]])
                value, exact = after.outputs[0], function.outputs[0]
            self.power(after, value, exact)

        self.power(after if function is None else function, last.outputs[0])
        for operands in (weights, clipped, inputs):
            copy = self.copy(last, node, operands)
            error(copy, copy.outputs[0], output)
        producer, how = result.producer(), rounding_of(result, self.how)
        assert producer is not None
        for make in (self.clipped, self.rounded_node):
            after = producer if function is None else function
            made = make(after, result, how) if how is not None else self.node(after, "Identity", [result])
            error(made, made.outputs[0], result)

    def copy(self, after: ir.Node, node: ir.Node, inputs: Sequence[ir.Value | None]) -> ir.Node:
        """Add a node that computes the same of other inputs."""
        self._made += 1
        made = ir.node(
            node.op_type, inputs, node.attributes, domain=node.domain, name=f"measured {self._made}a"
        )
        made.outputs[0].name = f"{made.name} output"
        self.graph.insert_after(after, made)
        return made


_FUNCTIONS = frozenset({"QuickGelu", "Gelu", "HardSwish"})


def _function(value: ir.Value) -> ir.Node | None:
    """The SiLU, GELU or Hardswish that alone reads a value: the value's range ends where these are nearly 0 anyway."""
    found = [use.node for use in value.uses()]
    return found[0] if len(found) == 1 and found[0].op_type in _FUNCTIONS else None


def local_errors(
    counterparts: Counterparts, layers: Sequence[Layer], batches: Iterator[Float32Array]
) -> dict[str, Local]:
    """The local errors of layers, by name, over batches of inputs, float32 [N, C, H, W].

    Weights, clipping and rounding are tried one at a time: their errors add up only nearly to that of all together.
    Layers whose output is not one tensor of floats are left out.
    """
    measured = _Measured(counterparts)
    nodes = nodes_by_name(measured.graph)
    found = {
        layer.name: next(node for part in PARTS if (node := nodes.get(f"{layer.name}{part}")) is not None)
        for layer in layers
    }
    names = [name for name, node in found.items() if measurable(node)]
    for name in names:
        measured.layer(found[name])
    with tempfile.TemporaryDirectory(prefix="export-zoo-") as directory:
        path = Path(directory) / "measured.onnx"
        graph_io.save(measured.model, path)
        engine = OnnxRuntimeEngine(path, fused=False)
    total = np.zeros((len(names), _POWERS))
    for batch in batches:
        powers = engine.run_all(batch)[measured.count :]
        total += np.array([float(power) for power in powers]).reshape(total.shape)
    return dict(zip(names, map(_local, total), strict=True))


_POWERS = 6


def _local(powers: npt.NDArray[np.float64]) -> Local:
    signal, weights, clipped, inputs, clipped_output, output = powers
    return Local(
        float(signal),
        float(weights),
        float(clipped + clipped_output),
        float(max(inputs - clipped, 0.0) + max(output - clipped_output, 0.0)),
    )
