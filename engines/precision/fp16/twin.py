"""The twin of a precision graph: what its FP16 engine computes, as ONNX Runtime's CPU kernels can show it.

Those compute FP16 operators in FP32 and round the result once, or not at all between fused ones, so an overflow of half
never shows. The twin is a float32 graph in which each half tensor is rounded by a pair of casts, which ONNX Runtime
keeps when it does not optimize: infinities appear where the engine would have them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from export_zoo.base import graph_io

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT


def _rounded(graph: ir.Graph, value: ir.Value) -> None:
    """Let all readers of a tensor see it rounded to half."""
    producer = value.producer()
    assert producer is not None
    uses = list(value.uses())
    down = ir.node("Cast", [value], {"to": int(HALF)}, name=f"{value.name}_twin_half")
    up = ir.node("Cast", [down.outputs[0]], {"to": int(FLOAT)}, name=f"{value.name}_twin_float")
    for node, dtype in ((down, HALF), (up, FLOAT)):
        node.outputs[0].name = f"{node.name}_output"
        node.outputs[0].dtype = dtype
        node.outputs[0].shape = value.shape
    graph.insert_after(producer, [down, up])
    for use in uses:
        use.node.replace_input_with(use.idx, up.outputs[0])


def write_twin(graph: Path, out: Path) -> list[Path]:
    """Write the twin of a precision graph and return the files written.

    What DequantizeLinear makes is not rounded: engines fuse it, and integers times a scale cannot overflow where the
    scale was chosen for them. Without FP16 in the graph, the twin is the graph.
    """
    model = graph_io.load(graph)
    for value in model.graph.initializers.values():
        if value.dtype is HALF and value.const_value is not None:
            array = value.const_value.numpy().astype(np.float32)
            value.const_value = ir.tensor(array, name=value.name)
            value.dtype = FLOAT
    for node in list(model.graph):
        for output in node.outputs:
            if output.dtype is HALF:
                output.dtype = FLOAT
                if node.op_type != "DequantizeLinear":
                    _rounded(model.graph, output)
        if node.op_type == "Cast" and node.attributes.get_int("to", 0) == int(HALF):
            node.attributes["to"] = ir.AttrInt64("to", int(FLOAT))
    return graph_io.save(model, out)
