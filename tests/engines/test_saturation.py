"""INT8 graphs that cannot saturate: which weights are added in 16 bits, and what real kernels make of them."""

from __future__ import annotations

import json
import platform
import shutil
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, compose, helper, numpy_helper
from support.emulated import emulated_cpu, emulated_engine
from support.ranges import ranges_with
from support.weights import awkward_weights

import export_zoo
from export_zoo.base import graph_io
from export_zoo.base.errors import ExportDefectError, TargetUnavailableError
from export_zoo.base.graph_io import sha256_of
from export_zoo.base.machine import instruction_set
from export_zoo.calibration.preprocess import Preprocess
from export_zoo.calibration.ranges import Ranges, TensorRange
from export_zoo.engines.emulation.engine import Emulated, EmulatedEngine
from export_zoo.engines.precision.int8 import qdq
from export_zoo.engines.precision.int8.first_conv import blocked_weight, blocks_of
from export_zoo.engines.precision.int8.int8_weights import quantize_weight
from export_zoo.engines.precision.int8.qdq import quantize
from export_zoo.engines.precision.int8.saturation.pairs import (
    NONE,
    overflowing,
    partners_of,
    saturating_layers,
    within_pairs,
)
from export_zoo.engines.precision.int8.saturation.probe import EXACT_SESSION, saturates
from export_zoo.engines.precision.int8.saturation.unsigned import unsigned_weights
from export_zoo.engines.precision.int8.scales import TINY
from export_zoo.engines.precision.placement import weight_of
from export_zoo.engines.targets.onnxruntime import engine as onnxruntime_engine
from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine
from export_zoo.engines.targets.registry import TARGETS

PREPROCESS = Preprocess(
    resize_size=8,
    crop_height=8,
    crop_width=8,
    interpolation="bilinear",
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    source="a test",
)
FULL = 2.55
"""The largest value of an input, 255 steps of 0.01."""
x86 = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="the option is of ONNX Runtime for x86-64"
)


# -- layers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer with a weight, and the images [C, H, W] that it gets."""

    op: str
    weight: tuple[int, ...]
    image: tuple[int, int, int]
    attributes: dict[str, Any] = field(default_factory=dict)
    pair: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    """Places in the stored int8 weight of two weights that are added in 16 bits."""

    @property
    def axis(self) -> int:
        """Axis of the output channels."""
        return 0 if self.op == "Conv" or self.attributes.get("transB") else 1


LAYERS = {
    "1x1": Layer("Conv", (8, 16, 1, 1), (16, 8, 8), pair=((5, 2, 0, 0), (5, 3, 0, 0))),
    "3x3": Layer("Conv", (8, 4, 3, 3), (4, 8, 8), {"pads": [1] * 4}, ((5, 2, 1, 0), (5, 3, 1, 0))),
    "odd channels": Layer("Conv", (8, 3, 3, 3), (3, 8, 8), {"pads": [1] * 4}, ((5, 2, 0, 2), (5, 0, 1, 0))),
    "grouped": Layer("Conv", (8, 3, 3, 3), (6, 8, 8), {"group": 2}, ((5, 2, 0, 0), (5, 0, 0, 1))),
    "two of each": Layer("Conv", (8, 1, 3, 3), (4, 8, 8), {"group": 4}, ((5, 0, 0, 2), (5, 0, 1, 0))),
    "depthwise": Layer("Conv", (8, 1, 3, 3), (8, 8, 8), {"group": 8}),
    "blocked": Layer(
        "Conv",
        (8, 3, 3, 3),
        (3, 8, 8),
        {"pads": [1] * 4, "strides": [2, 2]},
        ((5, 10, 0, 0), (5, 11, 0, 0)),  # of [8, 12, 2, 2]
    ),
    "gemm": Layer("Gemm", (49, 6), (1, 7, 7), pair=((46, 5), (47, 5))),
    "gemm transposed": Layer("Gemm", (6, 64), (1, 8, 8), {"transB": 1}, ((5, 62), (5, 63))),
    "matmul": Layer("MatMul", (49, 6), (1, 7, 7), pair=((46, 5), (47, 5))),
}
PAIRED = [kind for kind in LAYERS if kind != "depthwise"]


def fp32_graph(path: Path, layer: Layer, weight: np.ndarray) -> Path:
    """Input -> the layer, called `layer` -> logits. The output of a convolution is quantized, too."""
    if layer.op == "Conv":
        nodes = [
            helper.make_node("Conv", ["input", "w"], ["conv"], name="layer", **layer.attributes),
            helper.make_node("Relu", ["conv"], ["relu"], name="relu"),
            helper.make_node("Neg", ["relu"], ["logits"], name="neg"),
        ]
    else:
        nodes = [
            helper.make_node("Flatten", ["input"], ["flat"], name="flatten"),
            helper.make_node(layer.op, ["flat", "w"], ["logits"], name="layer", **layer.attributes),
        ]
    return write(path, nodes, {"w": weight}, layer.image)


def write(
    path: Path, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], image: tuple[int, ...]
) -> Path:
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", *image])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model, strict_mode=True), path)
    return path


def ranges_of(graph: Path, **known: float) -> Ranges:
    """0 to FULL of all tensors but those that are known to reach further."""
    return ranges_with(
        graph,
        PREPROCESS,
        {
            name: TensorRange(min=0.0, max=known.get(name, FULL))
            for name in ("input", "flat", "relu", "hidden")
        },
    )


