"""Graph rewrites that keep the function and use operators for which engines have kernels."""

from __future__ import annotations

import string

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from export_zoo.engines.precision.placement import constant


def average_pool_instead_of_mean(graph: ir.Graph) -> int:
    """Rewrite ReduceMean over height and width as GlobalAveragePool (+ Flatten), which has an int8 kernel.

    Returns the number of rewritten nodes.
    """
    count = 0
    for node in list(graph):
        if node.op_type != "ReduceMean" or len(node.inputs) < 2 or not constant(node.inputs[1]):
            continue
        source, axes = node.inputs[0], node.inputs[1]
        if source is None or source.shape is None or len(source.shape) != 4:
            continue
        assert axes is not None
        assert axes.const_value is not None
        if sorted(int(a) % 4 for a in axes.const_value.numpy().reshape(-1)) != [2, 3]:
            continue
        old = node.outputs[0]
        pool = ir.node(
            "GlobalAveragePool", [source], name=str(node.name), metadata_props=dict(node.metadata_props)
        )
        made = [pool]
        if not node.attributes.get_int("keepdims", 1):
            pool.outputs[0].name = f"{old.name}_pooled"
            made.append(
                ir.node(
                    "Flatten",
                    [pool.outputs[0]],
                    {"axis": 1},
                    name=f"{node.name}_flatten",
                    metadata_props=dict(node.metadata_props),
                )
            )
            pool.outputs[0].dtype = ir.DataType.FLOAT
            pool.outputs[0].shape = ir.Shape([source.shape[0], source.shape[1], 1, 1])
        new = made[-1].outputs[0]
        new.dtype, new.shape = ir.DataType.FLOAT, old.shape
        graph.insert_before(node, made)
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        name = old.name
        graph.remove(node, safe=True)
        new.name = name
        count += 1
    return count


def plain_einsum(graph: ir.Graph) -> int:
    """Rewrite Einsum equations without capital letters and spaces. TensorRT's parser rejects both (maxvit_t).

    Returns the number of rewritten nodes.
    """
    count = 0
    for node in graph:
        equation = node.attributes.get_string("equation", "") if node.op_type == "Einsum" else ""
        if equation == equation.replace(" ", "").lower():
            continue
        free = (letter for letter in string.ascii_lowercase if letter not in equation)
        names = {letter: next(free) for letter in dict.fromkeys(equation) if letter.isupper()}
        plain = "".join(names.get(letter, letter) for letter in equation if letter != " ")
        node.attributes["equation"] = ir.AttrString("equation", plain)
        count += 1
    return count


def own_int8_constants(graph: ir.Graph) -> int:
    """Give each reader of an int8 constant its own copy. Returns the number of copied constants.

    Layers that share a DequantizeLinear get one each: as integer layers, they would share its constants.
    ONNX Runtime's `session.x64quantprecision` refuses graphs in which nodes share an int8 constant.
    """
    for node in list(graph):
        stored = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if stored is not None and constant(stored) and stored.dtype == ir.DataType.INT8:
            for use in list(node.outputs[0].uses())[1:]:
                _give_own(graph, node, use.node, use.idx)
    count = 0
    for value in list(graph.initializers.values()):
        if value.const_value is None or value.const_value.dtype != ir.DataType.INT8:
            continue
        for use in list(value.uses())[1:]:
            name = f"{value.name}_of_{use.node.outputs[0].name}_{use.idx}"
            copy = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
            graph.register_initializer(copy)
            use.node.replace_input_with(use.idx, copy)
            count += 1
    return count


def _give_own(graph: ir.Graph, dequantize: ir.Node, reader: ir.Node, index: int) -> None:
    """Let a node read its own copy of a DequantizeLinear. The copy reads the same constants."""
    read, suffix = dequantize.outputs[0], f"of_{reader.outputs[0].name}_{index}"
    copy = ir.node(
        dequantize.op_type,
        dequantize.inputs,
        dequantize.attributes,
        domain=dequantize.domain,
        name=f"{dequantize.name}_{suffix}",
    )
    output = copy.outputs[0]
    output.name, output.shape, output.type = f"{read.name}_{suffix}", read.shape, read.type
    graph.insert_before(reader, copy)
    reader.replace_input_with(index, output)


def add_constant(graph: ir.Graph, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
    """Add an initializer to a graph and return it."""
    tensor = ir.Tensor(array, name=name)  # ir.tensor asks for the kind of its argument, which is slow
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def remove_unused_initializers(graph: ir.Graph) -> None:
    for name in [n for n, v in graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
        del graph.initializers[name]
