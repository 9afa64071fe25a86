"""Where precision goes: the INT8 and FP16 graphs of torchvision networks, and what ONNX Runtime makes of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from support.weights import awkward_weights
from torch import nn

from export_zoo.base.errors import BadInputError
from export_zoo.base.graph_io import load, save, sha256_of
from export_zoo.calibration import images, synthetic
from export_zoo.calibration.collect import activation_tensors, collect
from export_zoo.calibration.preprocess import Preprocess, normalize
from export_zoo.calibration.ranges import Ranges, TensorRange
from export_zoo.engines.parity.metrics import compare
from export_zoo.engines.precision.fp16.half import to_half
from export_zoo.engines.precision.int8 import qdq
from export_zoo.engines.precision.int8.first_conv import block_first_convolution, blocked_weight
from export_zoo.engines.precision.int8.int8_weights import quantize_weight
from export_zoo.engines.precision.int8.qdq import quantize
from export_zoo.engines.precision.int8.saturation.channel_order import choose_order, reorder
from export_zoo.engines.precision.int8.scales import activation_scale, half_scale, symmetric_scale
from export_zoo.engines.precision.rewrites import average_pool_instead_of_mean, plain_einsum
from export_zoo.engines.precision.twin import write_twin
from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine
from export_zoo.engines.targets.registry import TARGETS

PREPROCESS = Preprocess(
    resize_size=64,
    crop_height=64,
    crop_width=64,
    interpolation="bilinear",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    source="a test",
)
SIZE = 64
MAX_BIAS = 2**30 * (1 + 2**-22)  # the bound, and one rounding to float32
LAYOUT = {"Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze"}


# -- graphs ----------------------------------------------------------------------------------------------------


class Net:
    """A graph to ask: who makes a tensor, who reads it, which constants there are."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.nodes = list(model.graph.node)
        self.made_by = {name: node for node in self.nodes for name in node.output}
        self.read_by: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.read_by.setdefault(name, []).append(node)
        self.constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        self.counts = Counter(node.op_type for node in self.nodes)

    def all(self, op_type: str) -> list[onnx.NodeProto]:
        return [node for node in self.nodes if node.op_type == op_type]

    def quantizer_of(self, name: str) -> onnx.NodeProto | None:
        """The QuantizeLinear that reads this tensor, alone."""
        readers = self.read_by.get(name, [])
        return readers[0] if [r.op_type for r in readers] == ["QuantizeLinear"] else None

    def dequantizer_of(self, name: str) -> onnx.NodeProto | None:
        """The DequantizeLinear that makes this tensor."""
        node = self.made_by.get(name)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def scale(self, node: onnx.NodeProto | None) -> tuple[float, int]:
        """Scale and zero point of a QuantizeLinear or DequantizeLinear."""
        assert node is not None
        return float(self.constants[node.input[1]]), int(self.constants[node.input[2]])

    def attribute(self, node: onnx.NodeProto, name: str):
        return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), None)


@dataclass(frozen=True)
class Case:
    """A network: its FP32 graph, its INT8 precision graph, and what ONNX Runtime optimizes that to."""

    fp32_path: Path
    int8_path: Path
    fp32: Net
    int8: Net
    optimized: Net
    inputs: np.ndarray
    ranges: Ranges


def _optimized(path: Path) -> Net:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Net(onnx.load(options.optimized_model_filepath))


def _module(name: str) -> nn.Module:
    from torchvision import models

    from export_zoo.exporter.models import zoo
    from export_zoo.exporter.options import ExportOptions

    torch.manual_seed(0)
    if name == "tiny densenet":
        return models.DenseNet(8, (2, 3), 16, num_classes=10).eval()
    if name == "tiny efficientnet":
        config = models.efficientnet.MBConvConfig
        blocks = [config(1, 3, 1, 16, 16, 1), config(4, 3, 2, 16, 24, 2)]
        return models.EfficientNet(blocks, 0.2, num_classes=10).eval()
    if name == "tiny vit":
        vit = models.VisionTransformer(SIZE, 16, 2, 2, 32, 64, num_classes=10).eval()
        vit.heads.head.reset_parameters()
        return vit
    options = ExportOptions(model=name, weights="none", num_classes=10, input_size=(SIZE, SIZE))
    module, _ = zoo.build(zoo.resolve(options))
    if name == "vgg11_bn":  # 400 MB of fully connected weights say nothing more about convolutions
        module.classifier = nn.Linear(512 * 49, 10)
    return module.eval()


@pytest.fixture(scope="session")
def case(tmp_path_factory):
    """`case("resnet18")`: exported, simplified and calibrated once, with random weights at 64x64."""
    from export_zoo.exporter.graph import simplify
    from export_zoo.exporter.graph import to_onnx as graph

    folder = tmp_path_factory.mktemp("calibration")
    for index, pixels in enumerate(synthetic.synthetic_images(16, PREPROCESS, seed=3)):
        Image.fromarray(pixels).save(folder / f"{index}.png")
    files = images.scan(folder, option="--calib").images
    inputs = normalize(synthetic.synthetic_images(16, PREPROCESS, seed=4), PREPROCESS)

    @cache
    def make(name: str) -> Case:
        directory = tmp_path_factory.mktemp(name.replace(" ", "-"))
        exported = directory / "model.onnx"
        graph.export(_module(name), SIZE, SIZE, exported)
        with pytest.MonkeyPatch.context() as patch:  # it takes seconds; see test_graph.py
            patch.setattr(simplify, "_run_onnxsim", lambda *_: "left out")
            simplify.simplify(exported, directory, inputs[:3])
        fp32, int8 = directory / "graph.onnx", directory / "int8.onnx"
        ranges = collect(fp32, images.ImageStream(files, PREPROCESS, 8, folder))
        quantize(fp32, ranges, int8, rules=TARGETS["onnxruntime"].int8)
        nets = [Net(onnx.load(path)) for path in (fp32, int8)]
        return Case(fp32, int8, *nets, _optimized(int8), inputs, ranges)

    return make


SLOW = pytest.mark.slow
MOBILENET, RESNET50, VGG = (
    pytest.param(name, marks=SLOW) for name in ("mobilenet_v2", "resnet50", "vgg11_bn")
)
"""Networks that take ten seconds each to export. Tests of all do it once, the fast tests have resnet18."""
CONVOLUTIONAL = [MOBILENET, "resnet18", RESNET50, VGG]
EVERY = [*CONVOLUTIONAL, "squeezenet1_1", "tiny densenet", "tiny vit"]


# -- what ONNX Runtime fuses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "convolutions"), [("mobilenet_v2", 52), ("resnet18", 20), ("resnet50", 53), ("vgg11_bn", 8)]
)
@pytest.mark.slow
def test_every_convolution_becomes_qlinearconv(case, model, convolutions):
    assert case(model).fp32.counts["Conv"] == convolutions
    found = {op: n for op, n in case(model).optimized.counts.items() if "conv" in op.lower()}
    assert found == {"QLinearConv": convolutions}


@pytest.mark.parametrize("model", ["squeezenet1_1", "tiny densenet", "tiny vit"])
@pytest.mark.slow
def test_no_convolution_stays_float_in_the_other_networks_either(case, model):
    found = {op: n for op, n in case(model).optimized.counts.items() if "conv" in op.lower()}
    assert found == {"QLinearConv": case(model).fp32.counts["Conv"]}