def large_weights(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Weights whose filters have many neighbours that overflow, most of them positive."""
    rng = np.random.default_rng(seed)
    signs = np.where(rng.random(shape) < 0.8, 1.0, -1.0)
    return (signs * rng.uniform(0.6, 1.0, size=shape)).astype(np.float32)


def weights_at_the_limit(layer: Layer, seed: int = 0) -> np.ndarray:
    """Weights 1, 127, 127, 1 of 127 and so on, in the order in which the kernel reads them: pairs come to 128.

    Both of a pair have one sign. If others were the pairs, 127 + 127 would overflow.
    """
    if layer.op != "Conv":
        order = np.arange(layer.weight[1 - layer.axis])
    else:
        places = np.arange(np.prod(layer.weight[1:])).reshape(1, *layer.weight[1:])
        if layer is LAYERS["blocked"]:
            places = blocked_weight(places + 1, (1, 1)) - 1
        order = np.moveaxis(places, 1, 3).ravel()
    outputs = layer.weight[layer.axis]
    pairs = (len(order) + 1) // 2
    signs = np.where(np.random.default_rng(seed).random((outputs, pairs)) < 0.8, 1, -1).repeat(2, axis=1)
    read = signs[:, : len(order)] * np.where(np.isin(np.arange(len(order)) % 4, (1, 2)), 1.0, 1 / 127)
    rows = np.zeros((outputs, order.max() + 1))
    rows[:, order[order >= 0]] = read[:, order >= 0]
    weight = rows.reshape(layer.weight) if layer.axis == 0 else rows.T
    return np.ascontiguousarray(weight, dtype=np.float32)


def int8_graph(path: Path, layer: Layer, *, safe: bool, weight: np.ndarray | None = None) -> Path:
    """The layer as INT8, with large weights unless others are given; not safe: as earlier versions wrote it."""
    weight = large_weights(layer.weight) if weight is None else weight
    graph = fp32_graph(path.with_suffix(".fp32.onnx"), layer, weight)
    largest = FULL * float(np.maximum(weight, 0).sum() / weight.shape[layer.axis])  # few sums are larger
    known = ranges_of(graph, relu=largest)
    if safe:
        quantize(graph, known, path, rules=TARGETS["onnxruntime"].int8)
    else:
        quantize_as_before(graph, known, path)
    return path


def quantize_as_before(graph: Path, ranges: Ranges, path: Path) -> None:
    """`quantize` of versions that did not know of saturation."""
    quantize(graph, ranges, path, rules=replace(TARGETS["onnxruntime"].int8, sums_in_16_bits=False))


def constants_of(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


# -- partners --------------------------------------------------------------------------------------------------

NAMED = {
    # Weight [O, C, kH, kW], group, strides, pads; then pairs of a filter as (channel, row, column).
    "1x1": ((2, 4, 1, 1), 1, [1, 1], [0] * 4, "000+100 200+300"),
    "1x1 with odd channels": ((2, 5, 1, 1), 1, [1, 1], [0] * 4, "000+100 200+300"),
    "3x3 with 4 channels": (
        (2, 4, 3, 3),
        1,
        [1, 1],
        [1] * 4,
        " ".join(f"0{h}{w}+1{h}{w} 2{h}{w}+3{h}{w}" for h in range(3) for w in range(3)),
    ),
    "odd channels: pairs cross pixels": (
        (2, 3, 2, 2),
        1,
        [1, 1],
        [0] * 4,
        "000+100 200+001 101+201 010+110 210+011 111+211",
    ),
    "odd number of weights: the last is alone": ((2, 1, 3, 3), 1, [1, 1], [0] * 4, "000+001 002+010 011+012 020+021"),
    "groups: each on its own": ((4, 3, 1, 1), 2, [1, 1], [0] * 4, "000+100"),
    "groups of odd channels: pairs cross pixels": ((4, 3, 1, 2), 2, [1, 1], [0] * 4, "000+100 200+001 101+201"),
    "depthwise: none": ((4, 1, 3, 3), 4, [1, 1], [0] * 4, ""),
    "two filters of each channel: taps": ((8, 1, 3, 3), 4, [1, 1], [0] * 4, "000+001 002+010 011+012 020+021"),
    # Blocks of 2x2 pixels from (-1, -1) on; in the left and in the upper ones there are pixels that have no weight.
    "blocked": (
        (2, 3, 3, 3),
        1,
        [2, 2],
        [1] * 4,
        "100+200 001+101 201+002 102+202 110+210 120+220 011+111 211+012 112+212 021+121 221+022 122+222",
    ),
    "blocked, without padding": (
        (2, 3, 2, 2),
        1,
        [2, 2],
        [0] * 4,
        "000+100 200+001 101+201 010+110 210+011 111+211",
    ),
    "four channels are not blocked": ((2, 4, 1, 2), 1, [2, 2], [0] * 4, "000+100 200+300 001+101 201+301"),
}  # fmt: skip


def partners_in(path: Path) -> np.ndarray:
    graph = graph_io.load(path).graph
    node = next(node for node in graph if node.name == "layer")
    rule = weight_of(node)
    assert rule is not None
    return partners_of(graph, node, rule)


def pairs_of(partners: np.ndarray) -> set[tuple[int, ...]]:
    """Pairs, after a check that each one's partner is the other."""
    for index, partner in enumerate(partners):
        assert partner == NONE or (partner != index and partners[partner] == index)
    return {tuple(sorted((index, int(p)))) for index, p in enumerate(partners) if p != NONE}


def test_pairs_of_an_odd_number_of_channels_may_end_at_each_pixel():
    """OpenVINO's do; ONNX Runtime's go on at the next pixel of the kernel."""
    weight = ir.Value(
        name="w", shape=ir.Shape([1, 3, 1, 2]), const_value=ir.tensor(np.zeros((1, 3, 1, 2), np.float32))
    )
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
    layer = ir.node("Conv", [x, weight], name="layer")
    graph = ir.Graph([x], [layer.outputs[0]], nodes=[layer], initializers=[weight], name="g")
    rule = weight_of(layer)
    # Stored as [channel, column]: channel c of column k is element 2 c + k.
    assert pairs_of(partners_of(graph, layer, rule)) == {(0, 2), (1, 4), (3, 5)}
    assert pairs_of(partners_of(graph, layer, rule, by_pixel=True)) == {(0, 2), (1, 3)}


@pytest.mark.parametrize(
    ("weight", "group", "strides", "pads", "named"), list(NAMED.values()), ids=list(NAMED)
)
def test_partners_of_a_convolution_are_neighbours_by_row_column_and_channel(
    weight, group, strides, pads, named, tmp_path
):
    layer = Layer(
        "Conv", weight, (weight[1] * group, 8, 8), {"group": group, "strides": strides, "pads": pads}
    )
    path = fp32_graph(tmp_path / "graph.onnx", layer, large_weights(weight))
    flat = [
        [np.ravel_multi_index([int(d) for d in w], weight[1:]) for w in p.split("+")] for p in named.split()
    ]
    found = partners_in(path)
    assert len(found) == np.prod(weight[1:])
    assert pairs_of(found) == {tuple(sorted(map(int, pair))) for pair in flat}


@pytest.mark.parametrize("kind", ["gemm", "gemm transposed", "matmul"])
def test_partners_of_a_dense_layer_are_neighbouring_inputs(kind, tmp_path):
    layer = LAYERS[kind]
    inputs = layer.weight[1 - layer.axis]
    found = partners_in(fp32_graph(tmp_path / "graph.onnx", layer, large_weights(layer.weight)))
    assert pairs_of(found) == {(i, i + 1) for i in range(0, inputs - 1, 2)}
    assert len(found) == inputs
    assert (found[-1] == NONE) == bool(inputs % 2)


def test_a_stride_2_convolution_that_is_not_the_first_is_not_blocked(tmp_path):
    weight = np.ones((3, 3, 3, 3), np.float32)
    blocked = {"pads": [1] * 4, "strides": [2, 2]}
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["hidden"], name="first", **blocked),
        helper.make_node("Conv", ["hidden", "w"], ["logits"], name="layer", **blocked),
    ]
    path = write(tmp_path / "graph.onnx", nodes, {"w": weight}, (3, 8, 8))
    blocks = blocks_of(graph_io.load(path).graph)
    assert blocks is not None
    assert blocks.conv.name == "first"
    order = np.arange(27).reshape(3, 3, 3).transpose(1, 2, 0).ravel()
    assert pairs_of(partners_in(path)) == {tuple(sorted(map(int, p))) for p in order[:-1].reshape(-1, 2)}


