"""The twin of a precision graph: a float32 graph that shows on a CPU what the FP16 engine computes.

ONNX Runtime's CPU kernels compute FP16 operators in FP32. They round each result once, and not at all between fused
operators, so an overflow of half never shows. In the twin, a pair of casts rounds each half tensor. ONNX Runtime keeps
these casts when graph optimization is off. Infinities then appear where the engine would have them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from export_zoo.base import graph_io
from export_zoo.engines.precision.placement import constant
from export_zoo.engines.precision.rewrites import add_constant, remove_unused_initializers

FLOAT = ir.DataType.FLOAT
REDUCED = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
"""Types of tensors that the twin holds as rounded float32."""


def _rounded(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> None:
    """Round a tensor to a type for all its readers."""
    producer = value.producer()
    assert producer is not None
    uses = list(value.uses())
    down = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{value.name}_twin_half")
    up = ir.node("Cast", [down.outputs[0]], {"to": int(FLOAT)}, name=f"{value.name}_twin_float")
    for node, found in ((down, dtype), (up, FLOAT)):
        node.outputs[0].name = f"{node.name}_output"
        node.outputs[0].dtype = found
        node.outputs[0].shape = value.shape
    graph.insert_after(producer, [down, up])
    for use in uses:
        use.node.replace_input_with(use.idx, up.outputs[0])


def dequantized_constant(node: ir.Node) -> npt.NDArray[np.float32]:
    """Output of a DequantizeLinear of constants, float32, to the bit as ONNX Runtime computes it."""
    integers, scale, *zero_points = (
        value.const_value.numpy()
        for value in node.inputs
        if value is not None and value.const_value is not None
    )
    shape = [1] * integers.ndim
    if scale.ndim > 0:
        shape[node.attributes.get_int("axis", 1)] = -1
    found = integers.astype(np.float32)
    for zero_point in zero_points:
        found -= zero_point.astype(np.float32).reshape(shape)
    found *= scale.astype(np.float32).reshape(shape)
    return found


def write_twin(graph: Path, out: Path, *, dequantized: bool = False) -> Path:
    """Write the twin of a precision graph and return its path: `out`, or `graph` if all its tensors are float32.

    Outputs of DequantizeLinear are not rounded: engines fuse it, and integers times the scale that was chosen for them
    cannot overflow.

    Args:
        dequantized: whether to write weights as the floats that DequantizeLinear makes from them. The file is larger,
            and pays off after a few runs: without graph optimization, each run dequantizes all weights again. Sums
            with constant weights are taken in another order, so that their last bits differ.
    """
    model = graph_io.load(graph)
    if not make_twin(model.graph, dequantized=dequantized):
        return graph
    graph_io.save(model, out)
    return out


def make_twin(graph: ir.Graph, *, dequantized: bool = False, rounding: bool = True) -> bool:
    """Turn a precision graph into its twin, see `write_twin`. False if all its tensors are float32.

    Args:
        rounding: False for computed tensors that are not rounded to half.
    """
    changed = False
    for value in graph.initializers.values():
        if value.dtype in REDUCED and value.const_value is not None:
            array = value.const_value.numpy().astype(np.float32)
            value.const_value = ir.tensor(array, name=value.name)
            value.dtype = FLOAT
            changed = True
    for node in list(graph):
        for output in node.outputs:
            if (dtype := output.dtype) in REDUCED:
                output.dtype = FLOAT
                changed = True
                if rounding and node.op_type != "DequantizeLinear":
                    _rounded(graph, output, dtype)
        if node.op_type == "Cast" and node.attributes.get_int("to", 0) in REDUCED:
            node.attributes["to"] = ir.AttrInt64("to", int(FLOAT))
            changed = True
        if dequantized and node.op_type == "DequantizeLinear" and all(map(constant, node.inputs)):
            weight = add_constant(graph, f"{node.outputs[0].name}_twin", dequantized_constant(node))
            ir.convenience.replace_all_uses_with(node.outputs[0], weight)
            graph.remove(node, safe=True)
            changed = True
    if changed:
        remove_unused_initializers(graph)
    return changed
