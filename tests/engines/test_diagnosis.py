"""Diagnosis: mixtures of float and rounded layers, and planted faults, which must be found."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support.options import PREPROCESS_FILE, UNTUNED
from support.paths import ROOT

from export_zoo.base import graph_io
from export_zoo.base.errors import BadInputError, UsageError
from export_zoo.engines.bundle.reader import read_manifest
from export_zoo.engines.diagnosis.diagnose import Subject, diagnose
from export_zoo.engines.diagnosis.ranking import effect
from export_zoo.engines.precision.fp16.half import halve
from export_zoo.engines.precision.placement import activated
from export_zoo.engines.precision.rewrites import remove_unused_initializers
from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine
from export_zoo.exporter.cli.app import main

MODELS = ("resnet18", "mobilenet_v2", "squeezenet1_1")
IMAGES = 16


@pytest.fixture(scope="module")
def bundles(digits, tmp_path_factory) -> dict[str, Path]:
    """A bundle of each network with FP32 and untuned INT8 engines; that of resnet18 for both families of targets."""
    found = {}
    for model in MODELS:
        out = tmp_path_factory.mktemp("bundles") / model
        arguments = [*digits.arguments(model), "--calib", digits.images, *UNTUNED, "--batch", "8"]
        arguments += ["--precision", "fp32", "--precision", "int8", "--target", "onnxruntime"]
        arguments += ["--target", "tensorrt-rtx"] if model == "resnet18" else []
        arguments += ["--tolerance", "sqnr=-100", "--tolerance", "top1=0", "--tolerance", "accuracy_drop=1"]
        arguments += ["--verify-images", "128"]
        assert main([*map(str, arguments), "--out", str(out), "--quiet"]) == 0
        found[model] = out
    return found


def replanted(bundle: Path, out: Path, name: str, change: Callable[[ir.Graph], str]) -> tuple[Path, str]:
    """A copy of a bundle in which the graph of an engine is changed, and what `change` returns."""
    shutil.copytree(bundle, out)
    document = json.loads((out / "manifest.json").read_text())
    engine = next(e for e in document["artifacts"]["engines"] if e["name"] == name)
    file = engine["graph"] or engine["file"]
    model = graph_io.load(out / file["path"])
    told = change(model.graph)
    _replace(out, document, file, model)
    return out, told


def _replace(bundle: Path, document: dict, file: dict, model: ir.Model) -> None:
    old = bundle / file["path"]
    new = old.with_name(f"changed-{old.name}")
    graph_io.save(model, new)
    data = new.read_bytes()
    file.update(path=f"files/{new.name}", sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
    (bundle / "manifest.json").write_text(json.dumps(document))


def _weights(graph: ir.Graph) -> list[ir.Node]:
    """DequantizeLinears of int8 weights, in the order of the layers."""
    nodes = [node for node in graph if node.op_type == "DequantizeLinear"]
    return [
        n
        for n in nodes
        if n.inputs[0].const_value is not None and n.name.endswith("_weight_DequantizeLinear")
    ]


def _middle(graph: ir.Graph, fits: Callable[[ir.Node], bool] = lambda node: True) -> ir.Node:
    found = [node for node in _weights(graph) if fits(node)]
    return found[len(found) // 2]


def _set(value: ir.Value, array: np.ndarray) -> None:
    value.const_value = ir.tensor(np.ascontiguousarray(array), name=value.name)


def _layer_of(node: ir.Node) -> str:
    return node.name.removesuffix("_weight_DequantizeLinear")


def corrupt_scale(graph: ir.Graph) -> str:
    node = _middle(graph)
    _set(node.inputs[1], node.inputs[1].const_value.numpy() * 4)
    return _layer_of(node)


def swap_channels(graph: ir.Graph) -> str:
    node = _middle(graph)
    weight = node.inputs[0].const_value.numpy().copy()
    norms = np.abs(weight.reshape(len(weight), -1).astype(float)).sum(axis=1)
    first, second = np.argsort(norms)[[-1, 0]]
    weight[[first, second]] = weight[[second, first]]
    _set(node.inputs[0], weight)
    return _layer_of(node)


def wrong_axis(graph: ir.Graph) -> str:
    """Weights were divided by the scales of their input channels."""

    def square(node: ir.Node) -> bool:
        shape = node.inputs[0].const_value.shape.numpy()
        return len(shape) == 4 and shape[0] == shape[1]

    node = _middle(graph, square) if any(map(square, _weights(graph))) else None
    if node is None:
        pytest.skip("no weight has as many output as input channels")
    weight, scale = (node.inputs[index].const_value.numpy().astype(float) for index in (0, 1))
    along = scale.reshape(-1, 1, 1, 1) / scale.reshape(1, -1, 1, 1)
    _set(node.inputs[0], np.clip(np.round(weight * along), -127, 127).astype(np.int8))
    return _layer_of(node)


def range_of_another(graph: ir.Graph) -> str:
    """A tensor that a layer reads gets the scale of another, which is less than half of its own."""

    def scale(node: ir.Node) -> float:
        return float(node.inputs[1].const_value.numpy().reshape(-1)[0])

    def is_read(node: ir.Node) -> bool:
        (pair,) = (use.node for use in node.outputs[0].uses())
        return all(use.node.op_type in ("Conv", "Gemm") for use in pair.outputs[0].uses())

    quantizes = [node for node in graph if node.op_type == "QuantizeLinear"]
    smallest = min(quantizes, key=scale)
    wide = [n for n in quantizes if scale(n) > 2 * scale(smallest) and is_read(n)]
    chosen = wide[len(wide) // 2]
    for node in [chosen, *(use.node for use in chosen.outputs[0].uses())]:
        for index in (1, 2):
            node.replace_input_with(index, smallest.inputs[index])
    return chosen.name.removesuffix("_QuantizeLinear")


@pytest.mark.parametrize(
    ("model", "target"), [*((model, "onnxruntime") for model in MODELS), ("resnet18", "tensorrt-rtx")]
)
def test_without_roundings_a_mixture_is_eager_and_with_all_it_is_the_engine(bundles, model, target):
    subject = Subject(bundles[model], f"{target}-int8")
    eager = subject.held.logits
    batches = subject.batches(0, len(eager))
    exact = subject.outputs((), batches)
    assert np.abs(exact - eager).max() <= 1e-4 * np.abs(eager).max()
    names = [layer.name for layer in subject.layers]
    found = subject.outputs(names, batches)
    file, _ = subject.engine.precision_graph()
    engine = OnnxRuntimeEngine(subject.bundle / file.path, fused=target == "onnxruntime")
    wanted = np.concatenate([engine.run(batch) for batch in batches])
    # Other sums of floats put single values on the other side of a step, so only the powers of errors agree.
    engines, mixtures = (float(effect(exact, other).noise.sum()) for other in (wanted, found))
    assert mixtures == pytest.approx(engines, rel=0.3)


@pytest.mark.parametrize("fault", [corrupt_scale, swap_channels, wrong_axis])
@pytest.mark.parametrize("model", MODELS)
def test_a_planted_fault_in_weights_is_the_worst_layer(bundles, model, fault, tmp_path):
    bundle, layer = replanted(bundles[model], tmp_path / "bundle", "onnxruntime-int8", fault)
    found = diagnose(bundle, "onnxruntime-int8", images=IMAGES)
    assert found.worst[0] == layer
    figures = next(one for one in found.layers if one.name == layer)
    assert figures.weights < min(figures.clipping or 200, figures.rounding or 200)
    assert found.mended[1].sqnr > found.mended[0].sqnr + 3


@pytest.mark.parametrize("model", MODELS)
def test_a_range_from_the_wrong_tensor_is_found_by_what_it_clips(bundles, model, tmp_path):
    bundle, tensor = replanted(bundles[model], tmp_path / "bundle", "onnxruntime-int8", range_of_another)
    subject = Subject(bundle, "onnxruntime-int8")
    concerned = {
        name
        for name, node in subject.nodes.items()
        if tensor in (node.inputs[0].name, activated(node.outputs[0]).name)
    }
    found = diagnose(bundle, "onnxruntime-int8", images=IMAGES)
    assert found.worst[0] in concerned
    figures = next(one for one in found.layers if one.name == found.worst[0])
    assert figures.clipping < min(figures.weights, figures.rounding)


@pytest.mark.parametrize("model", MODELS)
def test_an_overflow_in_half_is_found(bundles, model, tmp_path):
    """A layer's outputs are 2^n times as large, and those that read them divide by as much."""
    out = tmp_path / "bundle"
    shutil.copytree(bundles[model], out)
    document = json.loads((out / "manifest.json").read_text())
    engine = next(e for e in document["artifacts"]["engines"] if e["name"] == "onnxruntime-int8")
    model_graph = graph_io.load(out / document["recipe"]["graph"]["path"])
    graph = model_graph.graph

    def readers(value: ir.Value) -> list[ir.Node]:
        return [use.node for use in value.uses()]

    def rescalable(node: ir.Node) -> bool:
        made = readers(node.outputs[0])
        after = made[0].outputs[0] if [one.op_type for one in made] == ["Relu"] else node.outputs[0]
        return node.op_type == "Conv" and {one.op_type for one in readers(after)} == {"Conv"}

    first = [node for node in graph if rescalable(node)][1]
    (*relu,) = (node for node in readers(first.outputs[0]) if node.op_type == "Relu")
    following = readers(relu[0].outputs[0] if relu else first.outputs[0])
    # Its weights just fit: nodes with constants that half cannot hold stay float.
    largest = max(np.abs(first.inputs[index].const_value.numpy()).max() for index in (1, 2))
    power = 2.0 ** np.floor(np.log2(6e4 / largest))
    for node, index, factor in [
        (first, 1, power),
        (first, 2, power),
        *((n, 1, 1 / power) for n in following),
    ]:
        value = node.inputs[index]
        _set(value, value.const_value.numpy() * np.float32(factor))
    _replace(out, document, document["recipe"]["graph"], model_graph)
    half = model_graph.clone()
    halve(half.graph, None)
    remove_unused_initializers(half.graph)
    _replace(out, document, engine["file"], half)
    engine |= {"name": "onnxruntime-fp16", "precision": "fp16", "tuning": None}
    (out / "manifest.json").write_text(json.dumps(document))
    found = diagnose(out, "onnxruntime-fp16", images=IMAGES)
    worst = {one.name: one for one in found.layers}[found.worst[0]]
    concerned = [graph_io.module_of(node) for node in (first, *relu, *following)]
    assert worst.module in concerned
    assert worst.sqnr == -200