def test_silu_and_gates_of_efficientnet_run_in_the_fastest_kernels(case):
    found = case("tiny efficientnet").optimized.counts
    assert found["QuickGelu"] == 10, "each SiLU is one operator"
    assert "Sigmoid" not in found, "those of gates are fused with their convolution"
    assert found["QLinearConv"] == 7, "the stem, three depthwise ones and three that end a block"
    assert found["MatMulIntegerToFloat"] == 3, "two that begin a block, and the last"
    assert sum(found[op] for op in ("Conv", "FusedConv")) == 6, "two of each gate"
    assert found["DequantizeLinear"] == 4, "in front of SiLU, where the convolution has 8-bit outputs only"
    assert found["ReduceMean"] == 8
    assert "GlobalAveragePool" not in found


def test_float_outputs_of_pointwise_convolutions_are_those_of_the_layer(case):
    """Without the rewrite ONNX Runtime computes such a Conv in float, with the same weights and inputs."""
    net = case("tiny efficientnet")
    rules = TARGETS["onnxruntime"].int8
    plain = net.int8_path.with_name("plain.onnx")
    quantize(net.fp32_path, net.ranges, plain, rules=replace(rules, finish=block_first_convolution))
    assert Net(onnx.load(plain)).counts["Conv"] == net.fp32.counts["Conv"]
    expected = OnnxRuntimeEngine(plain).run(net.inputs)
    assert compare(expected, OnnxRuntimeEngine(net.int8_path).run(net.inputs)).sqnr > 50


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt-rtx"])
def test_layers_of_gates_stay_float_and_no_others(case, target, tmp_path):
    net, out = case("tiny efficientnet"), tmp_path / "int8.onnx"
    quantize(net.fp32_path, net.ranges, out, rules=TARGETS[target].int8)
    floats = [
        node for node in load(out).graph if node.op_type == "Conv" and node.inputs[1].producer() is None
    ]
    modules = sorted(node.metadata_props["module"] for node in floats)
    assert modules == [
        f"features.{block}.block.{place}.fc{layer}"
        for block, place in (("1.0", 1), ("2.0", 2), ("2.1", 2))
        for layer in (1, 2)
    ]


@pytest.mark.parametrize(
    ("model", "adds"),
    [
        ("resnet18", 8),
        pytest.param("resnet50", 16, marks=SLOW),
        pytest.param("mobilenet_v2", 10, marks=SLOW),
    ],
)
def test_every_residual_add_becomes_qlinearadd(case, model, adds):
    residual = [n for n in case(model).fp32.all("Add") if not set(n.input) & set(case(model).fp32.constants)]
    assert len(residual) == adds
    assert case(model).optimized.counts["QLinearAdd"] == adds
    assert case(model).optimized.counts["Add"] == 0


@pytest.mark.parametrize("model", [MOBILENET, "resnet18", RESNET50])
def test_nothing_is_computed_in_float_but_the_end(case, model):
    left = {
        op: n for op, n in case(model).optimized.counts.items() if not op.startswith(("QLinear", "QGemm"))
    }
    moves = {"Reshape", "SpaceToDepth", "Transpose", "NhwcMaxPool", "MaxPool", "QuantizeLinear"}
    assert set(left) <= moves, "ReduceMean, Relu, Clip or DequantizeLinear is left"
    assert left["QuantizeLinear"] == 1
    assert case(model).optimized.counts["QLinearGlobalAveragePool"] == 1
    assert case(model).optimized.counts["QGemm"] == 1


@pytest.mark.parametrize("model", EVERY)
def test_int8_logits_are_near_those_of_the_float_graph(case, model):
    """Random weights, so 'near' is modest: a wrong scale or axis gives 0 dB."""
    reference = OnnxRuntimeEngine(case(model).fp32_path).run(case(model).inputs)
    found = compare(reference, OnnxRuntimeEngine(case(model).int8_path).run(case(model).inputs))
    assert found.sqnr > 6
    assert found.misplaced == 0


# -- placement in the precision graph --------------------------------------------------------------------------


@pytest.mark.parametrize("model", EVERY)
def test_every_convolution_reads_int8_and_is_quantized_after_its_activation(case, model):
    net = case(model).int8
    for conv in net.all("Conv"):
        assert net.dequantizer_of(conv.input[0]) is not None, conv.name
        (reader,) = {id(r): r for r in net.read_by[conv.output[0]]}.values()
        output = reader.output[0] if reader.op_type in ("Relu", "Clip") else conv.output[0]
        assert net.quantizer_of(output) is not None, conv.name


@pytest.mark.parametrize("model", EVERY)
def test_logits_are_never_quantized(case, model):
    net = case(model).int8
    name = "logits"
    while True:
        assert net.dequantizer_of(name) is None
        assert "QuantizeLinear" not in [reader.op_type for reader in net.read_by.get(name, [])]
        if net.made_by[name].op_type not in LAYOUT:
            break
        name = net.made_by[name].input[0]
    assert net.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT


@pytest.mark.parametrize("model", EVERY)
def test_activations_are_uint8_and_every_scale_is_positive_and_finite(case, model):
    net = case(model).int8
    for node in net.all("QuantizeLinear"):
        assert net.constants[node.input[2]].dtype == np.uint8
    scales = [net.constants[n.input[1]] for op in ("QuantizeLinear", "DequantizeLinear") for n in net.all(op)]
    assert len(scales) > 4
    for scale in scales:
        assert scale.dtype == np.float32
        assert np.isfinite(scale).all()
        assert (scale > 0).all()


def test_concat_and_its_inputs_share_one_scale(case):
    net = case("squeezenet1_1").int8
    assert len(net.all("Concat")) == 8
    for concat in net.all("Concat"):
        scales = {net.scale(net.dequantizer_of(name)) for name in concat.input}
        scales.add(net.scale(net.quantizer_of(concat.output[0])))
        assert len(scales) == 1, concat.name
    assert case("squeezenet1_1").optimized.counts["Concat"] == 0


def test_shared_scale_covers_the_widest_member(case):
    net, ranges = case("squeezenet1_1").int8, case("squeezenet1_1").ranges.tensors
    for concat in net.all("Concat"):
        members = [net.made_by[net.dequantizer_of(name).input[0]].input[0] for name in concat.input]
        scale, zero = net.scale(net.quantizer_of(concat.output[0]))
        assert scale * (255 - zero) >= max(ranges[name].max for name in members) * (1 - 1e-6)


@pytest.mark.parametrize("model", ["resnet18", "squeezenet1_1", VGG])
def test_maxpool_has_one_scale_in_and_out(case, model):
    net = case(model).int8
    assert net.all("MaxPool")
    for pool in net.all("MaxPool"):
        into = net.scale(net.dequantizer_of(pool.input[0]))
        assert into == net.scale(net.quantizer_of(pool.output[0]))


def test_densenets_batchnorm_and_the_concats_that_feed_it_stay_float(case):
    found = case("tiny densenet")
    concats = found.int8.all("Concat")
    assert (len(concats), found.int8.counts["BatchNormalization"]) == (5, 7)
    for concat in concats:
        assert "BatchNormalization" in {reader.op_type for reader in found.int8.read_by[concat.output[0]]}
        assert "QuantizeLinear" not in {reader.op_type for reader in found.int8.read_by[concat.output[0]]}
    scales = [{found.int8.scale(found.int8.dequantizer_of(name)) for name in c.input[1:]} for c in concats]
    assert len(set().union(*scales)) > 1, "the layers of a block were chained to one scale"
    assert found.optimized.counts["QLinearConcat"] == 0
    assert found.optimized.counts["Concat"] == 5


