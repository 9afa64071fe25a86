"""--keep-float: which layers a pattern names, and that they alone stay float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.options import UNTUNED

from export_zoo.base.errors import UsageError
from export_zoo.base.graph_io import load, save
from export_zoo.calibration.ranges import Ranges
from export_zoo.engines.precision.int8.keep_float import kept_float
from export_zoo.engines.precision.int8.qdq import quantize
from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine
from export_zoo.engines.targets.onnxruntime.kernels import keep_float_layers
from export_zoo.engines.targets.registry import TARGETS


@pytest.fixture(scope="module")
def exported(digits, tmp_path_factory) -> Path:
    """A bundle of mobilenet_v2 on digits: depthwise convolutions, residual adds, few channels."""
    from export_zoo.exporter.cli.app import main

    out = tmp_path_factory.mktemp("keep") / "bundle"
    arguments = [*digits.arguments("mobilenet_v2"), "--precision", "int8", *digits.tuned_once(), *UNTUNED]
    assert main([*map(str, [*arguments, "--out", out])]) == 0
    return out


@pytest.fixture(scope="module")
def graph(exported) -> Path:
    return next(path for path in (exported / "files").glob("mobilenet_v2.*.onnx"))


@pytest.fixture(scope="module")
def ranges(exported) -> Ranges:
    return Ranges.read(next((exported / "files").glob("ranges.*.json")))


def _float_layers(path: Path) -> set[str]:
    """Convolutions and dense layers whose weight is not a DequantizeLinear's output."""
    nodes = onnx.load(path).graph.node
    dequantized = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    layers = ("Conv", "FusedConv", "Gemm", "FusedMatMul")
    return {n.name for n in nodes if n.op_type in layers and n.input[1] not in dequantized}


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize(
    ("patterns", "count"),
    [
        ([], 0),
        (["@depthwise"], 17),
        (["@few-channels"], 1),
        (["features.0"], 1),
        (["features.1"], 2),
        (["features.0", "classifier.*"], 2),
        (["node_linear"], 1),
    ],
)
def test_what_a_pattern_names_stays_float_and_nothing_else(graph, ranges, tmp_path, target, patterns, count):
    quantize(graph, ranges, tmp_path / "int8.onnx", rules=TARGETS[target].int8, keep_float=patterns)
    kept = kept_float(load(graph).graph, patterns)
    assert len(kept) == count
    assert _float_layers(tmp_path / "int8.onnx") == kept


