"""Last rewrites of an INT8 graph: operators for which ONNX Runtime's CPU provider has faster or more exact kernels.

The nodes of domain com.microsoft are ONNX Runtime's contrib operators, documented in its ContribOperators.md. All
figures: EfficientNet-B0, one thread, AMD EPYC (AVX512-VNNI), ONNX Runtime 1.31; `benchmarks/cpu_engine.py --models
efficientnet_b0` compares the result with FP32.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from export_zoo.engines.precision.int8.first_conv import block_first_convolution
from export_zoo.engines.precision.placement import activated, is_pointwise, readers, silu_input
from export_zoo.engines.precision.rewrites import add_constant, remove_unused_initializers

CONTRIB = "com.microsoft"


def use_fast_kernels(graph: ir.Graph) -> None:
    """Apply all rewrites of this module, and `block_first_convolution`, to a Q/DQ graph. Logits stay the same.

    Sums of floats are taken in another order.
    """
    block_first_convolution(graph)
    if fuse_silu(graph) + float_outputs_of_pointwise(graph):
        graph.opset_imports[CONTRIB] = 1
    keep_float_layers(graph)
    mean_in_two_steps(graph)
    remove_unused_initializers(graph)


def _take_place(graph: ir.Graph, made: list[ir.Node], old: ir.Node) -> None:
    """Replace a node by others. The output of the last one gets the name, type and readers of the old output."""
    before, after = old.outputs[0], made[-1].outputs[0]
    after.shape, after.type = before.shape, before.type
    for node in made:
        node.metadata_props.update(old.metadata_props)
        if node.outputs[0].name is None:
            node.outputs[0].name = f"{node.name}_output"
    graph.insert_before(old, made)
    ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
    name = before.name
    graph.remove(old, safe=True)
    after.name = name


def _remove_unread(graph: ir.Graph, nodes: Iterable[ir.Node | None]) -> None:
    """Remove those nodes whose output nothing reads any more."""
    for node in nodes:
        if node is not None and not readers(node.outputs[0]):
            graph.remove(node, safe=True)


def fuse_silu(graph: ir.Graph) -> int:
    """Write x * Sigmoid(x) as one QuickGelu. Returns the number of rewritten nodes.

    ONNX Runtime fuses it itself in float graphs, but not behind a DequantizeLinear: it gives each reader a
    DequantizeLinear of its own first, and then does not see that Sigmoid and Mul read the same tensor
    (onnxruntime#27550). The network takes a fifth less time with it.
    """
    count = 0
    for node in list(graph):
        source = silu_input(node)
        if source is None:
            continue
        sigmoids = [value.producer() for value in node.inputs if value is not None and value is not source]
        fused = ir.node("QuickGelu", [source], {"alpha": 1.0}, domain=CONTRIB, name=node.name)
        _take_place(graph, [fused], node)
        _remove_unread(graph, sigmoids)
        count += 1
    return count


def float_outputs_of_pointwise(graph: ir.Graph) -> int:
    """Write `DQ -> Conv` of 1x1 kernels with a float output as MatMulIntegerToFloat. Returns their number.

    QLinearConv has 8-bit outputs only; without a QuantizeLinear behind it, the Conv would be computed in float. The
    Transposes cancel out with those that ONNX Runtime puts around its QLinearConv.
    """
    count = 0
    for node in list(graph):
        weight_dq = _dequantize(node, 1)
        data_dq = _dequantize(node, 0)
        if node.op_type != "Conv" or weight_dq is None or data_dq is None or not is_pointwise(node):
            continue
        if any(reader.op_type == "QuantizeLinear" for reader in readers(activated(node.outputs[0]))):
            continue
        stored, scale = weight_dq.inputs[:2]
        quantized, data_scale, data_zero = data_dq.inputs[:3]
        if stored is None or stored.const_value is None or quantized is None or quantized.shape is None:
            continue
        name = str(node.name)
        integers = stored.const_value.numpy()[:, :, 0, 0].T
        weight = add_constant(graph, f"{name}_product_weight", np.ascontiguousarray(integers))
        zeros = add_constant(graph, f"{name}_product_zero_point", np.zeros(integers.shape[1], integers.dtype))
        operands = [weight, data_scale, scale, data_zero, zeros]
        if (bias := _bias(node)) is not None:
            operands.append(add_constant(graph, f"{name}_product_bias", bias))
        last = ir.node("Transpose", [quantized], {"perm": [0, 2, 3, 1]}, name=f"{name}_channels_last")
        last.outputs[0].name = f"{name}_channels_last_output"
        last.outputs[0].type = quantized.type
        n, c, h, w = quantized.shape
        last.outputs[0].shape = ir.Shape([n, h, w, c])
        product = ir.node(
            "MatMulIntegerToFloat", [last.outputs[0], *operands], domain=CONTRIB, name=f"{name}_product"
        )
        product.outputs[0].name = f"{name}_product_output"
        product.outputs[0].dtype = ir.DataType.FLOAT
        product.outputs[0].shape = ir.Shape([n, h, w, integers.shape[1]])
        first = ir.node("Transpose", [product.outputs[0]], {"perm": [0, 3, 1, 2]}, name=name)
        operands_before = [weight_dq, data_dq, _dequantize(node, 2)]
        _take_place(graph, [last, product, first], node)
        _remove_unread(graph, operands_before)
        count += 1
    return count


def keep_float_layers(graph: ir.Graph) -> int:
    """Write float layers between Q/DQ pairs so that ONNX Runtime leaves them float. Returns their number.

    From 1.21 on it quantizes such weights itself, with one scale for the whole tensor (WeightBiasQuantization,
    onnxruntime#22969): a layer that was to be more exact would be less so. It does this to Conv, Gemm and ConvTranspose
    whose input is dequantized, and whose output is quantized, with no more than Relu and Clip in between.
    """
    count = 0
    for node in list(graph):
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm"):
            continue
        weight = node.inputs[1]
        if _dequantize(node, 0) is None or weight is None or weight.const_value is None:
            continue
        if not any(
            reader.op_type == "QuantizeLinear" for reader in readers(_activated_twice(node.outputs[0]))
        ):
            continue
        if node.op_type == "Conv":  # ONNX Runtime fuses it with its activation as it does a Conv
            fused = ir.node("FusedConv", node.inputs, node.attributes, domain=CONTRIB, name=node.name)
            _take_place(graph, [fused], node)
        else:
            _add_bias_apart(graph, node)
        graph.opset_imports[CONTRIB] = 1
        count += 1
    return count


def _activated_twice(value: ir.Value) -> ir.Value:
    """The last output of a chain of activations without branches."""
    while (after := activated(value)) is not value:
        value = after
    return value


def _add_bias_apart(graph: ir.Graph, node: ir.Node) -> None:
    """Add the bias of a Gemm or ConvTranspose behind it, by a node of its own: one that it has not is 0.

    The Gemm becomes a FusedMatMul, which ONNX Runtime does not fuse with the Add to a Gemm again.
    """
    weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    assert weight is not None
    assert weight.shape is not None
    shape, attributes = weight.shape.numpy(), node.attributes
    array = bias.const_value.numpy() if bias is not None and bias.const_value is not None else None
    if node.op_type == "Gemm":
        transposed = {name: attributes.get_int(name, 0) for name in ("transA", "transB")}
        alpha, beta = (attributes.get_float(name, 1.0) for name in ("alpha", "beta"))
        layer = ir.node(
            "FusedMatMul",
            node.inputs[:2],
            {**transposed, "alpha": alpha},
            domain=CONTRIB,
            name=f"{node.name}_without_bias",
        )
        if array is None:
            array = np.zeros(shape[0 if transposed["transB"] else 1], np.float32)
        array = (array * np.float32(beta)).astype(np.float32)
    else:
        channels = int(shape[1]) * attributes.get_int("group", 1)
        array = np.zeros(channels, np.float32) if array is None else array
        array = array.reshape(1, channels, *[1] * (len(shape) - 2))
        layer = ir.node(node.op_type, node.inputs[:2], attributes, name=f"{node.name}_without_bias")
    added = ir.node(
        "Add", [layer.outputs[0], add_constant(graph, f"{node.name}_bias_apart", array)], name=node.name
    )
    _take_place(graph, [layer, added], node)


def plain_products(graph: ir.Graph) -> int:
    """Write each MatMulIntegerToFloat as Q/DQ pairs and MatMul again. Returns their number."""
    count = 0
    for node in list(graph):
        if node.op_type != "MatMulIntegerToFloat" or node.domain != CONTRIB:
            continue
        last, weight, data_scale, weight_scale, data_zero, weight_zero, *bias = node.inputs
        transpose = last.producer() if last is not None else None
        assert transpose is not None
        name = str(node.name)
        data = ir.node(
            "DequantizeLinear",
            [transpose.inputs[0], data_scale, data_zero],
            name=f"{name}_data_DequantizeLinear",
        )
        data.outputs[0].shape = transpose.outputs[0].shape
        data.outputs[0].dtype = transpose.outputs[0].dtype = ir.DataType.FLOAT
        graph.insert_before(transpose, data)
        transpose.replace_input_with(0, data.outputs[0])
        stored = ir.node(
            "DequantizeLinear",
            [weight, weight_scale, weight_zero],
            {"axis": 1},
            name=f"{name}_weight_DequantizeLinear",
        )
        made = [stored, ir.node("MatMul", [last, stored.outputs[0]], name=name)]
        made[1].outputs[0].name = f"{name}_without_bias"
        if bias:
            made.append(ir.node("Add", [made[-1].outputs[0], bias[0]], name=f"{name}_with_bias"))
        for one in (data, stored):
            one.outputs[0].name = f"{one.name}_output"
        for one in made:
            one.outputs[0].dtype = ir.DataType.FLOAT
        _take_place(graph, made, node)
        count += 1
    return count


def _dequantize(node: ir.Node, index: int) -> ir.Node | None:
    """The DequantizeLinear of an operand."""
    value = node.inputs[index] if index < len(node.inputs) else None
    producer = value.producer() if value is not None else None
    return producer if producer is not None and producer.op_type == "DequantizeLinear" else None


def _bias(node: ir.Node) -> npt.NDArray[np.float32] | None:
    """A layer's bias, float32 [channels]; it may be stored as integers and their scales."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return None
    dequantize = _dequantize(node, 2)
    stored = [value] if dequantize is None else list(dequantize.inputs[:2])
    found: npt.NDArray[np.float64] = np.ones(())
    for part in stored:
        assert part is not None
        assert part.const_value is not None
        found = found * part.const_value.numpy().astype(np.float64)
    return np.asarray(found, dtype=np.float32)


def mean_in_two_steps(graph: ir.Graph) -> int:
    """Write GlobalAveragePool of a float tensor as the mean over rows, then over columns. Returns their number.

    GlobalAveragePool wants channels first, so that ONNX Runtime would transpose a tensor that its QLinearConv writes
    with channels last. A mean over both axes at once has a slow kernel. The two steps save a tenth of the network's
    time at batch 8. Behind a float convolution, the pool is five times as fast: it takes its blocked layout.
    """
    count = 0
    for node in list(graph):
        if node.op_type != "GlobalAveragePool" or _dequantize(node, 0) is not None or _of_float_conv(node):
            continue
        value = node.inputs[0]
        if value is None or value.shape is None or len(value.shape) != 4:
            continue
        made: list[ir.Node] = []
        for axis, what in ((3, "rows"), (2, "columns")):
            axes = add_constant(graph, f"{node.name}_{what}", np.array([axis]))
            mean = ir.node("ReduceMean", [value, axes], {"keepdims": 1}, name=f"{node.name}_of_{what}")
            made.append(mean)
            value = mean.outputs[0]
        source = node.inputs[0]
        assert source is not None
        assert source.shape is not None
        made[0].outputs[0].type = source.type
        made[0].outputs[0].shape = ir.Shape([*list(source.shape)[:3], 1])
        _take_place(graph, made, node)
        count += 1
    return count


def _of_float_conv(node: ir.Node) -> bool:
    """Whether a node reads what a float convolution computes, with operators for each element in between."""
    while (value := node.inputs[0]) is not None and (producer := value.producer()) is not None:
        if producer.op_type in ("Conv", "FusedConv"):
            return _dequantize(producer, 1) is None
        if producer.op_type not in _EACH_ELEMENT:
            return False
        node = producer
    return False


_EACH_ELEMENT = frozenset({"QuickGelu", "Gelu", "HardSwish", "HardSigmoid", "Relu", "Clip", "Mul", "Add"})