def test_softmax_layernorm_and_attention_products_stay_float_in_int8(case):
    net = case("tiny vit").int8
    for op_type in ("Softmax", "LayerNormalization"):
        assert net.all(op_type)
        assert all(net.dequantizer_of(node.input[0]) is None for node in net.all(op_type))
    for softmax in net.all("Softmax"):
        assert [reader.op_type for reader in net.read_by[softmax.output[0]]] == ["MatMul"]
        (product,) = net.read_by[softmax.output[0]]
        assert all(net.dequantizer_of(name) is None for name in product.input)


# -- weights and biases ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reordered(case, tmp_path_factory):
    """The FP32 graph with its channels in the order of the INT8 graph for the CPU."""
    made = {}

    def of(model: str) -> Net:
        if model not in made:
            path = tmp_path_factory.mktemp("reordered") / "graph.onnx"
            fp32 = load(case(model).fp32_path)
            reorder(fp32.graph, choose_order(fp32.graph))
            save(fp32, path)
            made[model] = Net(onnx.load(path))
        return made[model]

    return of


def _at_the_bound(quantized: np.ndarray) -> np.ndarray:
    """Where neighbours of a filter add up to what cannot overflow, and could be more: bool, in the weight's shape."""
    rows = np.moveaxis(quantized, 1, -1).astype(int)
    flat = rows.reshape(len(rows), -1)
    flat = np.pad(flat, ((0, 0), (0, flat.shape[1] % 2)))
    bound = (np.abs(flat[:, ::2] + flat[:, 1::2]) == 128).repeat(2, axis=1)[:, : rows[0].size]
    return np.moveaxis(bound.reshape(rows.shape), -1, 1)


@pytest.mark.parametrize("model", EVERY)
def test_weights_are_int8_per_output_channel_and_within_half_a_step(case, reordered, model):
    fp32, int8 = reordered(model), case(model).int8
    originals = {node.name: node for node in fp32.nodes}
    compared, blocked, bound = 0, 0, 0
    for node in [*int8.all("Conv"), *int8.all("Gemm"), *int8.all("MatMul")]:
        dequantize = int8.dequantizer_of(node.input[1])
        if dequantize is None or dequantize.input[0] not in int8.constants:
            assert node.op_type == "MatMul"
            continue
        weight = fp32.constants[originals[node.name].input[1]]
        quantized, scale = int8.constants[dequantize.input[0]], int8.constants[dequantize.input[1]]
        axis = int8.attribute(dequantize, "axis")
        rows = node.op_type == "Conv" or int8.attribute(node, "transB") == 1
        assert axis == (0 if rows else 1)
        assert scale.shape == (weight.shape[axis],)
        assert (quantized.dtype, quantized.min() >= -127) == (np.int8, True)
        assert not int8.constants[dequantize.input[2]].any()
        if quantized.shape != weight.shape:
            blocked += 1
            continue
        shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
        error = np.abs(quantized * scale.reshape(shape).astype(np.float64) - weight)
        near = error <= 0.5001 * scale.reshape(shape)
        kept = _at_the_bound(quantized if rows else quantized.T)
        assert (near | (kept if rows else kept.T)).all(), node.name
        bound += int((~near).sum())
        compared += quantized.size
    assert compared > 0
    assert bound < 0.02 * compared
    assert blocked <= 1


@pytest.mark.parametrize("model", [*CONVOLUTIONAL, "tiny vit"])
def test_biases_are_int32_in_units_of_input_times_weight_scale(case, reordered, model):
    fp32, int8 = reordered(model), case(model).int8
    originals = {node.name: node for node in fp32.nodes}
    biased = [n for op in ("Conv", "Gemm") for n in int8.all(op) if len(n.input) > 2]
    assert biased
    for node in biased:
        bias = int8.dequantizer_of(node.input[2])
        unit = int8.constants[bias.input[1]]
        weight_scale = int8.constants[int8.dequantizer_of(node.input[1]).input[1]]
        input_scale = int8.constants[int8.dequantizer_of(node.input[0]).input[1]]
        np.testing.assert_array_equal(unit, input_scale * weight_scale)
        stored = int8.constants[bias.input[0]]
        assert stored.dtype == np.int32
        assert np.abs(stored.astype(np.int64)).max() <= MAX_BIAS
        np.testing.assert_allclose(
            stored * unit.astype(np.float64),
            fp32.constants[originals[node.name].input[2]],
            atol=0.51 * unit.max(),
        )


@pytest.mark.parametrize("block", range(4))
def test_quantized_weights_keep_their_bounds_whatever_the_numbers(block):
    for seed in range(100 * block, 100 * block + 100):
        weight, axis, bias, input_scale = awkward_weights(seed)
        quantized, scale, integers = quantize_weight(weight, axis, bias, input_scale)
        assert (quantized.dtype, scale.dtype, integers.dtype) == (np.int8, np.float32, np.int32)
        assert np.abs(quantized.astype(int)).max() <= 127
        assert np.isfinite(scale).all()
        assert (scale > 0).all()
        assert np.abs(integers.astype(np.int64)).max() <= MAX_BIAS
        shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
        error = np.abs(quantized * scale.reshape(shape).astype(np.float64) - weight)
        assert (error <= 0.5001 * scale.reshape(shape)).all(), seed
        unit = (input_scale * scale).astype(np.float64)
        assert (unit > np.finfo(np.float32).tiny).all(), seed
        assert (np.abs(integers * unit - bias) <= 0.51 * unit + 1e-7 * np.abs(bias)).all(), seed


def test_full_range_of_int8_is_used_where_the_bias_allows():
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    quantized, _, none = quantize_weight(weight, 0, None, np.float32(0.1))
    assert np.abs(quantized.astype(int)).max(axis=(1, 2, 3)).tolist() == [127] * 4
    assert none is None


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (-1.0, 3.0),
        (0.0, 6.0),
        (0.5, 6.0),
        (-6.0, 0.0),
        (-6.0, -0.5),
        (-1e-12, 1e4),
        (-1e30, 1e30),
        (1e-20, 2e-20),
    ],
)
def test_activation_scale_represents_zero_exactly_and_covers_the_range(low, high):
    found = activation_scale(low, high)
    zero = int(found.zero_point)
    assert found.scale > 0
    assert 0 <= zero <= 255
    step = float(found.scale)
    assert step * (0 - zero) <= min(low, 0.0) + 0.5001 * step
    assert step * (255 - zero) >= max(high, 0.0) - 0.5001 * step
    assert step <= 1.0001 * (max(high, 0.0) - min(low, 0.0)) / 255


def test_activation_scale_of_random_ranges_represents_zero_and_covers_them():
    rng = np.random.default_rng(0)
    for low, high in np.sort(rng.normal(size=(500, 2)) * 10 ** rng.uniform(-8, 8, size=(500, 1)), axis=1):
        found = activation_scale(low, high)
        step, zero = float(found.scale), int(found.zero_point)
        assert step * (0 - zero) <= min(low, 0.0) + 0.5001 * step
        assert step * (255 - zero) >= max(high, 0.0) - 0.5001 * step


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (0.0, 1e-38), (-1e-45, 0.0)])
def test_activation_scale_of_a_dead_tensor_is_not_zero(low, high):
    assert activation_scale(low, high).scale == 1.0