def test_layers_have_their_modules_times_and_sizes(bundles):
    found = diagnose(bundles["resnet18"], "onnxruntime-int8", images=IMAGES)
    assert [layer.module for layer in found.layers][:2] == ["conv1", "layer1.0.conv1"]
    assert found.layers[-1].module == "fc"
    assert 0.8 < sum(layer.bytes for layer in found.layers) / found.bytes <= 1
    assert 0.5 < sum(layer.ms for layer in found.layers) / found.ms <= 1
    assert sum(layer.share for layer in found.layers) == pytest.approx(1)
    assert found.mended[-1].sqnr > 80
    for layer in found.layers:
        assert sum(layer.input.counts) > 0
        assert layer.input.min <= layer.input.low + 0.02 * abs(layer.input.max)


def test_what_cannot_be_diagnosed_is_refused(bundles, tmp_path):
    with pytest.raises(BadInputError, match="rounds nothing"):
        diagnose(bundles["resnet18"], "onnxruntime-fp32")
    with pytest.raises(BadInputError, match="no engine 'none'"):
        diagnose(bundles["resnet18"], "none")
    with pytest.raises(UsageError, match="--images 2: layers are judged on at least 4"):
        diagnose(bundles["resnet18"], images=2)
    with pytest.raises(BadInputError, match="not a bundle"):
        diagnose(tmp_path)

    def renamed(graph: ir.Graph) -> str:
        node = next(node for node in graph if node.op_type == "Conv")
        node.name = "another"
        return ""

    bundle, _ = replanted(bundles["resnet18"], tmp_path / "bundle", "onnxruntime-int8", renamed)
    with pytest.raises(
        BadInputError, match="node 'another' of the engine's graph is not that of the FP32 graph"
    ):
        diagnose(bundle, "onnxruntime-int8")


