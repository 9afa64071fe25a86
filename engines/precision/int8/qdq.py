"""Write a Q/DQ graph from an FP32 graph, ranges and a placement. The graph itself defines the precision."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from functools import lru_cache, reduce
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from export_zoo.base import graph_io
from export_zoo.base.errors import BadInputError, ExportDefectError, UsageError
from export_zoo.base.machine import one_blas_thread
from export_zoo.calibration.histogram import Histogram
from export_zoo.calibration.methods import METHODS
from export_zoo.calibration.ranges import Ranges, TensorRange
from export_zoo.engines.precision.fp16.half import halve
from export_zoo.engines.precision.int8.int8_weights import blocks_of_rows, quantize_weight, rounded_otherwise
from export_zoo.engines.precision.int8.keep_float import kept_float
from export_zoo.engines.precision.int8.preactivations import activations_behind, least_input
from export_zoo.engines.precision.int8.rules import Int8Rules
from export_zoo.engines.precision.int8.saturation.channel_order import ChannelOrder, choose_order, reorder
from export_zoo.engines.precision.int8.saturation.pairs import (
    IndexArray,
    layers_with_partners,
    saturating_layers,
)
from export_zoo.engines.precision.int8.scales import ActivationScale, activation_scale, symmetric_scale
from export_zoo.engines.precision.placement import (
    LAYOUT,
    Placement,
    QuantizedWeight,
    chooses_indices,
    ends_in_output,
)
from export_zoo.engines.precision.rewrites import add_constant, remove_unused_initializers


def _range_of(method: str, tensors: Mapping[str, TensorRange], symmetric: bool) -> tuple[float, float]:
    """The range that a method chooses for all values of tensors that share a scale.

    Raises:
        BadInputError: a histogram is missing.
    """
    low, high = min(t.min for t in tensors.values()), max(t.max for t in tensors.values())
    if method == "minmax":
        return low, high
    for name, tensor in tensors.items():
        if not tensor.histogram:
            raise BadInputError(
                f"the ranges file has no histogram of tensor {name!r}, which --method {method} needs",
                hint="calibrate again with --precision int8 and the same --keep-float",
            )
    return _searched(method, tuple(tensor.histogram for tensor in tensors.values()), low, high, symmetric)


@lru_cache(maxsize=4096)  # candidates of tuning share most ranges
def _searched(
    method: str, histograms: tuple[str, ...], low: float, high: float, symmetric: bool
) -> tuple[float, float]:
    found = map(Histogram.decode, histograms)
    return METHODS[method](reduce(Histogram.merged, found), low, high, symmetric)


def _dequantize(
    inputs: list[ir.Value], name: str, like: ir.Value, module: str, axis: int | None = None
) -> ir.Node:
    node = ir.node(
        "DequantizeLinear",
        inputs,
        {} if axis is None else {"axis": axis},
        name=name,
        metadata_props={graph_io.MODULE_KEY: module} if module else {},
    )
    node.outputs[0].name = f"{name}_output"
    node.outputs[0].dtype = ir.DataType.FLOAT
    node.outputs[0].shape = like.shape
    return node


class _Quantizer:
    """Applies one placement to one graph."""

    def __init__(
        self,
        graph: ir.Graph,
        placement: Placement,
        ranges: Ranges,
        rules: Int8Rules,
        method: str,
        means: Mapping[str, npt.NDArray[np.float64]],
        rounding: Mapping[str, npt.NDArray[np.int8]],
        clipped: Collection[str],
        partners: Mapping[str, IndexArray],
    ) -> None:
        self.graph = graph
        self.placement = placement
        self.rules = rules
        self.partners = partners
        self.means = means
        self.rounding = rounding
        self.scales = self._scales(ranges, method, clipped)

    def _scales(self, ranges: Ranges, method: str, clipped: Collection[str]) -> dict[str, ActivationScale]:
        scales: dict[str, ActivationScale] = {}
        behind = activations_behind(self.graph)
        for members in self.placement.groups().values():
            missing = [name for name in members if name not in ranges.tensors]
            if missing:
                raise BadInputError(
                    f"the ranges file has no range for tensor {missing[0]!r}",
                    hint="calibrate again: the file was made for another graph",
                )
            tensors = {name: ranges.tensors[name] for name in members}
            chosen = method if tensors.keys().isdisjoint(clipped) else "mse"
            low, high = _range_of(chosen, tensors, self.rules.symmetric)
            if behind.keys() >= set(members):
                low = max(low, min(least_input(behind[name], high) for name in members))
            shared = symmetric_scale(low, high) if self.rules.symmetric else activation_scale(low, high)
            scales.update(dict.fromkeys(members, shared))
        return scales

    def run(self) -> None:
        values = {v.name: v for v in self.graph.inputs}
        for node in self.graph:
            values.update((v.name, v) for v in node.outputs)
        # Weights first: they look up the tensor that feeds a node, and activations insert a DQ between the two.
        for node in list(self.graph):
            if node.name in self.placement.weights:
                self._weight(node, self.placement.weights[str(node.name)])
        for name in self.placement.activations:
            self._activation(values[name])

    def _activation(self, value: ir.Value) -> None:
        name = str(value.name)
        # Readers that only pass the tensor to an output, through layout operators, or that choose the largest value,
        # keep the exact values.
        uses = [
            use
            for use in value.uses()
            if not (use.node.op_type in LAYOUT and ends_in_output(use.node.outputs[0]))
            and not chooses_indices(use.node)
        ]
        scale = self.scales[name]
        producer = value.producer()
        module = graph_io.module_of(producer)
        scale_value = add_constant(self.graph, f"{name}_scale", np.asarray(scale.scale))
        zero = add_constant(self.graph, f"{name}_zero_point", np.asarray(scale.zero_point))
        quantize = ir.node(
            "QuantizeLinear",
            [value, scale_value, zero],
            name=f"{name}_QuantizeLinear",
            metadata_props={graph_io.MODULE_KEY: module} if module else {},
        )
        quantize.outputs[0].name = f"{name}_quantized"
        quantize.outputs[0].dtype = ir.DataType.INT8 if self.rules.symmetric else ir.DataType.UINT8
        quantize.outputs[0].shape = value.shape
        dequantize = _dequantize(
            [quantize.outputs[0], scale_value, zero], f"{name}_DequantizeLinear", value, module
        )
        if producer is None:
            self.graph.insert_before(self.graph[0], [quantize, dequantize])
        else:
            self.graph.insert_after(producer, [quantize, dequantize])
        for use in uses:
            use.node.replace_input_with(use.idx, dequantize.outputs[0])

    def _weight(self, node: ir.Node, rule: QuantizedWeight) -> None:
        source, weight = node.inputs[0], node.inputs[rule.index]
        assert source is not None
        assert weight is not None
        assert weight.const_value is not None
        input_scale = self.scales[str(source.name)].scale
        array = weight.const_value.numpy().astype(np.float32)
        if rule.bias_index is not None and node.name in self.means:
            self._correct_bias(node, rule, array, input_scale)
        with_bias = rule.bias_index is not None and self.rules.int32_bias
        bias = node.inputs[rule.bias_index] if with_bias and rule.bias_index is not None else None
        bias_array = None
        if bias is not None and bias.const_value is not None:
            bias_array = bias.const_value.numpy().astype(np.float32)
        quantized, scales, int_bias = self._quantized(node, rule, array, bias_array, input_scale)
        prefix, module = f"{node.name}_weight", graph_io.module_of(node)
        scale_value = add_constant(self.graph, f"{prefix}_scale", scales)
        zeros = add_constant(self.graph, f"{prefix}_zero_point", np.zeros(scales.shape, dtype=np.int8))
        dequantize = _dequantize(
            [add_constant(self.graph, f"{prefix}_quantized", quantized), scale_value, zeros],
            f"{prefix}_DequantizeLinear",
            weight,
            module,
            axis=rule.axis,
        )
        self.graph.insert_before(node, dequantize)
        node.replace_input_with(rule.index, dequantize.outputs[0])
        if int_bias is not None and bias is not None and rule.bias_index is not None:
            prefix = f"{node.name}_bias"
            unit = add_constant(self.graph, f"{prefix}_scale", (input_scale * scales).astype(np.float32))
            zero = add_constant(self.graph, f"{prefix}_zero_point", np.zeros(scales.shape, dtype=np.int32))
            dequantize = _dequantize(
                [add_constant(self.graph, f"{prefix}_quantized", int_bias), unit, zero],
                f"{prefix}_DequantizeLinear",
                bias,
                module,
                axis=0,
            )
            self.graph.insert_before(node, dequantize)
            node.replace_input_with(rule.bias_index, dequantize.outputs[0])

    def _quantized(
        self,
        node: ir.Node,
        rule: QuantizedWeight,
        weight: npt.NDArray[np.float32],
        bias: npt.NDArray[np.float32] | None,
        input_scale: np.float32,
    ) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32], npt.NDArray[np.int32] | None]:
        partners = self.partners.get(str(node.name))
        quantized, scales, int_bias = quantize_weight(
            weight, rule.axis, bias, input_scale, partners=partners, half=self.rules.half
        )
        if (steps := self.rounding.get(str(node.name))) is not None:
            quantized = rounded_otherwise(quantized, steps, rule.axis, partners)
        return quantized, scales, int_bias

    def _correct_bias(
        self, node: ir.Node, rule: QuantizedWeight, weight: npt.NDArray[np.float32], input_scale: np.float32
    ) -> None:
        """Subtract from the bias what weight rounding adds to the mean of each output channel.

        Nagel et al. 2019 (arXiv 1906.04721), section 4.2, with the mean inputs of calibration images.
        """
        assert rule.bias_index is not None
        value = node.inputs[rule.bias_index]
        assert value is not None
        assert value.const_value is not None
        bias = value.const_value.numpy().astype(np.float32)
        quantized, scales, _ = self._quantized(node, rule, weight, None, input_scale)
        mean = self.means[str(node.name)]
        rows, exact = (np.moveaxis(array, rule.axis, 0) for array in (quantized, weight))
        rows, exact = rows.reshape(len(rows), -1), exact.reshape(len(exact), -1)
        groups = node.attributes.get_int("group", 1) if node.op_type == "Conv" else 1
        means = mean.reshape(groups, -1).repeat(len(rows) // groups, axis=0) if groups > 1 else None
        added = np.empty(len(rows))
        for b in blocks_of_rows(rows):
            error = rows[b] * scales[b].astype(np.float64)[:, None] - exact[b]
            added[b] = error @ mean.ravel() if means is None else (error * means[b]).sum(axis=1)
        corrected = (bias - added).astype(np.float32)
        node.replace_input_with(
            rule.bias_index, add_constant(self.graph, f"{node.name}_bias_corrected", corrected)
        )


def quantize(
    graph: Path,
    ranges: Ranges,
    out: Path,
    *,
    rules: Int8Rules,
    keep_float: Sequence[str] = (),
    method: str = "minmax",
    clipped: Collection[str] = (),
    means: Mapping[str, npt.NDArray[np.float64]] | None = None,
    rounding: Mapping[str, npt.NDArray[np.int8]] | None = None,
    order: ChannelOrder | None = None,
) -> list[Path]:
    """Write the INT8 precision graph of an FP32 graph and return the files written.

    Args:
        rules: the target's rules, `TARGETS[name].int8`.
        keep_float: patterns of layers to leave unquantized, see `int8.keep_float`.
        method: how ranges are chosen, see `calibration.methods`.
        clipped: tensors whose range the method `mse` chooses instead, as for all tensors that share their scale.
        means: mean inputs of layers by node name (see `calibration.layer_inputs`), for bias correction.
        rounding: steps from the nearest integer by node name, see `int8.rounding`.
        order: result of `choose_order` for this graph, if known. Otherwise, it is computed. Only for targets whose
            sums may be taken in 16 bits.

    Raises:
        BadInputError: the ranges are not those of this graph, or nothing in the graph can be quantized.
        UsageError: a pattern of `keep_float` matches nothing, or nothing is left to quantize.
    """
    if ranges.graph_sha256 != graph_io.sha256_of(graph):
        raise BadInputError(
            "the ranges file belongs to another graph (its hash differs)", hint="calibrate again"
        )
    model = graph_io.load(graph)
    kept = kept_float(model.graph, keep_float)
    placement = rules.place(model.graph, kept)
    if kept and not placement.weights:
        raise UsageError(
            f"--keep-float {', '.join(keep_float)}: leaves nothing to quantize", hint="use --precision fp16"
        )
    if not placement.weights:
        raise BadInputError("INT8: no Conv, Gemm or MatMul with constant weights in the graph")
    partners: Mapping[str, IndexArray] = {}
    if rules.sums_in_16_bits:
        order = choose_order(model.graph) if order is None else order
        partners = layers_with_partners(model.graph, order.read, by_pixel=rules.pairs_by_pixel)
    with one_blas_thread():
        _Quantizer(
            model.graph, placement, ranges, rules, method, means or {}, rounding or {}, clipped, partners
        ).run()
    if rules.half:
        halve(model.graph, ranges)
    _finish(model.graph, rules, order)
    saturating = (
        saturating_layers(model.graph, by_pixel=rules.pairs_by_pixel) if rules.sums_in_16_bits else []
    )
    if saturating:
        raise ExportDefectError(
            f"INT8: sums of {saturating[0]} can saturate on CPUs without VNNI", hint="please report it"
        )
    return graph_io.save(model, out)


def _finish(graph: ir.Graph, rules: Int8Rules, order: ChannelOrder | None) -> None:
    """The last steps from a Q/DQ graph to a target's graph. They move constants, and compute with none of them."""
    if rules.sums_in_16_bits and order is not None:
        reorder(graph, order)
    if rules.finish is not None:
        rules.finish(graph)
    remove_unused_initializers(graph)