# -- small graphs made by hand ---------------------------------------------------------------------------------


def _graph(
    path: Path,
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    *,
    size=(8, 8),
    channels: int = 3,
) -> Path:
    """A graph from `input` float32 [batch, channels, H, W] to `logits`."""
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", channels, *size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model, strict_mode=True), path)
    return path


def _ranges(path: Path, **known: tuple[float, float]) -> Ranges:
    tensors = {name: known.get(name, (-3.0, 5.0)) for name in activation_tensors(load(path))}
    return Ranges(
        graph_sha256=sha256_of(path),
        preprocess=PREPROCESS,
        image_sha256=[],
        unreadable=[],
        instruction_set="any",
        versions={},
        tensors={name: TensorRange(min=low, max=high) for name, (low, high) in tensors.items()},
    )


def _random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_all_zero_channel_keeps_its_bias_in_onnxruntime(tmp_path):
    """ONNX Runtime's own bias quantization overflows here: 1.0 came out as -0.42."""
    weight = np.zeros((2, 3, 1, 1), dtype=np.float32)
    weight[1] = 0.1
    nodes = [
        helper.make_node("Conv", ["input", "weight", "bias"], ["conv"], name="conv"),
        helper.make_node("Relu", ["conv"], ["relu"], name="relu"),
        helper.make_node("GlobalAveragePool", ["relu"], ["pool"], name="pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], name="flat"),
        helper.make_node("Gemm", ["flat", "head"], ["logits"], name="head", transB=1),
    ]
    constants = {
        "weight": weight,
        "bias": np.array([1.0, 0.0], dtype=np.float32),
        "head": np.eye(2, dtype=np.float32),
    }
    graph = _graph(tmp_path / "graph.onnx", nodes, constants)
    covers_one = (0.0, 2.55)  # step 0.01
    quantize(
        graph,
        _ranges(graph, relu=covers_one, pool=covers_one, flat=covers_one),
        tmp_path / "int8.onnx",
        rules=TARGETS["onnxruntime"].int8,
    )
    assert _optimized(tmp_path / "int8.onnx").counts["QLinearConv"] == 1
    for fused in (True, False):
        logits = OnnxRuntimeEngine(tmp_path / "int8.onnx", fused=fused).run(_random(3, 3, 8, 8))
        np.testing.assert_allclose(logits[:, 0], 1.0, atol=1e-5)


@pytest.mark.parametrize(
    ("op_type", "transposed", "axis"), [("Gemm", True, 0), ("Gemm", False, 1), ("MatMul", False, 1)]
)
def test_output_channels_of_a_dense_layer_are_found(tmp_path, op_type, transposed, axis):
    """Channels of very different size: the wrong axis would lose the small ones."""
    weight = _random(10, 192) * (10.0 ** np.arange(-4, 1, 0.5, dtype=np.float32))[:, None]
    attributes = {"transB": 1} if transposed else {}
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"], name="flat"),
        helper.make_node(op_type, ["flat", "weight"], ["logits"], name="dense", **attributes),
    ]
    stored = np.ascontiguousarray(weight if transposed else weight.T)
    graph = _graph(tmp_path / "graph.onnx", nodes, {"weight": stored})
    quantize(
        graph,
        _ranges(graph, input=(-4.0, 4.0), flat=(-4.0, 4.0)),
        tmp_path / "int8.onnx",
        rules=TARGETS["onnxruntime"].int8,
    )
    net = Net(onnx.load(tmp_path / "int8.onnx"))
    (dense,) = net.all(op_type)
    assert net.attribute(net.dequantizer_of(dense.input[1]), "axis") == axis
    batch = _random(16, 3, 8, 8, seed=1)
    want, have = (OnnxRuntimeEngine(tmp_path / name).run(batch) for name in ("graph.onnx", "int8.onnx"))
    for channel in range(10):
        error = np.abs(want[:, channel] - have[:, channel]).max()
        assert error < 0.05 * np.abs(want[:, channel]).max(), channel


@pytest.mark.parametrize("attributes", [{"alpha": 2.0}, {"beta": 0.5}, {"transA": 1}])
def test_gemm_that_does_more_than_multiply_and_add_stays_float(tmp_path, attributes):
    batch_first = "transA" not in attributes
    nodes = [
        helper.make_node("Conv", ["input", "kernel"], ["conv"], name="conv"),
        helper.make_node("Flatten", ["conv"], ["flat"], name="flat", axis=1 if batch_first else 0),
        helper.make_node("Gemm", ["flat", "weight", "bias"], ["logits"], name="dense", **attributes),
    ]
    constants = {
        "kernel": _random(4, 3, 8, 8),
        "weight": _random(4 if batch_first else 1, 10, seed=1),
        "bias": _random(10, seed=2),
    }
    graph = _graph(tmp_path / "graph.onnx", nodes, constants)
    quantize(graph, _ranges(graph), tmp_path / "int8.onnx", rules=TARGETS["onnxruntime"].int8)
    net = Net(onnx.load(tmp_path / "int8.onnx"))
    (dense,) = net.all("Gemm")
    assert list(dense.input)[1:] == ["weight", "bias"]


def test_ranges_of_another_graph_are_refused(case, tmp_path):
    with pytest.raises(BadInputError, match="another graph") as raised:
        quantize(
            case("resnet18").fp32_path,
            case("squeezenet1_1").ranges,
            tmp_path / "int8.onnx",
            rules=TARGETS["onnxruntime"].int8,
        )
    assert "calibrate" in raised.value.hint
    assert not list(tmp_path.iterdir())


def test_missing_range_is_named(case, tmp_path):
    found = case("squeezenet1_1")
    tensors = dict(found.ranges.tensors)
    tensors.pop("input")
    with pytest.raises(BadInputError, match="'input'"):
        quantize(
            found.fp32_path,
            found.ranges.model_copy(update={"tensors": tensors}),
            tmp_path / "int8.onnx",
            rules=TARGETS["onnxruntime"].int8,
        )


def test_graph_without_anything_to_quantize_is_refused(tmp_path):
    graph = _graph(
        tmp_path / "graph.onnx", [helper.make_node("Flatten", ["input"], ["logits"], name="f")], {}
    )
    with pytest.raises(BadInputError, match="no Conv, Gemm or MatMul"):
        quantize(graph, _ranges(graph), tmp_path / "int8.onnx", rules=TARGETS["onnxruntime"].int8)


def test_int8_graph_is_the_same_bytes_every_time(case, tmp_path):
    found = case("squeezenet1_1")
    quantize(found.fp32_path, found.ranges, tmp_path / "again.onnx", rules=TARGETS["onnxruntime"].int8)
    assert (tmp_path / "again.onnx").read_bytes() == found.int8_path.read_bytes()


# -- the first convolution, over blocks ------------------------------------------------------------------------