def test_the_engine_with_the_lowest_sqnr_is_chosen(bundles):
    engines = read_manifest(bundles["resnet18"]).artifacts.engines
    lowest = min(engines, key=lambda engine: engine.gate.eager_metrics["sqnr"])
    assert Subject(bundles["resnet18"]).engine.name == lowest.name


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_layers_of_a_transformer_are_modules_with_several_kinds_of_nodes(photos, tmp_path, precision):
    """With LayerNormalization, GELU, attention, and nodes that split tensors or compute shapes."""
    out = tmp_path / "vit"
    (tmp_path / "p.json").write_text(json.dumps(PREPROCESS_FILE))
    arguments = [
        f"{ROOT / 'tests' / 'own_networks.py'}:vision_transformer",
        "--preprocess",
        tmp_path / "p.json",
    ]
    arguments += ["--weights", "none", "--precision", precision, "--target", "onnxruntime", "--calib", photos]
    arguments += ["--tolerance", "sqnr=-100", "--verify-images", "32", "--batch", "8", *UNTUNED]
    main([*map(str, arguments), "--out", str(out), "--quiet"])
    bundle = out if out.exists() else out.with_name("vit.failed")
    found = diagnose(bundle, f"onnxruntime-{precision}", images=8)
    modules = {layer.module for layer in found.layers}
    assert {"conv_proj", "encoder.layers.encoder_layer_0.mlp.0", "heads.head"} <= modules
    assert found.mended[-1].sqnr > 80
    assert all(layer.sqnr is None or layer.sqnr > 5 for layer in found.layers)


