"""Bias correction takes from each output channel the mean that rounding the weights adds, and no more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.layers import LAYERS, PIXELS, PREPROCESS, layer, network, wide_ranges

from export_zoo.base import graph_io
from export_zoo.calibration.layer_inputs import _patches, layer_statistics
from export_zoo.calibration.preprocess import normalize
from export_zoo.engines.precision.int8.qdq import quantize
from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine
from export_zoo.engines.targets.registry import TARGETS


@pytest.fixture(autouse=True)
def every_place(monkeypatch):
    monkeypatch.setattr("export_zoo.calibration.layer_inputs.PLACES", 1000)


def means_of(graph: Path, *layers: str) -> dict[str, np.ndarray]:
    found = layer_statistics(graph, PIXELS, PREPROCESS, layers, largest=0)
    return {name: statistics.mean for name, statistics in found}


def by_channel(path: Path) -> np.ndarray:
    """Mean of each output channel over images and places."""
    found = OnnxRuntimeEngine(path, fused=False).run(normalize(PIXELS, PREPROCESS)).astype(np.float64)
    return found.mean(axis=tuple(i for i in range(found.ndim) if i != 1))


@pytest.mark.parametrize("kind", [*LAYERS, "gemm", "transposed"])
@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_means_of_output_channels_are_those_of_the_float_layer(kind, target, tmp_path):
    graph, weight = network(tmp_path / "graph.onnx", kind)
    means = means_of(graph, "layer")

    # The rounded weights are judged: the layer, in float, with them and the bias that the INT8 graph has.
    ranges = wide_ranges(graph)

    units = [4e-3]  # of TensorRT's bias, which is stored in half

    def rounded(corrected: bool) -> np.ndarray:
        out = tmp_path / f"{corrected}.onnx"
        quantize(graph, ranges, out, rules=TARGETS[target].int8, means=means if corrected else None)
        stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer}
        integers = next(a for n, a in stored.items() if n == "layer_weight_quantized")
        scales = next(a for n, a in stored.items() if n.startswith("layer_weight_scale")).astype(np.float32)
        axis = 1 if kind == "gemm" else 0
        shaped = scales.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
        if target == "onnxruntime":
            units[:] = stored["layer_bias_scale"].tolist()
            kept = stored["layer_bias_quantized"] * stored["layer_bias_scale"]
        else:
            prefix = "layer_bias_corrected" if corrected else "b"
            kept = next(a for n, a in stored.items() if n == prefix or n.startswith(f"{prefix}_"))
        return by_channel(
            layer(tmp_path / f"float-{corrected}.onnx", kind, integers * shaped, kept.astype(np.float32))
        )

    want = by_channel(graph)
    before, after = (np.abs(rounded(corrected) - want).max() for corrected in (False, True))
    assert after < 0.5 * max(units) + 2e-5  # the bias is rounded to its unit, and float32 sums are
    assert before > 3 * after


def test_layers_that_share_an_input_have_means_of_their_own(tmp_path):
    nodes = [
        helper.make_node("Conv", ["input", "w", "b"], ["x"], name="first", pads=[1] * 4),
        helper.make_node("Conv", ["input", "w", "b"], ["y"], name="second"),
        helper.make_node("GlobalAveragePool", ["x"], ["logits"], name="pool"),
    ]
    weight = np.ones((2, 3, 3, 3), np.float32)
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 12, 12])],
        [helper.make_empty_tensor_value_info(name) for name in ("logits", "y")],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.zeros(2, np.float32), "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model, strict_mode=True), tmp_path / "graph.onnx")
    means = means_of(tmp_path / "graph.onnx", "first", "second")
    inputs = normalize(PIXELS, PREPROCESS).astype(np.float64)
    assert means["second"].reshape(3, 3, 3)[:, 1, 1] == pytest.approx(
        inputs[:, :, 1:11, 1:11].mean(axis=(0, 2, 3)), rel=1e-6
    )
    padded = np.pad(inputs, ((0, 0), (0, 0), (1, 1), (1, 1)))
    assert means["first"].reshape(3, 3, 3)[:, 0, 2] == pytest.approx(
        padded[:, :, :12, 2:14].mean(axis=(0, 2, 3)), rel=1e-6
    )


def test_images_together_visit_every_place(tmp_path, monkeypatch):
    graph, _ = network(tmp_path / "graph.onnx", "padded")
    monkeypatch.setattr("export_zoo.calibration.layer_inputs.PLACES", 7)
    node = next(node for node in graph_io.load(graph).graph if node.name == "layer")
    shape = normalize(PIXELS[:1], PREPROCESS).shape
    places = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)  # every value occurs once
    seen = [_patches(node, places, index) for index in range(np.prod(shape[2:]))]
    assert all(found.shape[:2] == (1, 7) for found in seen)
    assert set(np.concatenate(seen).ravel()) == {0, *places.ravel()}, "0 is padding"
