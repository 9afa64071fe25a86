"""Where Q/DQ pairs go for ONNX Runtime on a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Set

import onnx_ir as ir

from export_zoo.engines.precision.int8.rules import Int8Rules
from export_zoo.engines.precision.placement import (
    AVERAGES,
    FLOAT_ACTIVATIONS,
    SAME_SCALE,
    Placement,
    activated,
    chooses_indices,
    constant,
    ends_in_output,
    gate_layers,
    input_of,
    is_pointwise,
    layers_before_indices,
    name_of,
    readers,
    weight_of,
)
from export_zoo.engines.targets.onnxruntime.kernels import plain_products, use_fast_kernels


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
    """Placement for `onnxruntime` (CPU): Q/DQ where its kernels fuse it into QLinearConv, QLinearAdd and the like.

    | operator         | rule                                                                             |
    |------------------|----------------------------------------------------------------------------------|
    | Conv             | input; weight; output after Relu/Clip, otherwise directly                        |
    | 1x1 Conv before  | input; weight: MatMulIntegerToFloat returns float, see                           |
    | SiLU and the like| `kernels.float_outputs_of_pointwise`                                             |
    | Conv of a gate   | nothing: it sees one pixel an image (`placement.gate_layers`)                    |
    | Gemm, MatMul     | input; weight; the output only if a quantized reader needs it                    |
    | Add              | all inputs and the output (after Relu), if every input is quantized              |
    | MaxPool, layout  | in and out share one scale, if the input is quantized and a reader needs it      |
    | MaxPool's indices| if they are read, the layer before stays FP32; also for ArgMax, ArgMin, TopK     |
    | average pooling  | input and output, if the input is quantized                                      |
    | Concat           | inputs and output share one scale, unless a BatchNormalization reads it (DenseNet)|
    | all else, `kept` | FP32, like all tensors with only layout operators between them and the logits    |
    """
    placement = Placement()
    kept = kept | layers_before_indices(graph) | gate_layers(graph)
    groups = _Groups()
    wanted: set[str] = set()

    def want(value: ir.Value, *, needed: bool = False) -> bool:
        """Quantize a tensor for its readers. An output, or a tensor it is a view of, only if a layer reads it too."""
        if constant(value) or value.name is None or (ends_in_output(value) and not needed):
            return False
        if not needed and readers(value) and all(map(chooses_indices, readers(value))):
            return False
        wanted.add(value.name)
        return True

    for node in graph:
        weight = None if node.name in kept else weight_of(node)
        if weight is None:
            continue
        placement.weights[name_of(node)] = weight
        want(input_of(node, 0), needed=True)
        if node.op_type == "Conv" and not _float_output(node):
            want(activated(node.outputs[0]))

    def quantized(values: Iterator[ir.Value]) -> bool:
        return all(value.name in wanted for value in values)

    # Operators without weights follow their neighbours; in graph order one pass settles each chain.
    for node in graph:
        inputs = [value for value in node.inputs if value is not None and not constant(value)]
        output = node.outputs[0]
        if not inputs or not quantized(iter(inputs)) or chooses_indices(node):
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


def _float_output(node: ir.Node) -> bool:
    """Whether all readers of a pointwise Conv compute in float."""
    after = readers(node.outputs[0])
    return is_pointwise(node) and bool(after) and all(reader.op_type in FLOAT_ACTIVATIONS for reader in after)


def _share(groups: _Groups, values: list[ir.Value], quantized: bool) -> None:
    if quantized:
        for value in values[1:]:
            groups.join(str(values[0].name), str(value.name))


def _asked_for(value: ir.Value, wanted: set[str]) -> bool:
    """Whether a reader after any chain of layout operators needs `value` quantized."""
    return value.name in wanted or any(
        node.op_type in SAME_SCALE and _asked_for(node.outputs[0], wanted) for node in readers(value)
    )


INT8_RULES = Int8Rules(
    place_onnxruntime,
    symmetric=False,
    int32_bias=True,
    half=False,
    sums_in_16_bits=True,
    finish=use_fast_kernels,
    plain=plain_products,
)