# -- graphs by quantize ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PAIRED)
def test_quantized_layer_cannot_saturate_and_one_pair_of_127_and_2_is_found(kind, tmp_path):
    layer, path = LAYERS[kind], int8_graph(tmp_path / "int8.onnx", LAYERS[kind], safe=True)
    assert saturating_layers(graph_io.load(path).graph) == []
    model = onnx.load(path)
    (stored,) = (t for t in model.graph.initializer if t.name.startswith("layer_weight_quantized"))
    weight = numpy_helper.to_array(stored).copy()
    assert weight.dtype == np.int8
    assert ("blocked" in stored.name) == (kind == "blocked")

    def layers_with(first: int, second: int) -> list[str]:
        assert layer.pair is not None
        weight[layer.pair[0]], weight[layer.pair[1]] = first, second
        stored.CopyFrom(numpy_helper.from_array(weight, stored.name))
        onnx.save(model, path)
        return saturating_layers(graph_io.load(path).graph)

    for sign in (1, -1):
        assert layers_with(sign * 127, sign * 1) == []
        assert layers_with(sign * 127, sign * 2) == ["layer"]
    assert layers_with(-127, 127) == []
    assert layers_with(0, 0) == []


def test_a_product_with_float_outputs_is_found():
    """The product is one that `float_outputs_of_pointwise` writes: rows 2j and 2j + 1 are added in 16 bits."""
    weight = np.array([[127, 127], [1, 2], [1, 1], [127, -127]], dtype=np.int8)
    for columns, expected in (([0], []), ([1], ["product"]), ([0, 1], ["product"])):
        x = ir.Value(name="x", type=ir.TensorType(ir.DataType.UINT8))
        stored = ir.Value(name="w", const_value=ir.tensor(np.ascontiguousarray(weight[:, columns])))
        stored.dtype = ir.DataType.INT8
        node = ir.node("MatMulIntegerToFloat", [x, stored], domain="com.microsoft", name="product")
        graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[stored])
        assert saturating_layers(graph) == expected


@pytest.mark.parametrize("kind", LAYERS)
def test_quantized_layer_of_earlier_versions_is_found_unless_it_is_depthwise(kind, tmp_path):
    path = int8_graph(tmp_path / "int8.onnx", LAYERS[kind], safe=False)
    assert saturating_layers(graph_io.load(path).graph) == ([] if kind == "depthwise" else ["layer"])


def test_a_graph_that_can_saturate_is_not_written(tmp_path, monkeypatch):
    """As if a rule of pairs were forgotten: what is checked is the finished graph."""
    monkeypatch.setattr(qdq, "layers_with_partners", lambda *_, **__: {})
    with pytest.raises(ExportDefectError, match="sums of layer can saturate"):
        int8_graph(tmp_path / "int8.onnx", LAYERS["3x3"], safe=True)
    assert not (tmp_path / "int8.onnx").exists()