def _optimized(path: Path) -> onnx.GraphProto:
    """What ONNX Runtime makes of a graph."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path.with_suffix(".optimized.onnx")), 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath).graph


@pytest.mark.parametrize("pattern", ["features.3.conv.1", "features.8.conv.0", "features.9.conv.2"])
def test_onnxruntime_computes_a_layer_in_float_that_lies_between_others(graph, ranges, tmp_path, pattern):
    """It quantizes float weights between Q/DQ pairs itself, with one scale for all channels, if it can."""
    path = tmp_path / "int8.onnx"
    quantize(graph, ranges, path, rules=TARGETS["onnxruntime"].int8, keep_float=[pattern])
    (kept,) = kept_float(load(graph).graph, [pattern])
    integer = [node.name for node in _optimized(path).node if node.op_type.startswith("QLinear")]
    assert integer
    assert kept not in {name.partition("_token_")[0] for name in integer}


@pytest.mark.parametrize("kind", ["conv", "grouped", "transposed", "dense"])
@pytest.mark.parametrize("activation", [None, "Relu", "Clip"])
def test_weights_between_pairs_stay_float_whatever_the_layer(tmp_path, kind, activation):
    rng = np.random.default_rng(0)
    shape = {"conv": (6, 4, 3, 3), "grouped": (6, 2, 3, 3), "transposed": (4, 6, 2, 2), "dense": (4, 6)}[kind]
    weight = rng.standard_normal(shape).astype(np.float32)
    weight[0] *= 300  # with one scale for all, little would be left of the others
    op = {"transposed": "ConvTranspose", "dense": "Gemm"}.get(kind, "Conv")
    attributes = {"group": 2} if kind == "grouped" else {}
    inputs = ["x", "w"] if kind == "grouped" else ["x", "w", "b"]
    image = [] if kind == "dense" else [5, 5]
    constants = {
        "w": weight,
        "b": np.arange(6, dtype=np.float32),
        "s": np.float32(0.02),
        "o": np.float32(2.0),
    }
    constants |= {"z": np.uint8(128), "low": np.float32(0.0), "high": np.float32(300.0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["x"]),
        helper.make_node(op, inputs, ["y"], name="layer", **attributes),
    ]
    last = "y"
    if activation is not None:
        limits = ["low", "high"] if activation == "Clip" else []
        nodes.append(helper.make_node(activation, ["y", *limits], ["a"]))
        last = "a"
    nodes.append(helper.make_node("QuantizeLinear", [last, "o", "z"], ["p"]))
    nodes.append(helper.make_node("DequantizeLinear", ["p", "o", "z"], ["output"]))
    described = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 4, *image])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(described, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model), tmp_path / "layer.onnx")
    changed = load(tmp_path / "layer.onnx")
    assert keep_float_layers(changed.graph) == 1
    save(changed, tmp_path / "kept.onnx")
    batch = rng.standard_normal((64, 4, *image)).astype(np.float32)
    exact = OnnxRuntimeEngine(tmp_path / "layer.onnx", fused=False).run(batch)
    spoilt, kept = (OnnxRuntimeEngine(tmp_path / f"{name}.onnx").run(batch) for name in ("layer", "kept"))
    assert np.abs(kept - exact).max() <= 2.0, "one step at most"
    assert np.abs(spoilt - exact).max() > 2.0, "else ONNX Runtime leaves such weights alone, and we need not"


def test_identity_of_a_residual_add_stays_float_beside_a_convolution_that_does(graph, ranges, tmp_path):
    def quantizers(path: Path) -> int:
        return sum(node.op_type == "QuantizeLinear" for node in onnx.load(path).graph.node)

    quantize(graph, ranges, tmp_path / "all.onnx", rules=TARGETS["tensorrt"].int8)
    # The projection that ends block 3 is added to the block's input; float, it fuses with no int8 identity.
    quantize(
        graph, ranges, tmp_path / "one.onnx", rules=TARGETS["tensorrt"].int8, keep_float=["features.3.conv.2"]
    )
    # Its own input is quantized no more; the identity is the input of the block's first convolution, too.
    assert quantizers(tmp_path / "one.onnx") == quantizers(tmp_path / "all.onnx") - 1
    quantize(
        graph,
        ranges,
        tmp_path / "both.onnx",
        rules=TARGETS["tensorrt"].int8,
        keep_float=["features.3.conv.2", "features.3.conv.0"],
    )
    assert quantizers(tmp_path / "both.onnx") == quantizers(tmp_path / "all.onnx") - 2


@pytest.mark.parametrize("pattern", ["nothing.like.it", "@narrow", "features.0.2", ""])
def test_a_pattern_that_names_nothing_is_refused_with_some_names(graph, pattern):
    with pytest.raises(UsageError, match="--keep-float") as raised:
        kept_float(load(graph).graph, [pattern])
    assert "@depthwise" in raised.value.hint


def test_keeping_everything_is_refused(graph, ranges, tmp_path):
    with pytest.raises(UsageError, match="nothing to quantize"):
        quantize(graph, ranges, tmp_path / "int8.onnx", keep_float=["*"], rules=TARGETS["onnxruntime"].int8)
    assert not (tmp_path / "int8.onnx").exists()


def test_it_reaches_the_engine_and_stands_in_the_manifest(digits, cli, tmp_path):
    arguments = [*digits.arguments(), "--precision", "int8", "--calib", digits.images]
    arguments += UNTUNED
    done = cli(*arguments, "--keep-float", "layer4.*", "--keep-float", "fc", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert done.json["recipe"]["keep_float"] == ["layer4.*", "fc"]
    (engine,) = done.json["engines"]
    kept = _float_layers(tmp_path / "out" / engine["file"]["path"])
    assert len(kept) == 6, "five convolutions of layer4 and the classifier"


def test_without_int8_it_is_said_to_have_no_effect(digits, cli, tmp_path):
    given = ["--keep-float", "fc", "--steps", "round", "--method", "mse"]
    done = cli(*digits.arguments(), *given, "--out", tmp_path / "out")
    assert done.code == 0
    for option in ("--keep-float", "--steps", "--method"):
        assert any(f"{option} has no effect" in warning for warning in done.json["warnings"])


def test_a_pattern_that_names_nothing_is_a_usage_error(digits, cli, tmp_path):
    arguments = [*digits.arguments(), "--precision", "int8", "--calib", digits.images]
    done = cli(*arguments, "--keep-float", "layer9", "--out", tmp_path / "out")
    assert done.code == 2
    assert "layer9" in done.json["error"]["message"]
    assert not (tmp_path / "out").exists()