def _first_conv(
    path: Path,
    *,
    kernel=(3, 3),
    pads=(1, 1, 1, 1),
    size=(16, 16),
    channels: int = 3,
    bias: bool = True,
    **other,
) -> Path:
    """Conv -> Relu -> Flatten -> Gemm: every output of the convolution counts in the logits."""
    attributes = {"strides": [2, 2], "pads": list(pads), "kernel_shape": list(kernel), **other}
    groups = attributes.get("group", 1)
    weight = _random(6, channels // groups, *kernel)
    conv = nn.functional.conv2d(
        torch.zeros(1, channels, size[0] + pads[0] + pads[2], size[1] + pads[1] + pads[3]),
        torch.from_numpy(weight),
        stride=attributes["strides"],
        dilation=attributes.get("dilations", 1),
        groups=groups,
    )
    inputs = ["input", "weight", "bias"] if bias else ["input", "weight"]
    nodes = [
        helper.make_node("Conv", inputs, ["conv"], name="conv", **attributes),
        helper.make_node("Relu", ["conv"], ["relu"], name="relu"),
        helper.make_node("Flatten", ["relu"], ["flat"], name="flat"),
        helper.make_node("Gemm", ["flat", "head"], ["logits"], name="head", transB=1),
    ]
    constants = {"weight": weight, "head": _random(10, conv[0].numel(), seed=2)}
    if bias:
        constants["bias"] = _random(6, seed=1)
    return _graph(path, nodes, constants, size=size, channels=channels)


def _with_and_without_blocks(graph: Path, monkeypatch) -> tuple[Path, Path]:
    """The INT8 graph as `quantize` makes it, and without the rewrite of the first convolution."""
    ranges = _ranges(graph, input=(-2.1, 2.6), relu=(0.0, 12.0), flat=(0.0, 12.0))
    blocked, plain = graph.with_name("blocked.onnx"), graph.with_name("plain.onnx")
    rules = TARGETS["onnxruntime"].int8
    quantize(graph, ranges, blocked, rules=rules)
    with monkeypatch.context() as patch:
        # Its weights are made for the pairs of the blocked convolution; sessions are exact all the same.
        patch.setattr(qdq, "saturating_layers", lambda *_, **__: [])
        quantize(graph, ranges, plain, rules=replace(rules, finish=None))
    return blocked, plain


def _assert_same_bits(blocked: Path, plain: Path, channels: int, size: tuple[int, int]) -> None:
    for batch in (1, 5):
        inputs = _random(batch, channels, *size, seed=7)
        for fused in (True, False):
            pair = [OnnxRuntimeEngine(path, fused=fused).run(inputs) for path in (blocked, plain)]
            assert np.ptp(pair[0]) > 0.1
            np.testing.assert_array_equal(*pair)


@pytest.mark.parametrize("size", [(16, 16), (14, 18)], ids=["square", "wide"])
@pytest.mark.parametrize("pad", [0, 1, 2, 3])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_blocked_first_convolution_gives_the_same_bits(tmp_path, monkeypatch, kernel, pad, size):
    graph = _first_conv(tmp_path / "graph.onnx", kernel=(kernel, kernel), pads=[pad] * 4, size=size)
    blocked, plain = _with_and_without_blocks(graph, monkeypatch)
    (blocks,) = Net(onnx.load(blocked)).all("SpaceToDepth")
    assert blocks.input[0] == "input", "of floats: older versions of ONNX Runtime have no other"
    assert Net(onnx.load(plain)).counts["SpaceToDepth"] == 0
    assert _optimized(blocked).counts["QLinearConv"] == 1
    _assert_same_bits(blocked, plain, 3, size)


@pytest.mark.parametrize(
    ("kernel", "pads", "channels", "bias"),
    [
        ((3, 7), (1, 3, 1, 3), 3, True),
        ((1, 1), (0, 0, 0, 0), 3, True),
        ((2, 4), (0, 1, 0, 1), 3, True),
        ((3, 3), (0, 1, 2, 3), 3, True),
        ((5, 3), (3, 0, 0, 2), 3, True),
        ((3, 3), (1, 1, 1, 1), 1, True),
        ((3, 3), (1, 1, 1, 1), 2, False),
    ],
)
def test_blocked_first_convolution_gives_the_same_bits_for_odd_shapes(
    tmp_path, monkeypatch, kernel, pads, channels, bias
):
    graph = _first_conv(tmp_path / "graph.onnx", kernel=kernel, pads=pads, channels=channels, bias=bias)
    blocked, plain = _with_and_without_blocks(graph, monkeypatch)
    assert Net(onnx.load(blocked)).counts["SpaceToDepth"] == 1
    _assert_same_bits(blocked, plain, channels, (16, 16))


@pytest.mark.parametrize(
    "changes",
    [
        {"size": (15, 16)},
        {"size": (16, 15)},
        {"size": (15, 15)},
        {"strides": [1, 1]},
        {"strides": [2, 1]},
        {"strides": [4, 4]},
        {"dilations": [2, 2]},
        {"channels": 4},
        {"group": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", [3, 5])
def test_first_convolution_that_does_not_fit_is_left_alone(tmp_path, monkeypatch, kernel, changes):
    graph = _first_conv(tmp_path / "graph.onnx", kernel=(kernel, kernel), **changes)
    blocked, plain = _with_and_without_blocks(graph, monkeypatch)
    assert blocked.read_bytes() == plain.read_bytes()
    assert block_first_convolution(load(plain).graph) is False
    inputs = _random(2, changes.get("channels", 3), *changes.get("size", (16, 16)))
    assert np.isfinite(OnnxRuntimeEngine(blocked).run(inputs)).all()


def test_image_with_a_second_reader_is_left_alone(tmp_path, monkeypatch):
    nodes = [
        helper.make_node("Conv", ["input", "a"], ["first"], name="first", strides=[2, 2]),
        helper.make_node("Conv", ["input", "b"], ["second"], name="second", strides=[2, 2]),
        helper.make_node("Add", ["first", "second"], ["sum"], name="sum"),
        helper.make_node("Flatten", ["sum"], ["flat"], name="flat"),
        helper.make_node("Gemm", ["flat", "head"], ["logits"], name="head", transB=1),
    ]
    constants = {"a": _random(4, 3, 2, 2), "b": _random(4, 3, 2, 2, seed=1), "head": _random(5, 64, seed=2)}
    graph = _graph(tmp_path / "graph.onnx", nodes, constants)
    blocked, plain = _with_and_without_blocks(graph, monkeypatch)
    assert blocked.read_bytes() == plain.read_bytes()


def test_float_graph_is_left_alone(tmp_path):
    model = load(_first_conv(tmp_path / "graph.onnx"))
    assert block_first_convolution(model.graph) is False


@pytest.mark.parametrize("pad", [0, 1, 2, 3])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (7, 7), (3, 6)], ids=str)
def test_blocked_weight_convolves_blocks_as_the_weight_does_pixels(kernel, pad):
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, size=(5, 3, *kernel)).astype(np.int8)
    image = torch.from_numpy(rng.integers(0, 256, size=(2, 3, 16, 12)).astype(np.float64))
    padded = nn.functional.pad(image, (pad, pad, pad, pad))
    want = nn.functional.conv2d(padded, torch.from_numpy(weight.astype(np.float64)), stride=2)

    blocked = torch.from_numpy(blocked_weight(weight, (pad, pad)).astype(np.float64))
    rows, columns = (-(-pad // 2) * 2 for _ in range(2))  # padding up to whole blocks
    wide = nn.functional.pad(image, (columns, 16, rows, 16))
    n, c, h, w = wide.shape
    depth = (
        wide.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(n, 4 * c, h // 2, w // 2)
    )
    have = nn.functional.conv2d(depth, blocked)
    assert blocked.abs().sum() == np.abs(weight.astype(int)).sum()
    np.testing.assert_array_equal(have[:, :, : want.shape[2], : want.shape[3]].numpy(), want.numpy())


# -- mean to average pooling -----------------------------------------------------------------------------------


def _mean_graph(path: Path, axes: list[int], keepdims: int, tail: bool) -> Path:
    """Conv -> ReduceMean, and a dense layer behind it where `tail`."""
    last = "mean" if tail else "logits"
    nodes = [
        helper.make_node("Conv", ["input", "weight"], ["conv"], name="conv"),
        helper.make_node("ReduceMean", ["conv", "axes"], [last], name="reduce", keepdims=keepdims),
    ]
    constants = {"weight": _random(6, 3, 3, 3), "axes": np.array(axes, dtype=np.int64)}
    if tail:
        nodes.append(helper.make_node("Flatten", [last], ["flat"], name="flat"))
        nodes.append(helper.make_node("MatMul", ["flat", "head"], ["logits"], name="head"))
        constants["head"] = _random(6, 10, seed=1)
    return _graph(path, nodes, constants)


@pytest.mark.parametrize("tail", [True, False], ids=["in the middle", "is the logits"])
@pytest.mark.parametrize("axes", [[2, 3], [3, 2], [-1, -2], [-2, 3]], ids=str)
def test_mean_over_the_image_becomes_average_pooling_and_keeps_the_logits(tmp_path, axes, tail):
    graph = _mean_graph(tmp_path / "graph.onnx", axes, keepdims=0, tail=tail)
    model = load(graph)
    assert average_pool_instead_of_mean(model.graph) == 1
    save(model, tmp_path / "rewritten.onnx")
    net = Net(onnx.load(tmp_path / "rewritten.onnx"))
    assert (net.counts["ReduceMean"], net.counts["GlobalAveragePool"]) == (0, 1)
    batch = _random(3, 3, 8, 8)
    pair = [OnnxRuntimeEngine(path, fused=False).run(batch) for path in (graph, tmp_path / "rewritten.onnx")]
    assert pair[0].ndim == 2
    np.testing.assert_allclose(*pair, atol=1e-5)


def test_mean_that_keeps_its_dimensions_becomes_average_pooling_alone(tmp_path):
    graph = _mean_graph(tmp_path / "graph.onnx", [2, 3], keepdims=1, tail=True)
    model = load(graph)
    assert average_pool_instead_of_mean(model.graph) == 1
    save(model, tmp_path / "rewritten.onnx")
    assert Net(onnx.load(tmp_path / "rewritten.onnx")).counts["Flatten"] == 1
    batch = _random(3, 3, 8, 8)
    pair = [OnnxRuntimeEngine(path, fused=False).run(batch) for path in (graph, tmp_path / "rewritten.onnx")]
    np.testing.assert_allclose(*pair, atol=1e-5)


@pytest.mark.parametrize("axes", [[1], [2], [1, 2], [1, 2, 3], [1, 3]], ids=str)
def test_mean_over_other_axes_is_left_alone(tmp_path, axes):
    model = load(_mean_graph(tmp_path / "graph.onnx", axes, keepdims=1, tail=False))
    assert average_pool_instead_of_mean(model.graph) == 0
    assert [node.op_type for node in model.graph] == ["Conv", "ReduceMean"]


# -- half ------------------------------------------------------------------------------------------------------


def _types(path: Path) -> tuple[Net, dict[str, int]]:
    """Element types, as ONNX infers them from nothing but the nodes."""
    model = onnx.load(path)
    del model.graph.value_info[:]
    model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return Net(model), types | {t.name: t.data_type for t in model.graph.initializer}


@pytest.fixture(scope="session")
def half(case, tmp_path_factory):
    """`half("resnet18")`: the FP16 graph."""

    @cache
    def make(name: str) -> Path:
        path = tmp_path_factory.mktemp("half") / "fp16.onnx"
        assert to_half(case(name).fp32_path, path) == [path]
        return path

    return make


HALVES = ["resnet18", "squeezenet1_1", "tiny densenet", "tiny vit"]


@pytest.mark.parametrize("model", HALVES)
def test_half_graph_has_float_input_and_logits_and_half_layers(half, model):
    net, types = _types(half(model))
    assert types["input"] == types["logits"] == TensorProto.FLOAT
    layers = [*net.all("Conv"), *net.all("Gemm"), *net.all("MatMul")]
    assert layers
    for node in layers:
        assert {types[name] for name in [*node.input, *node.output] if name} == {TensorProto.FLOAT16}, (
            node.name
        )


def test_half_graph_is_half_the_size(case, half):
    assert half("resnet18").stat().st_size < 0.51 * case("resnet18").fp32_path.stat().st_size


@pytest.mark.parametrize("model", HALVES)
def test_half_graph_is_close_to_the_float_graph_in_onnxruntime(case, half, model):
    reference = OnnxRuntimeEngine(case(model).fp32_path).run(case(model).inputs)
    logits = OnnxRuntimeEngine(half(model), half=True).run(case(model).inputs)
    assert 35 < compare(reference, logits).sqnr < 110


@pytest.mark.parametrize("op_type", ["Softmax", "LayerNormalization"])
def test_softmax_and_layernorm_stay_float_in_half_graphs(half, op_type):
    net, types = _types(half("tiny vit"))
    assert net.all(op_type)
    for node in net.all(op_type):
        assert {types[name] for name in [*node.input, *node.output]} == {TensorProto.FLOAT}


def test_mean_stays_float_in_half_graphs(tmp_path):
    graph = _mean_graph(tmp_path / "graph.onnx", [2, 3], keepdims=0, tail=False)
    to_half(graph, tmp_path / "half.onnx")
    net, types = _types(tmp_path / "half.onnx")
    (mean,) = net.all("ReduceMean")
    assert types[mean.input[0]] == types[mean.output[0]] == TensorProto.FLOAT
    assert types[net.all("Conv")[0].output[0]] == TensorProto.FLOAT16


def _normalized(path: Path, epsilon: np.ndarray) -> Path:
    """logits = flat / sqrt(flat^2 + epsilon), then a dense layer."""
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"], name="flat"),
        helper.make_node("Mul", ["flat", "flat"], ["square"], name="square"),
        helper.make_node("Add", ["square", "epsilon"], ["sum"], name="sum"),
        helper.make_node("Sqrt", ["sum"], ["root"], name="root"),
        helper.make_node("Div", ["flat", "root"], ["unit"], name="unit"),
        helper.make_node("MatMul", ["unit", "head"], ["logits"], name="head"),
    ]
    return _graph(path, nodes, {"epsilon": epsilon, "head": _random(192, 10)})


@pytest.mark.parametrize("epsilon", [1e-12, 1e-5])
def test_tiny_epsilon_stays_float(tmp_path, epsilon):
    graph = _normalized(tmp_path / "graph.onnx", np.array(epsilon, dtype=np.float32))
    to_half(graph, tmp_path / "half.onnx")
    net, types = _types(tmp_path / "half.onnx")
    (add,) = net.all("Add")
    assert {types[name] for name in [*add.input, *add.output]} == {TensorProto.FLOAT}
    (stored,) = {add.input[0], add.input[1]} & set(net.constants)
    assert net.constants[stored] == np.float32(epsilon)


def test_tiny_epsilon_of_many_numbers_stays_float_too(tmp_path):
    graph = _normalized(tmp_path / "graph.onnx", np.full(192, 1e-12, dtype=np.float32))
    to_half(graph, tmp_path / "half.onnx")
    net, types = _types(tmp_path / "half.onnx")
    (add,) = net.all("Add")
    assert {types[name] for name in add.input} == {TensorProto.FLOAT}


@pytest.mark.parametrize("between", ["Expand", "Reshape"])
def test_epsilon_guards_the_division_in_half(tmp_path, between):
    """As swin_v2 does: x / max(|x|, 1e-12) of a padded, all-zero window is 0, and not 0 / 0."""
    argument = "flat_shape" if between == "Expand" else "norm_shape"
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"], name="flat"),
        helper.make_node("Shape", ["flat"], ["flat_shape"], name="shape"),
        helper.make_node("ReduceL2", ["flat", "axis"], ["length"], name="length", keepdims=1),
        helper.make_node("Max", ["length", "epsilon"], ["norm"], name="norm"),
        helper.make_node(between, ["norm", argument], ["spread"], name="spread"),
        helper.make_node("Div", ["flat", "spread"], ["unit"], name="unit"),
        helper.make_node("MatMul", ["unit", "head"], ["logits"], name="head"),
    ]
    constants = {
        "axis": np.array([1]),
        "norm_shape": np.array([-1, 1]),
        "epsilon": np.array(1e-12, dtype=np.float32),
        "head": _random(192, 10),
    }
    graph = _graph(tmp_path / "graph.onnx", nodes, constants)
    to_half(graph, tmp_path / "half.onnx")
    batch = _random(4, 3, 8, 8)
    batch[2] = 0
    half = OnnxRuntimeEngine(tmp_path / "half.onnx", fused=False, half=True).run(batch)
    assert compare(OnnxRuntimeEngine(graph).run(batch), half).sqnr > 50


def test_single_tiny_weights_do_not_keep_a_layer_float(tmp_path):
    graph = _first_conv(tmp_path / "graph.onnx")
    model = onnx.load(graph)
    weight = next(t for t in model.graph.initializer if t.name == "weight")
    array = numpy_helper.to_array(weight).copy()
    array[0, 0, 0, 0] = 1e-12
    weight.CopyFrom(numpy_helper.from_array(array, "weight"))
    onnx.save(model, graph)
    to_half(graph, tmp_path / "half.onnx")
    net, types = _types(tmp_path / "half.onnx")
    assert types[net.all("Conv")[0].input[1]] == TensorProto.FLOAT16


def test_constant_beyond_half_stays_float(tmp_path):
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"], name="flat"),
        helper.make_node("MatMul", ["flat", "head"], ["dense"], name="head"),
        helper.make_node("Mul", ["dense", "large"], ["logits"], name="scale"),
    ]
    graph = _graph(
        tmp_path / "graph.onnx", nodes, {"head": _random(192, 10), "large": np.array(1e6, dtype=np.float32)}
    )
    to_half(graph, tmp_path / "half.onnx")
    batch = _random(4, 3, 8, 8)
    want = OnnxRuntimeEngine(graph).run(batch)
    assert np.abs(want).max() > 65504
    have = OnnxRuntimeEngine(tmp_path / "half.onnx", half=True).run(batch)
    assert compare(want, have).sqnr > 50


@pytest.mark.parametrize("model", HALVES)
def test_half_graph_takes_any_batch(half, model):
    engine = OnnxRuntimeEngine(half(model), half=True)
    for batch in (1, 5):
        assert engine.run(_random(batch, 3, SIZE, SIZE)).shape == (batch, 10)


# -- tensorrt ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tensorrt(case, tmp_path_factory):
    """`tensorrt("resnet18")`: the INT8 graph for TensorRT."""

    @cache
    def make(name: str) -> Path:
        path = tmp_path_factory.mktemp("tensorrt") / "int8.onnx"
        made = case(name)
        assert quantize(made.fp32_path, made.ranges, path, rules=TARGETS["tensorrt"].int8) == [path]
        return path

    return make


def _float_source(net: Net, name: str) -> str:
    """The tensor behind casts and a Q/DQ pair."""
    while (node := net.made_by.get(name)) is not None and node.op_type in (
        "Cast",
        "QuantizeLinear",
        "DequantizeLinear",
    ):
        name = node.input[0]
    return name


TENSORRT = ["resnet18", MOBILENET, "squeezenet1_1", "tiny densenet", "tiny vit"]


@pytest.mark.parametrize("model", TENSORRT)
def test_tensorrt_graph_is_symmetric_int8_with_half_scales_and_float_bias(tensorrt, model):
    net, types = _types(tensorrt(model))
    layers = [n for n in net.nodes if n.op_type in ("Conv", "Gemm")]
    layers += [n for n in net.all("MatMul") if net.dequantizer_of(n.input[1])]
    assert layers
    for node in layers:
        weight, source = net.dequantizer_of(node.input[1]), net.dequantizer_of(node.input[0])
        assert weight is not None, node.name
        assert source is not None, node.name
        assert types[weight.input[0]] == types[source.input[0]] == TensorProto.INT8
        assert types[node.output[0]] == TensorProto.FLOAT16
        if len(node.input) > 2:
            assert types[node.input[2]] == TensorProto.FLOAT16
            assert node.input[2] in net.constants, "the bias is not quantized"
    for node in [*net.all("QuantizeLinear"), *net.all("DequantizeLinear")]:
        assert not net.constants[node.input[2]].any(), "zero points are 0"
        scale = net.constants[node.input[1]]
        assert scale.dtype == np.float16
        assert (scale > 0).all()
    assert types["input"] == types["logits"] == TensorProto.FLOAT


def test_tensorrt_weights_are_quantized_with_the_scales_that_half_holds(case, tensorrt):
    net = Net(onnx.load(tensorrt("resnet18")))
    constants = case("resnet18").fp32.constants
    for node in net.all("Conv"):
        found = net.dequantizer_of(node.input[1])
        original = next(n for n in case("resnet18").fp32.all("Conv") if n.name == node.name)
        scale = net.constants[found.input[1]].astype(np.float64).reshape(-1, 1, 1, 1)
        error = np.abs(net.constants[found.input[0]] * scale - constants[original.input[1]])
        assert (error <= scale * (0.5 + 127 * 2**-11)).all(), "half a step, and the largest may be cut off"


def test_tensorrt_quantizes_one_input_of_each_residual_add_the_identity(case, tensorrt):
    net = Net(onnx.load(tensorrt("resnet18")))
    adds = net.all("Add")
    assert len(adds) == 8
    shortcuts = 0
    for add in adds:
        quantized = [name for name in add.input if net.dequantizer_of(name)]
        assert len(quantized) == 1, add.name
        (straight,) = set(add.input) - set(quantized)
        assert net.made_by[straight].op_type == "Conv"
        assert net.quantizer_of(straight) is None
        identity = net.made_by[_float_source(net, quantized[0])]
        if identity.op_type == "Conv":
            shortcuts += 1
            assert net.attribute(identity, "kernel_shape") == [1, 1]
            assert net.attribute(net.made_by[straight], "kernel_shape") == [3, 3]
    assert shortcuts == 3, "of the two convolutions that meet, the downsampling one is the identity"


def test_tensorrt_leaves_densenets_concatenations_and_normalizations_float(tensorrt):
    net, types = _types(tensorrt("tiny densenet"))
    for node in [*net.all("Concat"), *net.all("BatchNormalization")]:
        assert not any(net.dequantizer_of(name) for name in node.input), node.name
        assert types[node.output[0]] == TensorProto.FLOAT16


@pytest.mark.parametrize("model", TENSORRT)
def test_tensorrt_graph_is_nearly_as_close_as_the_cpu_graph(case, tensorrt, model, tmp_path):
    write_twin(tensorrt(model), tmp_path / "twin.onnx")
    made = case(model)
    want = OnnxRuntimeEngine(made.fp32_path).run(made.inputs)
    ours = compare(want, OnnxRuntimeEngine(tmp_path / "twin.onnx", fused=False).run(made.inputs)).sqnr
    cpu = compare(want, OnnxRuntimeEngine(made.int8_path).run(made.inputs)).sqnr
    assert ours > cpu - 6  # one bit of the activations goes to the sign


@pytest.mark.parametrize("model", TENSORRT)
def test_twin_with_dequantized_weights_computes_the_same(case, tensorrt, model, tmp_path):
    plain, floats = tmp_path / "plain.onnx", tmp_path / "floats.onnx"
    write_twin(tensorrt(model), plain)
    write_twin(tensorrt(model), floats, dequantized=True)
    assert not any(t.data_type == TensorProto.INT8 and t.dims for t in onnx.load(floats).graph.initializer)
    inputs = case(model).inputs
    want, found = (OnnxRuntimeEngine(path, fused=False).run(inputs) for path in (plain, floats))
    assert compare(want, found).sqnr > 60


@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 3.0), (-5.0, 2.0), (0.0, 100.0), (-1e-3, 1e-3), (0.0, 1e-5)]
)
def test_symmetric_scale_puts_127_on_the_larger_magnitude(low, high):
    found = symmetric_scale(low, high)
    largest = max(-low, high)
    assert found.zero_point == 0
    assert abs(127 * float(found.scale) / largest - 1) < (
        2**-10 if largest > 0.01 or largest < 1e-4 else 2**-6
    )
    if found.scale >= np.finfo(np.float16).tiny:
        assert np.float32(np.float16(found.scale)) == found.scale


