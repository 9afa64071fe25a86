"""Which tensors gain by a smaller range, and that only those get one."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support.networks import PREPROCESS, network
from support.ranges import ranges_with

from export_zoo.base import graph_io
from export_zoo.calibration.histogram import Accumulator
from export_zoo.calibration.ranges import TensorRange
from export_zoo.engines.precision.int8.clipping import worth_clipping
from export_zoo.engines.precision.int8.qdq import quantize
from export_zoo.engines.targets.registry import TARGETS


def tensor(values: np.ndarray) -> TensorRange:
    rows = values.astype(np.float32).reshape(1, -1)
    accumulator = Accumulator(1)
    accumulator.add(rows, worker=0, sampled=False)
    low, high = float(rows.min()), float(rows.max())
    return TensorRange(min=low, max=high, histogram=accumulator.histogram(low, high).encode())


@pytest.fixture
def case(tmp_path):
    """conv -> relu r1 -> conv -> x -> pooling -> gemm: r1 has a long tail, x two shorter ones, the others none."""
    graph = network(tmp_path / "graph.onnx", "conv")
    rng = np.random.default_rng(0)
    ranges = ranges_with(
        graph,
        PREPROCESS,
        {
            "input": tensor(rng.uniform(-1, 1, 20000)),
            "r1": tensor(np.abs(rng.laplace(size=4_000_000))),
            "x": tensor(rng.laplace(size=400_000)),
            "p": tensor(rng.uniform(0, 1, 20000)),
            "f": tensor(rng.uniform(0, 1, 20000)),
        },
    )
    return graph, ranges


@pytest.mark.parametrize(
    ("target", "tensors"),
    # Without a sign, 256 levels instead of 127 have less to gain; TensorRT does not quantize x.
    [("onnxruntime", ["x", "r1"]), ("tensorrt", ["r1"])],
)
def test_those_that_save_most_come_first_and_those_that_save_nothing_not_at_all(case, target, tensors):
    graph, ranges = case
    assert worth_clipping(graph_io.load(graph).graph, ranges, TARGETS[target].int8, ()) == tensors


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_a_clipped_tensor_alone_has_the_range_of_least_error(case, target, tmp_path):
    graph, ranges = case

    def scales(**options) -> dict[str, np.ndarray]:
        quantize(graph, ranges, tmp_path / "int8.onnx", rules=TARGETS[target].int8, **options)
        stored = onnx.load(tmp_path / "int8.onnx").graph.initializer
        found = {
            t.name.partition("_scale")[0]: numpy_helper.to_array(t) for t in stored if "_scale" in t.name
        }
        return {name: float(found[name]) for name in ("r1", "input")}

    plain, one, best = scales(), scales(clipped=["r1"]), scales(method="mse")
    assert one["r1"] == best["r1"] < 0.9 * plain["r1"]
    assert one["input"] == plain["input"] > 0
