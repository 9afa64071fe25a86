"""Graphs of one layer, with images and wide ranges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export_zoo.calibration.preprocess import Preprocess
from export_zoo.calibration.ranges import Ranges, TensorRange
from support.ranges import ranges_with

PREPROCESS = Preprocess(
    resize_size=12,
    crop_height=12,
    crop_width=12,
    interpolation="bilinear",
    mean=(0.2, 0.3, 0.4),  # far from the images' mean, so that there is a bias to correct
    std=(0.25, 0.25, 0.25),
    source="test",
)

PIXELS = np.random.default_rng(0).integers(60, 256, (10, 12, 12, 3), dtype=np.uint8)

LAYERS = {
    "plain": ((7, 3, 3, 3), {}),
    "padded": ((7, 3, 3, 3), {"pads": [1, 2, 0, 1]}),
    "strided": ((7, 3, 5, 3), {"strides": [2, 3], "pads": [2, 1, 2, 1]}),
    "dilated": ((7, 3, 3, 3), {"dilations": [2, 3]}),
    "grouped": ((6, 1, 3, 3), {"group": 3, "pads": [1] * 4}),
}


def layer(path: Path, kind: str, weight: np.ndarray, bias: np.ndarray) -> Path:
    """Convolution of `kind`, or a dense layer behind a Flatten, whose output is the graph's."""
    if kind in LAYERS:
        nodes = [helper.make_node("Conv", ["input", "w", "b"], ["logits"], name="layer", **LAYERS[kind][1])]
    else:
        nodes = [
            helper.make_node("Flatten", ["input"], ["flat"], name="flatten"),
            helper.make_node(
                "Gemm", ["flat", "w", "b"], ["logits"], name="layer", transB=int(kind == "transposed")
            ),
        ]
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 12, 12])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model, strict_mode=True), path)
    return path


def network(path: Path, kind: str) -> tuple[Path, np.ndarray]:
    """A layer with random weights, and those."""
    rng = np.random.default_rng(1)
    shape = LAYERS[kind][0] if kind in LAYERS else (5, 432) if kind == "transposed" else (432, 5)
    weight = (rng.normal(size=shape) * 0.2).astype(np.float32)
    bias = rng.normal(size=shape[1] if kind == "gemm" else shape[0]).astype(np.float32)
    return layer(path, kind, weight, bias), weight


def wide_ranges(graph: Path) -> Ranges:
    """-4 to 4 of all tensors of such a graph."""
    return ranges_with(
        graph, PREPROCESS, {name: TensorRange(min=-4.0, max=4.0) for name in ("input", "flat", "logits")}
    )