def test_symmetric_scale_of_a_dead_tensor_is_not_zero():
    assert symmetric_scale(0.0, 0.0).scale > 0


def test_half_scale_is_never_zero():
    assert half_scale(np.array([0.0, 1e-12, 1.0], dtype=np.float32)).tolist() == [2.0**-24, 2.0**-24, 1.0]


def _overflowing(path: Path) -> Path:
    """A trained network may do this: a tensor of 1e5 between two layers, and ordinary logits."""
    nodes = [
        helper.make_node("Conv", ["input", "up"], ["wide"], name="up"),
        helper.make_node("Relu", ["wide"], ["relu"], name="relu"),
        helper.make_node("Conv", ["relu", "down"], ["small"], name="down"),
        helper.make_node("GlobalAveragePool", ["small"], ["pool"], name="pool"),
        helper.make_node("Flatten", ["pool"], ["logits"], name="flat"),
    ]
    constants = {"up": 2e5 * np.abs(_random(8, 3, 1, 1)), "down": 1e-4 * _random(10, 8, 1, 1, seed=1)}
    return _graph(path, nodes, constants)


def _ranges_of(graph: Path, folder: Path, batch: np.ndarray) -> Ranges:
    for index, pixels in enumerate(np.clip(128 + 40 * batch.transpose(0, 2, 3, 1), 0, 255).astype(np.uint8)):
        Image.fromarray(pixels).save(folder / f"{index}.png")
    preprocess = PREPROCESS.model_copy(update={"resize_size": 8, "crop_height": 8, "crop_width": 8})
    files = images.scan(folder, option="--calib").images
    return collect(graph, images.ImageStream(files, preprocess, 8, folder))