@pytest.mark.parametrize("kind", LAYERS)
def test_pairs_that_come_to_128_and_neighbours_that_are_no_pairs_are_left_as_they_are(kind, tmp_path):
    layer = LAYERS[kind]
    weight = weights_at_the_limit(layer)
    safe, before = (
        constants_of(int8_graph(tmp_path / f"{safe}.onnx", layer, safe=safe, weight=weight))
        for safe in (True, False)
    )
    assert safe.keys() == before.keys()
    assert all(np.array_equal(safe[name], before[name]) for name in safe)
    (stored,) = (array for name, array in safe.items() if name.startswith("layer_weight_quantized"))
    assert np.abs(stored.astype(int)).max() == 127


def test_depthwise_weights_keep_all_of_their_bits(tmp_path):
    layer = LAYERS["depthwise"]
    safe, before = (
        constants_of(int8_graph(tmp_path / f"{safe}.onnx", layer, safe=safe)) for safe in (True, False)
    )
    assert safe.keys() == before.keys()
    assert all(np.array_equal(safe[name], before[name]) for name in safe)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(-127, 127), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_pairs_that_overflow_come_to_128_and_all_others_stay(row, random):
    order = list(range(len(row)))
    random.shuffle(order)
    partners = np.full(len(row), NONE)
    for first, second in zip(order[0::2], order[1::2], strict=False):
        if random.random() < 0.8:
            partners[first], partners[second] = second, first
    before = np.array([row], dtype=np.float64)
    after = within_pairs(before, partners)
    assert not overflowing(after, partners).any()
    assert np.array_equal(after, np.rint(after))
    assert (np.abs(after) <= np.abs(before)).all()
    assert (after * before >= 0).all(), "a sign changed"
    for index, partner in enumerate(partners):
        total = before[0, index] + before[0, partner]
        if partner == NONE or abs(total) <= 128:
            assert after[0, index] == before[0, index]
        else:
            assert after[0, index] + after[0, partner] == np.sign(total) * 128
            lost = np.abs(before - after)[0]
            assert abs(lost[index] - lost[partner]) <= 1, "both lose half"
    assert np.array_equal(before, [row]), "the argument was changed"


# -- scales ----------------------------------------------------------------------------------------------------


def neighbours(size: int) -> np.ndarray:
    """Partners 2j and 2j + 1; the last of an odd number is alone."""
    partners = np.arange(size) ^ 1
    partners[partners >= size] = NONE
    return partners


def rows_of(array: np.ndarray, axis: int) -> np.ndarray:
    channels = np.moveaxis(array, axis, 0)
    return channels.reshape(len(channels), -1)


@pytest.mark.parametrize("block", range(4))
def test_weights_with_partners_keep_their_bounds_whatever_the_numbers(block):
    changed = 0
    for seed in range(100 * block, 100 * block + 100):
        weight, axis, bias, input_scale = awkward_weights(seed)
        partners = neighbours(rows_of(weight, axis).shape[1])
        plain, plain_scale, _ = quantize_weight(weight, axis, bias, input_scale)
        found, scale, integers = quantize_weight(weight, axis, bias, input_scale, partners=partners)
        assert (found.dtype, scale.dtype, found.shape) == (np.int8, np.float32, weight.shape)
        assert not overflowing(rows_of(found, axis), partners).any(), seed
        assert np.abs(found.astype(int)).max() <= 127
        assert np.isfinite(scale).all()
        assert np.abs(integers.astype(np.int64)).max() <= 2**30 * (1 + 2**-22)
        # Twice the scale is enough for any filter, and less than the plain one is never of use.
        assert (scale >= plain_scale).all(), seed
        assert (scale <= 2.0001 * plain_scale).all(), seed
        fine = ~(
            overflowing(rows_of(plain, axis), partners) | overflow_before_rounding(weight, axis, partners)
        )
        assert np.array_equal(scale[fine], plain_scale[fine])
        assert np.array_equal(rows_of(found, axis)[fine], rows_of(plain, axis)[fine])
        changed += int((~fine).sum())
    assert changed > 20


def overflow_before_rounding(weight: np.ndarray, axis: int, partners: np.ndarray) -> np.ndarray:
    """Whether a filter, unrounded, has neighbours of more than 128 steps together, or nearly: bool [channels]."""
    rows = rows_of(weight, axis).astype(np.float64)
    scaled = rows / np.maximum(np.abs(rows).max(axis=1, keepdims=True) / 127, TINY)
    together = np.where(partners != NONE, np.abs(scaled + scaled[:, partners]), 0)
    return (together > 127.999).any(axis=1)


def squared_error(quantized: np.ndarray, scale: np.ndarray, weight: np.ndarray) -> np.ndarray:
    difference = quantized.astype(np.float64) * scale.astype(np.float64)[:, None] - weight
    return (difference**2).sum(axis=1)


def test_the_scale_of_a_filter_with_two_equal_largest_partners_is_raised_where_that_loses_less():
    # Raised by two, the first filter is all but exact. The second has many small weights that a larger scale makes
    # coarser, and little to lose in its one pair: its scale stays.
    weight = np.zeros((2, 400), np.float32)
    weight[0, :2] = 1.0
    weight[1] = np.random.default_rng(0).uniform(-0.4, 0.4, 400)
    weight[1, :2] = 1.0, 0.02
    partners = neighbours(400)
    found, scale, _ = quantize_weight(weight, 0, None, np.float32(1), partners=partners)
    plain, base, _ = quantize_weight(weight, 0, None, np.float32(1))
    assert overflowing(plain, partners).tolist() == [True, True]
    lost = squared_error(within_pairs(plain.astype(np.float64), partners), base, weight)
    kept = squared_error(found, scale, weight)
    assert found[0, :2].tolist() == [64, 64]
    assert kept[0] < lost[0] / 1000
    assert scale[0] > 1.9 * base[0]
    assert scale[1] == base[1]
    assert kept[1] == lost[1]


