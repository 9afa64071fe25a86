"""Channels change places so that neighbours cannot overflow 16 bits; the network computes the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from export_zoo.base import graph_io
from export_zoo.engines.precision.int8.saturation import channel_order
from export_zoo.engines.precision.int8.saturation.channel_order import (
    _add_excess,
    _kernel,
    _matched,
    choose_order,
    reorder,
)

SIZE = 8


def network(path: Path, nodes: list[tuple], weights: dict[str, np.ndarray], outputs: int = 5) -> Path:
    """A graph of [N, 3, 8, 8] images with all shapes inferred; nodes are (type, inputs, output, attributes)."""
    made = [helper.make_node(kind, ins, [out], name=out, **more) for kind, ins, out, more in nodes]
    graph = helper.make_graph(
        made,
        "network",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info(made[-1].output[0], TensorProto.FLOAT, ["batch", outputs])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True), path)
    return path


def heavy(*shape: int, seed: int) -> np.ndarray:
    """Weights of which some are much larger than the others, so that neighbours overflow."""
    rng = np.random.default_rng(seed)
    return rng.standard_t(2, size=shape) / np.sqrt(np.prod(shape[1:]))


CONV = {"kernel_shape": [1, 1]}


def everything(path: Path) -> Path:
    """A residual, a depthwise layer, squeeze and excitation, a scalar product, a Concat and a grouped layer."""
    nodes = [
        ("Conv", ["input", "stem", "stem_b"], "c0", {}),
        ("Relu", ["c0"], "x", {}),
        ("Conv", ["x", "expand"], "c1", CONV),
        ("HardSwish", ["c1"], "e", {}),
        ("Conv", ["e", "depthwise", "depthwise_b"], "d", {"group": 16, "pads": [1, 1, 1, 1]}),
        ("GlobalAveragePool", ["d"], "pooled", {}),
        ("Conv", ["pooled", "squeeze"], "s0", CONV),
        ("Relu", ["s0"], "s1", {}),
        ("Conv", ["s1", "excite"], "s2", CONV),
        ("Sigmoid", ["s2"], "s3", {}),
        ("Mul", ["s3", "factors"], "s4", {}),
        ("Mul", ["d", "s4"], "scaled", {}),
        ("Conv", ["scaled", "project"], "p", CONV),
        ("Add", ["x", "p"], "r", {}),
        ("Mul", ["r", "half"], "halved", {}),
        ("Conv", ["halved", "branch"], "b", CONV),
        ("Concat", ["halved", "b"], "both", {"axis": 1}),
        ("Conv", ["both", "grouped"], "g", {"group": 2, **CONV}),
        ("Conv", ["g", "last"], "l", CONV),
        ("GlobalAveragePool", ["l"], "m", {}),
        ("Flatten", ["m"], "f", {"axis": 1}),
        ("Gemm", ["f", "fc", "fc_b"], "h", {"transB": 1}),
        ("Relu", ["h"], "hr", {}),
        ("Gemm", ["hr", "head"], "logits", {}),
    ]
    shapes = {
        "stem": (8, 3, 3, 3),
        "stem_b": (8,),
        "expand": (16, 8, 1, 1),
        "depthwise": (16, 1, 3, 3),
        "depthwise_b": (16,),
        "squeeze": (6, 16, 1, 1),
        "excite": (16, 6, 1, 1),
        "factors": (16, 1, 1),
        "project": (8, 16, 1, 1),
        "branch": (4, 8, 1, 1),
        "grouped": (12, 6, 1, 1),
        "last": (10, 12, 1, 1),
        "fc": (9, 10),
        "fc_b": (9,),
        "head": (9, 5),
    }
    weights = {name: heavy(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    return network(path, nodes, {**weights, "half": np.array(0.5)})


def logits(path: Path) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    inputs = np.random.default_rng(9).normal(size=(4, 3, SIZE, SIZE)).astype(np.float32)
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"input": inputs})[0]


def test_a_reordered_network_computes_the_same(tmp_path):
    path = everything(tmp_path / "graph.onnx")
    model = graph_io.load(path)
    order = choose_order(model.graph)
    reorder(model.graph, order)
    graph_io.save(model, tmp_path / "reordered.onnx")
    np.testing.assert_allclose(logits(tmp_path / "reordered.onnx"), logits(path), rtol=1e-4, atol=1e-5)
    # Tensors that a Concat, a grouped layer or the outside sees keep their order: x is joined with `both` by the Add.
    assert set(order.read) == {"s0", "s2", "p", "h", "logits"}
    assert set(order.made) == {"c1", "d", "s2", "s4", "s0", "l", "h"}


@pytest.mark.parametrize(
    "kind", ["BatchNormalization", "Transpose", "Softmax", "per-channel Mul", "two outputs"]
)
def test_channels_keep_their_order_where_something_else_reads_them(tmp_path, kind):
    between: dict[str, list[tuple]] = {
        "BatchNormalization": [("BatchNormalization", ["c", "s", "b", "m", "v"], "y", {})],
        "Transpose": [("Transpose", ["c"], "t", {"perm": [0, 1, 3, 2]}), ("Relu", ["t"], "y", {})],
        "Softmax": [("Softmax", ["c"], "y", {"axis": 1})],
        "per-channel Mul": [("Mul", ["channels", "c"], "y", {})],
        "two outputs": [("Relu", ["c"], "y", {})],
    }
    nodes = [
        ("Conv", ["input", "w"], "c", CONV),
        *between[kind],
        ("Conv", ["y", "u"], "z", CONV),
        ("GlobalAveragePool", ["z"], "pooled", {}),
        ("Flatten", ["pooled"], "logits", {"axis": 1}),
    ]
    one = np.ones(8)
    weights = {"w": heavy(8, 3, 1, 1, seed=1), "u": heavy(5, 8, 1, 1, seed=2)}
    used = {name for _, inputs, _, _ in nodes for name in inputs}
    more = {"s": one, "b": one, "m": one, "v": one, "channels": np.arange(1.0, 9).reshape(8, 1, 1)}
    path = network(
        tmp_path / "graph.onnx", nodes, {**weights, **{k: v for k, v in more.items() if k in used}}
    )
    model = graph_io.load(path)
    if kind == "two outputs":
        model.graph.outputs.append(next(v for node in model.graph for v in node.outputs if v.name == "c"))
    order = choose_order(model.graph)
    assert (dict(order.made), dict(order.read)) == ({}, {})


def test_without_anything_between_they_change_places(tmp_path):
    nodes = [
        ("Conv", ["input", "w"], "c", CONV),
        ("Conv", ["c", "u"], "z", CONV),
        ("GlobalAveragePool", ["z"], "pooled", {}),
        ("Flatten", ["pooled"], "logits", {"axis": 1}),
    ]
    weights = {"w": heavy(8, 3, 1, 1, seed=1), "u": np.zeros((5, 8, 1, 1))}
    weights["u"][:, :4, 0, 0] = 1.0  # four large ones, two pairs of them
    path = network(tmp_path / "graph.onnx", nodes, weights)
    order = choose_order(graph_io.load(path).graph)
    pairs = order.read["z"].reshape(-1, 2)
    assert sorted(order.read["z"]) == list(range(8))
    assert ((pairs < 4).sum(axis=1) == 1).all()
    assert np.array_equal(order.made["c"], order.read["z"])
    weights["u"][:, :4, 0, 0] = [1.0, -1.0, 1.0, -1.0]  # of two signs: nothing overflows
    order = choose_order(graph_io.load(network(path, nodes, weights)).graph)
    assert not order.read


@pytest.mark.parametrize("shape", [(16,), (1,), (1, 16), (1, 1)])
def test_a_dense_layers_bias_may_have_any_shape(shape, tmp_path):
    nodes = [
        ("GlobalAveragePool", ["input"], "pooled", {}),
        ("Flatten", ["pooled"], "flat", {}),
        ("Gemm", ["flat", "w1", "b1"], "h", {"transB": 1}),
        ("Relu", ["h"], "r", {}),
        ("Gemm", ["r", "w2"], "logits", {"transB": 1}),
    ]
    weights = {"w1": heavy(16, 3, seed=1), "w2": heavy(5, 16, seed=2), "b1": heavy(*shape, seed=3)}
    path = network(tmp_path / "dense.onnx", nodes, weights)
    model = graph_io.load(path)
    order = choose_order(model.graph)
    assert bool(order.made) == (shape == (16,))
    reorder(model.graph, order)
    graph_io.save(model, tmp_path / "reordered.onnx")
    batch = np.random.default_rng(0).normal(size=(2, 3, SIZE, SIZE)).astype(np.float32)
    before, after = (
        ort.InferenceSession(p, providers=["CPUExecutionProvider"]).run(None, {"input": batch})[0]
        for p in (path, tmp_path / "reordered.onnx")
    )
    assert np.allclose(after, before, rtol=1e-5, atol=1e-5)


def test_a_graph_with_branches_is_left_alone(tmp_path):
    model = graph_io.load(everything(tmp_path / "graph.onnx"))
    body = ir.Graph([], [], nodes=[], name="body")
    node = next(iter(model.graph))
    node.attributes["body"] = ir.AttrGraph("body", body)
    assert not choose_order(model.graph).made


def test_a_shared_weight_is_reordered_for_one_reader_only(tmp_path):
    nodes = [
        ("Conv", ["input", "w"], "c", CONV),
        ("Conv", ["c", "u"], "one", CONV),
        ("Conv", ["one", "u"], "two", CONV),
        ("GlobalAveragePool", ["two"], "pooled", {}),
        ("Flatten", ["pooled"], "logits", {"axis": 1}),
    ]
    weights = {"w": heavy(8, 3, 1, 1, seed=1), "u": heavy(8, 8, 1, 1, seed=5)}
    path = network(tmp_path / "graph.onnx", nodes, weights, outputs=8)
    model = graph_io.load(path)
    order = choose_order(model.graph)
    assert {"one", "two"} <= set(order.read)
    assert not np.array_equal(order.read["one"], np.arange(8))
    reorder(model.graph, order)
    graph_io.save(model, tmp_path / "reordered.onnx")
    np.testing.assert_allclose(logits(tmp_path / "reordered.onnx"), logits(path), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [2, 3, 8, 31, 64])
def test_a_matching_has_each_channel_once_and_costs_little(size):
    rng = np.random.default_rng(size)
    cost = np.triu(rng.random((size, size)) ** 8, 1)
    cost += cost.T
    pairs = _matched(cost)
    assert len(pairs) == size // 2
    assert len(set(pairs.ravel().tolist())) == 2 * (size // 2)
    neighbours = np.arange(2 * (size // 2)).reshape(-1, 2)
    found, before = (cost[p[:, 0], p[:, 1]].sum() for p in (pairs, neighbours))
    assert found <= before
    if size >= 31:
        assert found < 0.05 * before


def test_machine_code_adds_what_python_adds():
    rows = np.random.default_rng(0).uniform(-127, 127, size=(20, 12))
    slow, fast = np.zeros((12, 12)), np.zeros((12, 12))
    _add_excess(rows, slow)
    _kernel()(rows, fast)
    assert slow.any()
    np.testing.assert_array_equal(slow, fast)
    by_definition = sum(
        np.maximum(s * r[:, None] + s * r[None, :] - 128, 0) ** 2 for r in rows for s in (1, -1)
    )
    np.fill_diagonal(by_definition, 0.0)
    np.fill_diagonal(slow, 0.0)
    np.testing.assert_allclose(slow + slow.T, by_definition)


@pytest.mark.parametrize(("most", "filters"), [(10**9, 64), (1, 1)])
def test_of_a_dense_layer_as_a_vggs_some_filters_are_looked_at(most, filters, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(channel_order, "_kernel", lambda: lambda rows, cost: seen.append(len(rows)))
    monkeypatch.setattr(channel_order, "_MAX_WORK", most)
    nodes = [
        ("GlobalAveragePool", ["input"], "pooled", {}),
        ("Flatten", ["pooled"], "flat", {}),
        ("Gemm", ["flat", "w1"], "h", {"transB": 1}),
        ("Gemm", ["h", "w2"], "logits", {"transB": 1}),
    ]
    weights = {"w1": heavy(16, 3, seed=1), "w2": heavy(64, 16, seed=2)}
    path = network(tmp_path / "dense.onnx", nodes, weights, outputs=64)
    choose_order(graph_io.load(path).graph)
    assert seen == [filters]