def test_overflow_of_half_shows_in_the_twin_and_not_in_onnxruntimes_half_graph(tmp_path):
    graph = _overflowing(tmp_path / "graph.onnx")
    to_half(graph, tmp_path / "half.onnx")
    write_twin(tmp_path / "half.onnx", tmp_path / "twin.onnx")
    batch = _random(8, 3, 8, 8)
    assert np.isfinite(OnnxRuntimeEngine(graph).run(batch)).all()
    assert not np.isfinite(OnnxRuntimeEngine(tmp_path / "twin.onnx", fused=False).run(batch)).all()


@pytest.mark.parametrize("precision_", ["fp16", "int8"])
def test_tensors_that_overflow_half_on_the_calibration_images_stay_float(tmp_path, precision_):
    graph, folder, batch = _overflowing(tmp_path / "graph.onnx"), tmp_path / "images", _random(16, 3, 8, 8)
    folder.mkdir()
    ranges = _ranges_of(graph, folder, batch)
    assert ranges.tensors["relu"].max > 65504
    if precision_ == "fp16":
        to_half(graph, tmp_path / "mended.onnx", ranges)
    else:
        quantize(graph, ranges, tmp_path / "mended.onnx", rules=TARGETS["tensorrt"].int8)
    write_twin(tmp_path / "mended.onnx", tmp_path / "twin.onnx")
    found = OnnxRuntimeEngine(tmp_path / "twin.onnx", fused=False).run(batch)
    assert compare(OnnxRuntimeEngine(graph).run(batch), found).sqnr > (50 if precision_ == "fp16" else 20)