@pytest.mark.parametrize("seed", range(5))
def test_raised_scales_lose_far_less_than_cut_pairs_and_in_no_filter_noticeably_more(seed):
    """Scales are chosen by the error to be expected, so in single filters the real one may be a little larger."""
    rng = np.random.default_rng(seed)
    weight = rng.laplace(size=(200, 36)).astype(np.float32)
    weight[:100] = np.abs(weight[:100])
    partners = neighbours(36)
    plain, base, _ = quantize_weight(weight, 0, None, np.float32(1))
    lost = squared_error(within_pairs(plain.astype(np.float64), partners), base, weight)
    found, scale, _ = quantize_weight(weight, 0, None, np.float32(1), partners=partners)
    kept = squared_error(found, scale, weight)
    bad = overflowing(plain, partners)
    assert bad.sum() > 100
    rounding = 36 * base.astype(np.float64) ** 2 / 12  # what rounding costs a filter
    assert (kept <= lost + 0.5 * rounding).all()
    assert kept[bad].sum() < 0.02 * lost[bad].sum()


# -- real kernels ----------------------------------------------------------------------------------------------

BATCHES = {
    "255": np.full((2, 16, 8, 8), FULL, np.float32),
    "random": np.random.default_rng(7).uniform(0, FULL, (4, 16, 8, 8)).astype(np.float32),
    "most": (FULL * np.random.default_rng(8).uniform(0.8, 1, (4, 16, 8, 8))).astype(np.float32),
}