def float_counterpart(graph: ir.Graph, rules: Int8Rules, kept: Set[str]) -> Placement:
    """Turn an FP32 graph into the float graph that its INT8 graph stands for, and return the placement of both.

    It has the nodes, the channel order and the blocks of the INT8 graph, but no Q/DQ pairs. So values of the two can be
    compared one by one.

    Args:
        kept: names of nodes that the INT8 graph leaves float.
    """
    placement = rules.place(graph, kept)
    order = choose_order(graph) if rules.sums_in_16_bits else None
    layers = {str(node.name): node for node in graph if node.name in placement.weights}
    exact = {name: list(node.inputs) for name, node in layers.items()}
    unit = TensorRange.model_construct(min=-1.0, max=1.0)  # pairs of any scale: they are removed again
    ranges = Ranges.model_construct(tensors=dict.fromkeys(placement.activations, unit))
    _Quantizer(graph, placement, ranges, rules, "minmax", {}, {}, (), {}).run()
    for name, rule in placement.weights.items():
        for index in filter(None, (rule.index, rule.bias_index)):
            value, operand = exact[name][index], layers[name].inputs[index]
            pair = operand.producer() if operand is not None else None
            if pair is None or pair.inputs[1] is None or pair.inputs[1].const_value is None:
                continue  # a bias that stays float
            ones = np.ones(pair.inputs[1].const_value.shape.numpy(), np.float32)
            pair.replace_input_with(0, value)
            pair.replace_input_with(1, add_constant(graph, f"{pair.name}_one", ones))
    _finish(graph, rules, order)
    if rules.plain is not None:
        rules.plain(graph)
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if source is None:
            continue
        pair = source.producer()
        exact_value = source if pair is None else pair.inputs[0]
        assert exact_value is not None
        ir.convenience.replace_all_uses_with(node.outputs[0], exact_value, replace_graph_outputs=True)
        graph.remove(node, safe=True)
    for node in [node for node in graph if node.op_type == "QuantizeLinear"]:
        graph.remove(node, safe=True)
    remove_unused_initializers(graph)
    return placement