@pytest.mark.parametrize(
    ("equation", "plain"),
    [
        ("... i d, ... j d -> ... i j", "...id,...jd->...ij"),
        ("B H I D, B H J D -> B H I J", "abcd,abed->abce"),
        ("B a D, a D -> B D", "bac,ac->bc"),
        ("ij,jk->ik", "ij,jk->ik"),
    ],
)
def test_einsum_is_written_as_tensorrt_reads_it(tmp_path, equation, plain):
    sides = {"...": (2, 3), "i": 4, "j": 5, "d": 6, "k": 7, "B": 2, "H": 3, "I": 4, "J": 5, "D": 6, "a": 8}

    def operand(text: str, seed: int) -> np.ndarray:
        labels = text.replace("...", "_").replace(" ", "")
        shape = [n for label in labels for n in (sides["..."] if label == "_" else (sides[label],))]
        return _random(*shape, seed=seed)

    first, second = (operand(text, i) for i, text in enumerate(equation.split("->")[0].split(",")))
    node = helper.make_node("Einsum", ["first", "second"], ["logits"], name="einsum", equation=equation)
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape)
        for name, array in (("first", first), ("second", second))
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)]
    model = helper.make_model(
        helper.make_graph([node], "main", inputs, outputs),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.save(model, tmp_path / "graph.onnx")
    loaded = load(tmp_path / "graph.onnx")
    assert plain_einsum(loaded.graph) == (equation != plain)
    save(loaded, tmp_path / "plain.onnx")
    (found,) = onnx.load(tmp_path / "plain.onnx").graph.node
    assert helper.get_attribute_value(found.attribute[0]).decode() == plain
    run = ort.InferenceSession(tmp_path / "plain.onnx", providers=["CPUExecutionProvider"]).run
    (have,) = run(None, {"first": first, "second": second})
    want = np.einsum(equation.replace(" ", ""), first, second)
    np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4)