def together(path: Path, graphs: dict[str, tuple[Path, tuple[int, ...]]]) -> Path:
    """One graph of many. Each reads its part [C, H, W] of one input [batch, 16, 8, 8], and has an output of its own."""
    nodes, outputs, tensors = [], [], [numpy_helper.from_array(np.array([0, 0, 0]), "zeros")]
    tensors.append(numpy_helper.from_array(np.array([1, 2, 3]), "axes"))
    for name, (graph, image) in graphs.items():
        one = compose.add_prefix(onnx.load(graph), f"{name}/").graph
        tensors += [*one.initializer, numpy_helper.from_array(np.array(image), f"{name}/ends")]
        part = helper.make_node("Slice", ["input", "zeros", f"{name}/ends", "axes"], [f"{name}/input"])
        nodes += [part, *one.node]
        outputs += one.output
    source = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 16, 8, 8])
    model = helper.make_model(
        helper.make_graph(nodes, "main", [source], outputs, tensors),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.save(model, path)
    return path


Outputs = dict[str, list[np.ndarray]]


@dataclass(frozen=True)
class Runs:
    """Outputs of all layers, by their names in `every_layer`, for each of BATCHES."""

    plain: Outputs
    exact: Outputs
    emulated: dict[str, Emulated] = field(default_factory=dict)


@pytest.fixture(scope="module")
def every_layer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """All layers in one graph.

    `safe/KIND` has large weights, `limit/KIND` has `weights_at_the_limit`; `before/KIND` is what earlier versions made
    of large weights.
    """
    folder = tmp_path_factory.mktemp("layers")
    graphs = {}
    for kind, layer in LAYERS.items():
        limit = weights_at_the_limit(layer)
        made = {
            "safe": int8_graph(folder / f"safe {kind}.onnx", layer, safe=True),
            "limit": int8_graph(folder / f"limit {kind}.onnx", layer, safe=True, weight=limit),
            "before": int8_graph(folder / f"before {kind}.onnx", layer, safe=False),
        }
        graphs |= {f"{name}/{kind}": (path, layer.image) for name, path in made.items()}
    return together(folder / "all.onnx", graphs), list(graphs)


def outputs_of(engine: EmulatedEngine | OnnxRuntimeEngine, names: list[str]) -> Outputs:
    found = [engine.run_all(batch) for batch in BATCHES.values()]
    return {name: [outputs[i] for outputs in found] for i, name in enumerate(names)}


@pytest.fixture(scope="module", params=["haswell", "here"])
def saturating(request: pytest.FixtureRequest, every_layer: tuple[Path, list[str]]) -> Runs:
    """All layers on a CPU that saturates, without the option and with it."""
    graph, names = every_layer
    if request.param == "here":
        if not saturates():
            pytest.skip("this CPU does not saturate")
        plain, exact = (OnnxRuntimeEngine(graph, saturating_session=s) for s in ({}, EXACT_SESSION))
        return Runs(outputs_of(plain, names), outputs_of(exact, names))
    cpu, runs, emulated = emulated_cpu("haswell"), [], {}
    for session in ({}, EXACT_SESSION):
        with emulated_engine(graph, cpu, saturating_session=session) as engine:
            runs.append(outputs_of(engine, names))
            emulated["exact" if session else "plain"] = engine.emulated
    return Runs(*runs, emulated)


@pytest.fixture(scope="module")
def nehalem(every_layer: tuple[Path, list[str]]) -> tuple[Outputs, Emulated]:
    """All layers on a CPU that does not saturate."""
    graph, names = every_layer
    with emulated_engine(graph, emulated_cpu("nehalem")) as engine:
        return outputs_of(engine, names), engine.emulated


@pytest.fixture(scope="module")
def here(every_layer: tuple[Path, list[str]]) -> Outputs:
    """All layers on this CPU, with the option if it saturates."""
    graph, names = every_layer
    return outputs_of(OnnxRuntimeEngine(graph, saturating_session=EXACT_SESSION), names)


def same(one: list[np.ndarray], other: list[np.ndarray]) -> list[bool]:
    return [np.array_equal(a, b) for a, b in zip(one, other, strict=True)]


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_by_quantize_give_the_same_with_and_without_the_option_where_kernels_saturate(
    kind, saturating
):
    plain, exact = saturating.plain[f"safe/{kind}"], saturating.exact[f"safe/{kind}"]
    assert all(same(plain, exact))
    assert all(np.ptp(output) > 0 for output in plain[1:]), "an output that is all alike shows nothing"


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_of_earlier_versions_are_wrong_without_the_option_where_kernels_saturate(kind, saturating):
    """The red test of the one before; depthwise convolutions never saturate."""
    plain, exact = saturating.plain[f"before/{kind}"], saturating.exact[f"before/{kind}"]
    assert same(plain, exact) == [kind == "depthwise"] * len(BATCHES)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("made", ["safe", "limit", "before"])
def test_the_option_gives_what_a_cpu_that_does_not_saturate_gives(kind, made, saturating, nehalem):
    assert all(same(saturating.exact[f"{made}/{kind}"], nehalem[0][f"{made}/{kind}"]))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("made", ["safe", "limit", "before"])
def test_this_cpu_gives_what_a_cpu_that_does_not_saturate_gives(kind, made, here, nehalem):
    """Whatever it is: earlier versions' graphs get the option where it is needed."""
    assert all(same(here[f"{made}/{kind}"], nehalem[0][f"{made}/{kind}"]))


@pytest.mark.parametrize("saturating", ["haswell"], indirect=True)
def test_haswell_saturates_and_its_session_gets_the_option_that_was_given(saturating):
    plain, exact = saturating.emulated["plain"], saturating.emulated["exact"]
    assert plain.saturates
    assert exact.saturates
    assert plain.session_config == {}
    assert exact.session_config == dict(EXACT_SESSION)


def test_nehalem_does_not_saturate_and_its_session_gets_no_option(nehalem):
    assert not nehalem[1].saturates
    assert nehalem[1].session_config == {}


@pytest.mark.parametrize("saturating", ["haswell"], indirect=True)
def test_instruction_set_is_the_emulated_cpus_not_the_hosts(saturating, nehalem):
    assert {found.instruction_set for found in saturating.emulated.values()} == {"avx2"}
    assert nehalem[1].instruction_set == "x86_64"


def test_instruction_set_here_is_that_of_a_machine_that_saturates_only_without_vnni():
    if saturates():
        assert instruction_set() in ("avx2", "avx512")
    else:
        assert instruction_set() != "avx2"


# -- sessions --------------------------------------------------------------------------------------------------


def optimized(monkeypatch: pytest.MonkeyPatch, graph: Path, **options: Any) -> onnx.ModelProto:
    """The graph as ONNX Runtime optimizes it in the session of an engine."""
    path, opened = graph.with_suffix(".optimized.onnx"), onnxruntime_engine._session

    def session(graph: Path, session_options: ort.SessionOptions, disabled: list[str]):
        session_options.optimized_model_filepath = str(path)
        return opened(graph, session_options, disabled)

    monkeypatch.setattr(onnxruntime_engine, "_session", session)
    OnnxRuntimeEngine(graph, **options)
    return onnx.load(path)


def weight_types(model: onnx.ModelProto) -> set[np.dtype]:
    """Types of the weights of integer layers."""
    index = {"QLinearConv": 3, "QGemm": 3, "MatMulIntegerToFloat": 1}
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return {constants[n.input[index[n.op_type]]].dtype for n in model.graph.node if n.op_type in index}


@pytest.mark.parametrize("kind", LAYERS)
def test_our_graphs_keep_int8_weights_in_onnx_runtime(kind, tmp_path, monkeypatch):
    """Where there is VNNI int8 weights are what is fast."""
    path = int8_graph(tmp_path / "int8.onnx", LAYERS[kind], safe=True)
    assert weight_types(optimized(monkeypatch, path, saturating_session={})) == {np.dtype(np.int8)}


@pytest.mark.parametrize("kind", LAYERS)
def test_graphs_that_cannot_saturate_have_the_nodes_shapes_and_types_of_those_that_can(kind, tmp_path):
    """So CPUs with VNNI run the same kernels on as many numbers: only values of weights and scales differ."""

    def described(path: Path) -> tuple[list[str], list[tuple[int, tuple[int, ...]]]]:
        graph = onnx.load(path).graph
        return [node.op_type for node in graph.node], [
            (t.data_type, tuple(t.dims)) for t in graph.initializer
        ]

    safe, free = (int8_graph(tmp_path / f"{safe}.onnx", LAYERS[kind], safe=safe) for safe in (True, False))
    assert described(safe) == described(free)


@pytest.mark.parametrize("kind", PAIRED)
def test_the_option_makes_weights_of_earlier_versions_uint8_where_kernels_saturate(
    kind, tmp_path, monkeypatch
):
    if not saturates():
        pytest.skip("this CPU does not saturate")
    path = int8_graph(tmp_path / "int8.onnx", LAYERS[kind], safe=False)
    assert weight_types(optimized(monkeypatch, path)) == {np.dtype(np.uint8)}
    assert weight_types(optimized(monkeypatch, path, saturating_session={})) == {np.dtype(np.int8)}


@pytest.mark.parametrize(
    ("here", "options", "found"),
    [
        (True, {}, dict(EXACT_SESSION)),
        (True, {"saturating_session": {}}, {}),
        (
            True,
            {"saturating_session": {"session.disable_prepacking": "1"}},
            {"session.disable_prepacking": "1"},
        ),
        (True, {"fused": False}, {}),
        (False, {}, {}),
        (False, {"saturating_session": dict(EXACT_SESSION)}, {}),
    ],
)
def test_a_session_is_configured_only_where_kernels_saturate(here, options, found, tmp_path, monkeypatch):
    monkeypatch.setattr(onnxruntime_engine, "saturates", lambda: here)
    path = int8_graph(tmp_path / "int8.onnx", LAYERS["1x1"], safe=False)
    assert OnnxRuntimeEngine(path, **options).session_config == found


def test_session_of_this_cpu_is_configured_by_what_its_kernels_do(tmp_path):
    path = int8_graph(tmp_path / "int8.onnx", LAYERS["1x1"], safe=False)
    assert OnnxRuntimeEngine(path).session_config == (dict(EXACT_SESSION) if saturates() else {})


# -- shared constants ------------------------------------------------------------------------------------------


def tied_layers(path: Path) -> Path:
    """Two convolutions one behind the other, with one weight."""
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["conv1"], name="first"),
        helper.make_node("Relu", ["conv1"], ["hidden"], name="relu1"),
        helper.make_node("Conv", ["hidden", "w"], ["conv2"], name="second"),
        helper.make_node("Relu", ["conv2"], ["relu"], name="relu2"),
        helper.make_node("Neg", ["relu"], ["logits"], name="neg"),
    ]
    return write(path, nodes, {"w": large_weights((16, 16, 1, 1)) / 8}, (16, 8, 8))


