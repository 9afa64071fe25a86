"""Graphs of an engine in which some roundings are left out: any mixture of float and 8 bits, or half.

A rounding is that of a tensor (its Q/DQ pair, or its casts to half and back) or of a constant (a weight or bias).
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from export_zoo.base import graph_io
from export_zoo.base.errors import BadInputError
from export_zoo.engines.diagnosis.counterparts import Counterparts, nodes_by_name
from export_zoo.engines.precision.placement import constant
from export_zoo.engines.precision.rewrites import add_constant, remove_unused_initializers
from export_zoo.engines.precision.twin import dequantized_constant
from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine
from export_zoo.engines.targets.onnxruntime.kernels import keep_float_layers

Float32Array = npt.NDArray[np.float32]

QUANTIZE, CAST = "_QuantizeLinear", "_twin_half"
"""Suffixes of the nodes that round a tensor; what comes before is its name."""
_ROUNDING = frozenset({"QuantizeLinear", "DequantizeLinear", "Cast"})


def pair_of(tensor: str) -> str:
    """Name of the rounding of a tensor by its Q/DQ pair."""
    return f"{tensor} in 8 bits"


def casts_of(tensor: str) -> str:
    """Name of the rounding of a tensor by its casts."""
    return f"{tensor} in half"


def constant_of(node: str, index: int) -> str:
    """Name of the rounding of a node's constant operand."""
    return f"operand {index} of {node}"


def constant_array(value: ir.Value | None) -> npt.NDArray[np.generic] | None:
    """A constant operand, or the one behind its DequantizeLinear; None if it is computed."""
    if value is None:
        return None
    producer = value.producer()
    if (
        producer is not None
        and producer.op_type == "DequantizeLinear"
        and all(map(constant, producer.inputs))
    ):
        return dequantized_constant(producer)
    return value.const_value.numpy() if value.const_value is not None else None


class Mixtures:
    """Writes and opens mixtures of an engine.

    Args:
        integers: whether layers may be computed with integers, as in ONNX Runtime's engines. Otherwise, weights are the
            floats that they stand for, and all is computed in float.

    Attributes:
        roundings: names of all roundings.

    Raises:
        BadInputError: the engine's graph and the float graph do not match.
    """

    def __init__(self, counterparts: Counterparts, *, integers: bool) -> None:
        self._model = counterparts.rounded
        self._integers = integers
        self._exact = self._exact_constants(counterparts)
        self._half = False
        """Whether there are casts, which ONNX Runtime keeps only without graph optimization."""
        tensors = []
        for node in self._model.graph:
            name = str(node.name)
            if node.op_type == "QuantizeLinear":
                tensors.append(pair_of(name.removesuffix(QUANTIZE)))
            elif node.op_type == "Cast" and name.endswith(CAST):
                tensors.append(casts_of(name.removesuffix(CAST)))
                self._half = True
        self.roundings = frozenset([*self._exact, *tensors])

    def _exact_constants(self, counterparts: Counterparts) -> dict[str, npt.NDArray[np.generic]]:
        """Constants of the float graph that the engine's graph has rounded, by the rounding."""
        known, found = nodes_by_name(counterparts.exact.graph), dict[str, npt.NDArray[np.generic]]()
        for node in counterparts.rounded.graph:
            if node.op_type in _ROUNDING:
                continue
            other = known.get(str(node.name))
            if other is None or other.op_type != node.op_type or len(other.inputs) != len(node.inputs):
                raise BadInputError(
                    f"node {node.name!r} of the engine's graph is not that of the FP32 graph",
                    hint="export the bundle again: another version of export-zoo made it",
                )
            for index, (value, wanted) in enumerate(zip(node.inputs, other.inputs, strict=True)):
                have, want = constant_array(value), constant_array(wanted)
                if have is None or want is None or have.dtype != np.float32 or np.array_equal(have, want):
                    continue
                if have.shape != want.shape:
                    raise BadInputError(
                        f"operand {index} of node {node.name!r}: shape {have.shape}, not {want.shape}",
                        hint="export the bundle again: another version of export-zoo made it",
                    )
                found[constant_of(str(node.name), index)] = want
        return found

    def open(self, on: Collection[str], further: Sequence[str] = ()) -> OnnxRuntimeEngine:
        """Open the mixture that has these roundings and no others.

        Args:
            further: names of tensors that become outputs, behind the engine's own.
        """
        model = self._model.clone()
        graph, nodes = model.graph, list(model.graph)
        exact = {str(value.name): value for node in nodes for value in node.outputs}
        for node in nodes:
            for index in range(len(node.inputs)):
                name = constant_of(str(node.name), index)
                if name in self._exact and name not in on:
                    node.replace_input_with(index, add_constant(graph, f"{name} exact", self._exact[name]))
                elif name in self._exact and not self._integers:
                    array = constant_array(node.inputs[index])
                    assert array is not None
                    node.replace_input_with(index, add_constant(graph, f"{name} rounded", array))
            name, source = str(node.name), node.inputs[0] if node.inputs else None
            pair = node.op_type == "QuantizeLinear" and pair_of(name.removesuffix(QUANTIZE)) not in on
            casts = (
                node.op_type == "Cast" and name.endswith(CAST) and casts_of(name.removesuffix(CAST)) not in on
            )
            if (pair or casts) and source is not None:
                for use in list(node.outputs[0].uses()):
                    ir.convenience.replace_all_uses_with(use.node.outputs[0], source)
                    graph.remove(use.node, safe=True)
                graph.remove(node, safe=True)
        for node in nodes:  # pairs of weights that are exact now
            if node.graph is graph and node.op_type == "DequantizeLinear" and not node.outputs[0].uses():
                graph.remove(node, safe=True)
        keep_float_layers(graph)
        remove_unused_initializers(graph)
        graph.outputs.extend(exact[name] for name in further)
        with tempfile.TemporaryDirectory(prefix="export-zoo-") as directory:
            path = Path(directory) / "mixture.onnx"
            graph_io.save(model, path)
            return OnnxRuntimeEngine(path, fused=not self._half)