GATED = """
import torch
from torch import nn

class Gated(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.expand = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 1)
        self.depthwise, self.project = nn.Conv2d(32, 32, 3, 1, 1, groups=32), nn.Conv2d(32, 16, 1)
        self.reduce, self.gate = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.head, self.act = nn.Linear(16, num_classes), nn.SiLU()
        with torch.no_grad():
            self.depthwise.weight.mul_(40)  # values far below 0, where SiLU is 0

    def forward(self, x):
        x = self.act(self.depthwise(self.act(self.expand(self.act(self.stem(x))))))
        x = x * torch.sigmoid(self.gate(self.act(self.reduce(x.mean((2, 3), keepdim=True)))))
        return self.head(self.project(x).mean((2, 3)))
"""


@pytest.fixture(scope="module")
def gated(digits, tmp_path_factory) -> Callable[..., Path]:
    """Makes a bundle of a small network with SiLU and a squeeze-and-excitation gate."""
    folder = tmp_path_factory.mktemp("gated")
    (folder / "gated.py").write_text(GATED)
    (folder / "preprocess.json").write_text(json.dumps(PREPROCESS_FILE))

    def make(*options: str) -> Path:
        out = folder / f"bundle{'-'.join(options)}"
        arguments = [f"{folder}/gated.py:Gated", "--preprocess", f"{folder}/preprocess.json", *UNTUNED]
        arguments += [
            "--calib",
            str(digits.images),
            "--precision",
            "int8",
            "--target",
            "onnxruntime",
            *options,
        ]
        arguments += ["--tolerance", "sqnr=-100", "--tolerance", "top1=0", "--tolerance", "accuracy_drop=1"]
        assert main([*arguments, "--out", str(out), "--quiet"]) == 0
        return out

    return make


def test_layers_with_float_outputs_have_errors_of_their_own(gated):
    """Pointwise convolutions before SiLU are written as integer products, which are several nodes."""
    layers = {layer.module: layer for layer in diagnose(gated(), images=8).layers}
    assert {"stem", "expand", "depthwise", "project", "head"} <= layers.keys()
    for name in ("stem", "expand", "depthwise", "project", "head"):
        assert layers[name].weights is not None
        assert layers[name].rounding is not None
        assert 20 < layers[name].rounding < 80


def test_a_range_that_ends_where_silu_is_zero_clips_nothing(gated):
    depthwise = next(layer for layer in diagnose(gated(), images=8).layers if layer.module == "depthwise")
    assert depthwise.clipping is None or depthwise.clipping > 45


@pytest.mark.parametrize(("options", "pools"), [((), 1), (("--keep-float", "depthwise"), 2)])
def test_the_mean_behind_a_float_convolution_takes_its_layout(gated, options, pools):
    """The gate's mean; that of the head is of 8 bits. ReduceMean is several times as slow behind a float Conv."""
    bundle = gated(*options)
    engine = read_manifest(bundle).artifacts.engines[0]
    operators = [node.op_type for node in graph_io.load(bundle / engine.file.path).graph]
    assert operators.count("GlobalAveragePool") == pools