def uses_of_int8_constants(path: Path) -> list[int]:
    model = onnx.load(path)
    counts = Counter(name for node in model.graph.node for name in node.input)
    return [counts[t.name] for t in model.graph.initializer if t.data_type == TensorProto.INT8]


def shared_and_own(folder: Path) -> tuple[Path, Path]:
    """Tied layers as INT8 by an earlier version, with one int8 weight and zero point, and with one for each layer."""
    fp32 = tied_layers(folder / "tied.onnx")
    own = folder / "own.onnx"
    quantize_as_before(fp32, ranges_of(fp32, hidden=5.0, relu=10.0), own)
    model = onnx.load(own)
    (node,) = (n for n in model.graph.node if n.output[0].startswith("second_weight"))
    for index, name in enumerate(node.input):
        if index != 1:
            node.input[index] = name.replace("second", "first")
    kept = [
        t
        for t in model.graph.initializer
        if t.name not in ("second_weight_quantized", "second_weight_zero_point")
    ]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    shared = folder / "shared.onnx"
    onnx.save(model, shared)
    assert sorted(uses_of_int8_constants(shared)) == [2, 2]
    return shared, own


def with_one_dequantize(shared: Path) -> Path:
    """Tied layers that read one DequantizeLinear, whose nodes have no names."""
    model = onnx.load(shared)
    (second,) = (n for n in model.graph.node if n.output[0].startswith("second_weight"))
    for node in model.graph.node:
        node.input[:] = [name.replace("second_weight", "first_weight") for name in node.input]
        node.name = ""
    model.graph.node.remove(second)
    path = shared.with_name("one.onnx")
    onnx.save(model, path)
    return path


def test_tied_layers_share_no_int8_constant_after_quantize(tmp_path):
    fp32 = tied_layers(tmp_path / "tied.onnx")
    quantize(
        fp32,
        ranges_of(fp32, hidden=5.0, relu=10.0),
        tmp_path / "int8.onnx",
        rules=TARGETS["onnxruntime"].int8,
    )
    assert uses_of_int8_constants(tmp_path / "int8.onnx") == [1, 1, 1, 1]


@x86
@pytest.mark.parametrize("one", [False, True], ids=["constants", "a DequantizeLinear"])
def test_layers_that_share_an_int8_constant_run_exactly_where_kernels_saturate(one, tmp_path, monkeypatch):
    shared, own = shared_and_own(tmp_path)
    if one:
        shared = with_one_dequantize(shared)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    for key, value in EXACT_SESSION.items():
        options.add_session_config_entry(key, value)
    with pytest.raises(Exception, match=r"replace the existing tensor|Initializer with same name exists"):
        ort.InferenceSession(shared, options, providers=["CPUExecutionProvider"])
    exact = OnnxRuntimeEngine(own)
    monkeypatch.setattr(onnxruntime_engine, "saturates", lambda: True)
    engine = OnnxRuntimeEngine(shared)
    assert engine.session_config == dict(EXACT_SESSION)
    for batch in BATCHES.values():
        assert np.array_equal(engine.run(batch), exact.run(batch))
    if saturates():
        plain = OnnxRuntimeEngine(shared, saturating_session={}).run(BATCHES["255"])
        assert not np.array_equal(plain, exact.run(BATCHES["255"]))


@pytest.mark.parametrize("one", [False, True], ids=["constants", "a DequantizeLinear"])
def test_layers_that_share_an_int8_weight_get_uint8_weights(one, tmp_path):
    shared, own = shared_and_own(tmp_path)
    if one:
        shared = with_one_dequantize(shared)
    model = graph_io.load(shared)
    assert unsigned_weights(model.graph) == 2
    graph_io.save(model, tmp_path / "unsigned.onnx")
    assert uses_of_int8_constants(tmp_path / "unsigned.onnx") == []
    found, exact = (
        OnnxRuntimeEngine(tmp_path / "unsigned.onnx", saturating_session={}),
        OnnxRuntimeEngine(own),
    )
    assert np.array_equal(found.run(BATCHES["255"]), exact.run(BATCHES["255"]))


