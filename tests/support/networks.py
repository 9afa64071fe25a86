"""Small networks of 16x16 images with layers that can be equalized."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export_zoo.calibration.preprocess import Preprocess

PREPROCESS = Preprocess(
    resize_size=16,
    crop_height=16,
    crop_width=16,
    interpolation="bilinear",
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    source="test",
)


def random(*shape: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * 0.4).astype(np.float32)


def graph_of(path: Path, nodes: list[onnx.NodeProto], **weights: np.ndarray) -> Path:
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model, strict_mode=True), path)
    return path


def conv(inputs: str, output: str, **attributes) -> onnx.NodeProto:
    return helper.make_node("Conv", inputs.split(), [output], name=output, **attributes)


def node(op_type: str, inputs: str, output: str, **attributes) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs.split(), [output], name=output, **attributes)


def network(path: Path, kind: str) -> Path:
    """A network in which `kind` stands between a first convolution of 8 channels and the logits."""
    first = [conv("input w1 b1", "c1", pads=[1] * 4), node("Relu", "c1", "r1")]
    weights = {"w1": random(8, 3, 3, 3, seed=1), "b1": random(8, seed=2)}
    last = [node("GlobalAveragePool", "x", "p"), node("Flatten", "p", "f"), node("Gemm", "f wl bl", "logits")]
    weights |= {"wl": random(8, 5, seed=3), "bl": random(5, seed=4)}
    match kind:
        case "conv":
            middle = [conv("r1 w2 b2", "x")]
            weights |= {"w2": random(8, 8, 3, 3, seed=5), "b2": random(8, seed=6)}
        case "depthwise":
            middle = [conv("r1 w2 b2", "d", group=8), node("Relu", "d", "e"), conv("e w3", "x")]
            weights |= {
                "w2": random(8, 1, 3, 3, seed=5),
                "b2": random(8, seed=6),
                "w3": random(8, 8, 1, 1, seed=7),
            }
        case "grouped":
            middle = [conv("r1 w2", "x", group=2)]
            weights |= {"w2": random(8, 4, 3, 3, seed=5)}
        case "pooled":
            middle = [node("MaxPool", "r1", "m", kernel_shape=[2, 2]), conv("m w2", "x")]
            weights |= {"w2": random(8, 8, 3, 3, seed=5)}
        case "two readers":
            middle = [conv("r1 w2", "a"), conv("r1 w3", "b"), node("Add", "a b", "x")]
            weights |= {"w2": random(8, 8, 1, 1, seed=5), "w3": random(8, 8, 1, 1, seed=6)}
        case "concat":
            middle = [
                conv("input w4", "c4", pads=[1] * 4),
                node("Relu", "c4", "r4"),
                node("Concat", "r4 r1", "both", axis=1),
                conv("both w2", "x"),
            ]
            weights |= {"w2": random(8, 14, 1, 1, seed=5), "w4": random(6, 3, 3, 3, seed=6)}
        case "flat":
            middle = []
            last = [
                node("MaxPool", "r1", "x", kernel_shape=[8, 8], strides=[8, 8]),
                node("Flatten", "x", "f"),
                node("Gemm", "f wl bl", "logits"),
            ]
            weights["wl"] = random(32, 5, seed=3)
    return graph_of(path, [*first, *middle, *last], **weights)


KINDS = {"conv": 2, "depthwise": 3, "grouped": 2, "pooled": 2, "two readers": 1, "concat": 3, "flat": 1}
"""Networks, and how many of their layers can be scaled: the last convolution reaches the Gemm through the pooling."""

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
