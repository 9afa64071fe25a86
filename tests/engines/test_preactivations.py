"""The lowest input of SiLU, Hardswish and GELU that 8 bits need."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.networks import conv, graph_of, node, random
from torch.nn import functional

from export_zoo.base import graph_io
from export_zoo.calibration.ranges import Ranges, TensorRange
from export_zoo.engines.precision.int8.preactivations import activations_behind, least_input
from export_zoo.engines.precision.int8.qdq import quantize
from export_zoo.engines.targets.registry import TARGETS

FUNCTIONS = {"SiLU": functional.silu, "Gelu": functional.gelu, "HardSwish": functional.hardswish}


@pytest.mark.parametrize("high", [0.5, 6.0, 40.0])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_lies_below_is_lost_by_less_than_half_a_step(function, high):
    low = least_input(function, high)
    below = torch.linspace(low - 60, low, 10_000, dtype=torch.float64)
    step = (high - low) / 255
    assert FUNCTIONS[function](below).abs().max() <= 0.51 * step
    assert -8 < low < -0.7


def test_hardswish_needs_nothing_below_minus_three():
    assert least_input("HardSwish", 1e-3) == pytest.approx(-3, abs=0.02)


BEHIND = {
    "SiLU": [node("Sigmoid", "c", "s"), node("Mul", "s c", "x")],
    "HardSwish": [node("HardSwish", "c", "x")],
    "Gelu": [node("Gelu", "c", "x")],
    "Relu": [node("Relu", "c", "x")],
    "two readers": [node("HardSwish", "c", "h"), node("Add", "h c", "x")],
    "another product": [node("Sigmoid", "c", "s"), node("Mul", "s c", "z"), node("Mul", "c z", "x")],
}


@pytest.mark.parametrize("kind", BEHIND)
def test_range_in_front_of_an_activation_ends_where_the_activation_forgets(kind, tmp_path):
    path = graph_of(
        tmp_path / "graph.onnx",
        [
            conv("input w1", "c"),  # 3x3: its output has 8 bits
            *BEHIND[kind],
            conv("x w2", "y"),
            node("GlobalMaxPool", "y", "p"),
            node("Flatten", "p", "logits"),
        ],
        w1=random(8, 3, 3, 3, seed=1),
        w2=random(5, 8, 1, 1, seed=2),
    )
    graph = graph_io.load(path).graph
    assert activations_behind(graph) == ({"c": kind} if kind in FUNCTIONS else {})
    tensors = {str(v.name): TensorRange(min=-25.0, max=5.0) for n in graph for v in n.outputs}
    tensors["input"] = TensorRange(min=-1.0, max=1.0)
    ranges = Ranges.model_construct(graph_sha256=graph_io.sha256_of(path), tensors=tensors)
    quantize(path, ranges, tmp_path / "int8.onnx", rules=TARGETS["onnxruntime"].int8)
    made = graph_io.load(tmp_path / "int8.onnx").graph
    name = "x" if kind == "Relu" else "c"
    scale = float(made.initializers[f"{name}_scale"].const_value.numpy())
    low = least_input(kind, 5.0) if kind in FUNCTIONS else -25.0
    assert math.isclose(scale, (5.0 - low) / 255, rel_tol=1e-6)
    assert np.isclose(
        -low / scale, int(made.initializers[f"{name}_zero_point"].const_value.numpy()), atol=0.51
    )