@x86
def test_a_graph_that_onnx_runtime_refuses_to_compute_exactly_is_no_damaged_file(tmp_path, monkeypatch):
    shared, _ = shared_and_own(tmp_path)
    monkeypatch.setattr(onnxruntime_engine, "saturates", lambda: True)
    monkeypatch.setattr("export_zoo.engines.precision.rewrites.own_int8_constants", lambda graph: 0)
    with pytest.raises(TargetUnavailableError, match=r"shared\.onnx: int8 sums saturate"):
        OnnxRuntimeEngine(shared)


def test_layers_that_share_an_int8_constant_run_exactly_on_haswell(tmp_path):
    shared, own = shared_and_own(tmp_path)
    exact = OnnxRuntimeEngine(own)
    with emulated_engine(shared, emulated_cpu("haswell")) as engine:
        assert engine.emulated.session_config == dict(EXACT_SESSION)
        for batch in BATCHES.values():
            assert np.array_equal(engine.run_all(batch)[0], exact.run(batch))


def with_external_data(graph: Path, out: Path) -> list[Path]:
    """The graph with its larger tensors in a file of their own; both files."""
    data = out.with_suffix(".bin")
    onnx.save(onnx.load(graph), out, save_as_external_data=True, location=data.name, size_threshold=200)
    assert graph_io.external_files(out) == [data]
    return [out, data]


@x86
def test_layers_that_share_an_int8_constant_outside_the_file_are_refused_where_kernels_saturate(
    tmp_path, monkeypatch
):
    shared, _ = shared_and_own(tmp_path)
    with_external_data(shared, tmp_path / "external.onnx")
    monkeypatch.setattr(onnxruntime_engine, "saturates", lambda: False)
    assert OnnxRuntimeEngine(tmp_path / "external.onnx").run(BATCHES["255"]).shape == (2, 16, 8, 8)
    monkeypatch.setattr(onnxruntime_engine, "saturates", lambda: True)
    with pytest.raises(TargetUnavailableError, match=r"external\.onnx: int8 sums saturate") as raised:
        OnnxRuntimeEngine(tmp_path / "external.onnx")
    assert raised.value.hint


# -- loading ---------------------------------------------------------------------------------------------------


@pytest.fixture
def not_exact(digits_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of an earlier version, whose INT8 engine is the fastest, shares zero points and has external data."""
    bundle = Path(shutil.copytree(digits_bundle, tmp_path / "digits.bundle"))
    document = json.loads((bundle / "manifest.json").read_text())
    fp32, int8 = document["artifacts"]["engines"]
    fp32["latency"]["speedup"], int8["latency"]["speedup"] = 1.0, 3.0
    model = onnx.load(bundle / int8["file"]["path"])
    known: dict[tuple[int, ...], str] = {}
    names = {
        t.name: known.setdefault(tuple(t.dims), t.name)
        for t in model.graph.initializer
        if t.data_type == TensorProto.INT8 and t.name.endswith("_weight_zero_point")
    }
    assert len(known) < len(names)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    onnx.save(model, tmp_path / "shared.onnx")
    files = with_external_data(tmp_path / "shared.onnx", bundle / "files" / "old.onnx")
    described = [
        {"path": f"files/{f.name}", "sha256": sha256_of(f), "size_bytes": f.stat().st_size} for f in files
    ]
    (int8["file"],) = (d for d in described if d["path"].endswith(".onnx"))
    int8["external_data"] = [d for d in described if not d["path"].endswith(".onnx")]
    int8["saturating_cpu_session"] = None
    (bundle / "manifest.json").write_text(json.dumps(document))
    return bundle


@x86
def test_fp32_is_loaded_and_why_is_said_where_int8_cannot_run_exactly(not_exact, monkeypatch):
    monkeypatch.setattr(onnxruntime_engine, "saturates", lambda: True)
    found = export_zoo.load(not_exact)
    assert found.name == "onnxruntime-fp32"
    assert "onnxruntime-int8 was left out" in found.why
    assert "int8 sums saturate on this CPU" in found.why
    assert found.run(np.zeros((1, 3, 32, 32), np.float32)).shape == (1, 10)


@x86
def test_what_cannot_run_exactly_does_not_lose_the_attestation_of_the_others(not_exact, monkeypatch, cli):
    monkeypatch.setattr(onnxruntime_engine, "saturates", lambda: True)
    done = cli("verify", not_exact)
    assert done.code == 4
    assert "onnxruntime-int8 cannot be run: see the warning" in done.json["error"]["message"]
    assert [*done.json["engines"]] == ["onnxruntime-fp32"]
    assert any(w.startswith("onnxruntime-int8: not run: ") and "saturate" in w for w in done.json["warnings"])
    written = json.loads(Path(done.json["attestation"]).read_text())
    assert written["engines"].keys() == written["states"].keys() == {"onnxruntime-fp32"}
    assert "json: onnxruntime-int8: not run: " in cli("inspect", not_exact).out


@x86
def test_int8_that_cannot_run_exactly_is_refused_where_it_is_asked_for(not_exact, monkeypatch):
    monkeypatch.setattr(onnxruntime_engine, "saturates", lambda: True)
    with pytest.raises(TargetUnavailableError, match=r"old\.onnx"):
        export_zoo.load(not_exact, engine="onnxruntime-int8")


def test_the_same_int8_is_loaded_where_nothing_saturates(not_exact, monkeypatch):
    monkeypatch.setattr(onnxruntime_engine, "saturates", lambda: False)
    assert export_zoo.load(not_exact).name == "onnxruntime-int8"
