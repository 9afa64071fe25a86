"""Equalization keeps float logits to the bit, undoes any rescaling, and saves INT8 of networks that were rescaled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support.networks import KINDS, PIXELS, PREPROCESS, conv, graph_of, network, node, random

from export_zoo.base import graph_io
from export_zoo.calibration.collect import channel_magnitudes, collect
from export_zoo.calibration.images import ImageFile, ImageStream
from export_zoo.calibration.layer_inputs import layer_statistics, scaled
from export_zoo.calibration.preprocess import Preprocess, normalize
from export_zoo.engines.parity.metrics import compare
from export_zoo.engines.precision.int8.equalize import (
    STRENGTHS,
    equalize,
    every_link,
    links,
    observed,
    scale,
    scaled_tensors,
)
from export_zoo.engines.precision.int8.qdq import quantize
from export_zoo.engines.precision.int8.saturation.channel_order import ChannelOrder, choose_order, reorder
from export_zoo.engines.precision.placement import weight_of
from export_zoo.engines.precision.twin import write_twin
from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine
from export_zoo.engines.targets.registry import TARGETS, quantized_tensors


def logits(path: Path, pixels: np.ndarray = PIXELS, preprocess: Preprocess = PREPROCESS) -> np.ndarray:
    return OnnxRuntimeEngine(path, threads=1).run(normalize(pixels, preprocess))


def rescaled(path: Path, seed: int = 0) -> Path:
    """The same function, with powers of two moved across every link."""
    model = graph_io.load(path)
    rng = np.random.default_rng(seed)
    for link in links(model.graph):
        scale(model.graph, link, np.exp2(rng.integers(-5, 6, link.channels)).astype(np.float32))
    out = path.with_name(f"{path.stem}-rescaled-{seed}.onnx")
    graph_io.save(model, out)
    return out


def equalized(path: Path, strength: float, pixels=PIXELS, preprocess=PREPROCESS) -> Path:
    model = graph_io.load(path)
    found = channel_magnitudes(path, pixels, preprocess, observed(model.graph))
    equalize(model.graph, found, strength)
    out = path.with_name(f"{path.stem}-equalized-{strength}.onnx")
    graph_io.save(model, out)
    return out


def constants(path: Path) -> list[bytes]:
    return sorted(numpy_helper.to_array(tensor).tobytes() for tensor in onnx.load(path).graph.initializer)


@pytest.mark.parametrize("kind", KINDS)
def test_scaling_keeps_the_logits_to_the_bit(kind, tmp_path):
    path = network(tmp_path / "graph.onnx", kind)
    assert len(list(links(graph_io.load(path).graph))) == KINDS[kind]
    other = rescaled(path)
    assert constants(other) != constants(path)
    assert np.array_equal(logits(other), logits(path))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", STRENGTHS)
def test_equalization_keeps_the_logits_and_forgets_any_scaling(kind, strength, tmp_path):
    path = network(tmp_path / "graph.onnx", kind)
    done = equalized(path, strength)
    assert np.array_equal(logits(done), logits(path))
    for seed in (1, 2):
        assert constants(equalized(rescaled(path, seed), strength)) == constants(done)


CLASSIFIER = [node("Flatten", "mean", "flat"), node("Gemm", "flat wl bl", "logits")]


def gated(path: Path, last: Sequence[onnx.NodeProto] = CLASSIFIER) -> Path:
    """SiLU, a squeeze-and-excitation gate, a 1x1 convolution, SiLU, and what reads the mean of the image."""
    silu = [node("Sigmoid", "c1", "s1"), node("Mul", "c1 s1", "x")]
    gate = [
        node("GlobalAveragePool", "x", "squeezed"),
        conv("squeezed g1", "reduced"),
        node("Relu", "reduced", "active"),
        conv("active g2", "expanded"),
        node("Sigmoid", "expanded", "gate"),
        node("Mul", "gate x", "product"),
    ]
    more = [conv("product w2", "c2"), node("Sigmoid", "c2", "s2"), node("Mul", "c2 s2", "y")]
    pool = node("GlobalAveragePool", "y", "mean")
    return graph_of(
        path,
        [conv("input w1 b1", "c1", pads=[1] * 4), *silu, *gate, *more, pool, *last],
        w1=random(8, 3, 3, 3, seed=1),
        b1=random(8, seed=2),
        g1=random(2, 8, 1, 1, seed=3),
        g2=random(8, 2, 1, 1, seed=4),
        w2=random(6, 8, 1, 1, seed=5),
        wl=random(6, 5, seed=6),
        bl=random(5, seed=7),
    )


def without_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    del model.graph.value_info[:]
    return model


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("gates", [False, True])
def test_means_and_gates_take_factors_and_the_logits_stay_the_same_to_the_bit(gates, strength, tmp_path):
    path = gated(tmp_path / "graph.onnx")
    model = graph_io.load(path)
    names = observed(model.graph)
    assert names == ["flat", "mean", "product"]
    found = channel_magnitudes(path, PIXELS, PREPROCESS, names)
    before = scaled_tensors(model.graph)
    assert before == {"mean", "flat", "product"}
    assert len(equalize(model.graph, found, strength, gates=gates)) == 1 + gates
    factors = {node.name for node in model.graph if str(node.name).endswith("_equalized")}
    assert factors == {"mean_equalized", *(["product_equalized"] if gates else [])}
    done = tmp_path / "done.onnx"
    graph_io.save(model, done)
    assert np.array_equal(logits(done), logits(path))
    after = channel_magnitudes(done, PIXELS, PREPROCESS, ["product", "mean_equalized_output", "squeezed"])
    assert np.array_equal(after["product"], found["product"]) is not gates
    assert not np.array_equal(after["mean_equalized_output"], found["mean"])
    squeezed = channel_magnitudes(path, PIXELS, PREPROCESS, ["squeezed"])["squeezed"]
    assert np.array_equal(after["squeezed"], squeezed), "what makes the gate keeps what it reads"
    # Layers that read scaled channels may still change places with their factors.
    reorder(model.graph, choose_order(model.graph))
    graph_io.save(model, tmp_path / "reordered.onnx")
    assert np.allclose(logits(tmp_path / "reordered.onnx"), logits(path), rtol=1e-4, atol=1e-5)


def test_channels_with_a_factor_change_places_together_with_it(tmp_path):
    path = gated(tmp_path / "graph.onnx")
    model = graph_io.load(path)
    found = channel_magnitudes(path, PIXELS, PREPROCESS, observed(model.graph))
    equalize(model.graph, found, 0.75, gates=True)
    swapped = np.array([1, 0, 3, 2, 5, 4, 7, 6])
    nodes = {str(node.name) for node in model.graph}
    made = dict.fromkeys(("c1", "expanded", "product_equalized"), swapped)
    assert made.keys() <= nodes
    reorder(model.graph, ChannelOrder(made, {"reduced": swapped, "c2": swapped}))
    graph_io.save(model, tmp_path / "reordered.onnx")
    assert np.allclose(logits(tmp_path / "reordered.onnx"), logits(path), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_times_the_factors_are_those_of_the_equalized_graph(kind, tmp_path):
    path = network(tmp_path / "graph.onnx", kind)
    model = graph_io.load(path)
    factors = equalize(model.graph, channel_magnitudes(path, PIXELS, PREPROCESS, observed(model.graph)), 0.25)
    graph_io.save(model, tmp_path / "done.onnx")
    layers = [str(node.name) for node in model.graph if weight_of(node) is not None]
    assert factors.keys() <= set(layers)
    assert any((found != 1).any() for found in factors.values())
    before, after = (
        dict(layer_statistics(graph, PIXELS, PREPROCESS, layers, largest=1000))
        for graph in (path, tmp_path / "done.onnx")
    )
    for name, found in before.items():
        have = scaled(found, factors[name]) if name in factors else found
        assert np.array_equal(have.mean, after[name].mean)
        assert np.array_equal(have.moments, after[name].moments)


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_have_the_magnitudes_of_all_channels_that_equalization_asks_for(kind, tmp_path):
    path = network(tmp_path / "graph.onnx", kind)
    want = channel_magnitudes(path, PIXELS, PREPROCESS, observed(graph_io.load(path).graph))
    found = collect(path, Pixels(PIXELS, PREPROCESS))
    for name, magnitudes in want.items():
        assert np.allclose(found.tensors[name].magnitudes(), magnitudes, rtol=1e-5), (
            "one image at a time differs by rounding"
        )


def test_a_mean_of_a_gates_product_is_scaled_once(tmp_path):
    path = gated(tmp_path / "graph.onnx")
    model = onnx.load(path)
    # The mean is that of the product itself, as if the second convolution were not there.
    for made in model.graph.node:
        if made.op_type == "GlobalAveragePool" and made.input[0] == "y":
            made.input[0] = "product"
        if made.op_type == "Gemm":
            made.input[1] = "wide"
    model.graph.initializer.append(numpy_helper.from_array(random(8, 5, seed=8), "wide"))
    onnx.save(onnx.shape_inference.infer_shapes(without_shapes(model), strict_mode=True), path)
    graph = graph_io.load(path).graph
    assert {str(link.activation.name) for link in every_link(graph, gates=True)} == {"product"}
    assert {str(link.activation.name) for link in every_link(graph)} == {"mean"}


def test_a_mean_that_something_else_reads_is_left_alone(tmp_path):
    path = gated(tmp_path / "graph.onnx", [*CLASSIFIER[:1], node("Softmax", "flat", "logits")])
    assert observed(graph_io.load(path).graph) == ["product"]


def test_a_wrong_factor_would_be_seen(tmp_path):
    path = network(tmp_path / "graph.onnx", "conv")
    model = graph_io.load(path)
    link = next(links(model.graph))
    link.readers.clear()
    scale(model.graph, link, np.full(8, 2, np.float32))
    graph_io.save(model, tmp_path / "wrong.onnx")
    assert not np.allclose(logits(tmp_path / "wrong.onnx"), logits(path))


@pytest.mark.parametrize(
    "between",
    [
        [node("Sigmoid", "c1", "x")],
        [node("Clip", "c1 low high", "x")],
        [node("Relu", "c1", "r"), node("Add", "r c1", "x")],
        [node("Relu", "c1", "r"), node("Mul", "r r", "x")],
    ],
)
def test_what_is_not_homogeneous_or_has_another_reader_is_left_alone(between, tmp_path):
    path = graph_of(
        tmp_path / "graph.onnx",
        [
            conv("input w1", "c1"),
            *between,
            conv("x w2", "y"),
            node("GlobalMaxPool", "y", "p"),
            node("Flatten", "p", "logits"),
        ],
        w1=random(8, 3, 1, 1, seed=1),
        w2=random(5, 8, 1, 1, seed=2),
        low=np.float32(0),
        high=np.float32(6),
    )
    assert list(links(graph_io.load(path).graph)) == []


def through_relu6(path: Path) -> Path:
    """Two convolutions with a ReLU6 between them, of whose 8 channels the first half reach 6."""
    weight = random(8, 3, 1, 1, seed=1)
    weight[:4] *= 40
    weight[4:] /= 8
    return graph_of(
        path,
        [
            conv("input w1 b1", "c1"),
            node("Clip", "c1 low high", "x"),
            conv("x w2", "y"),
            node("GlobalMaxPool", "y", "p"),
            node("Flatten", "p", "logits"),
        ],
        w1=weight,
        b1=np.abs(random(8, seed=3)) / 8,
        w2=random(5, 8, 1, 1, seed=2),
        low=np.float32(0),
        high=np.float32(6),
    )


@pytest.mark.parametrize("strength", STRENGTHS)
def test_through_relu6_only_what_stays_under_it_is_scaled_and_only_where_asked_for(strength, tmp_path):
    path = through_relu6(tmp_path / "graph.onnx")
    model = graph_io.load(path)
    names = observed(model.graph, approximate=True)
    found = channel_magnitudes(path, PIXELS, PREPROCESS, names)
    assert not equalize(model.graph, found, strength)
    assert len(equalize(model.graph, found, strength, approximate=True)) == 1
    graph_io.save(model, tmp_path / "done.onnx")
    after = channel_magnitudes(tmp_path / "done.onnx", PIXELS, PREPROCESS, names)["x"]
    full = found["x"] >= 6
    assert 0 < full.sum() < 8
    assert np.array_equal(after[full], found["x"][full])
    assert (after[~full] > found["x"][~full]).any()
    assert after[~full].max() <= 0.8 * 6
    assert np.array_equal(logits(tmp_path / "done.onnx"), logits(path)), "on the images it was calibrated on"


def test_channels_that_never_move_change_nothing_for_the_others(tmp_path):
    path = network(tmp_path / "graph.onnx", "conv")
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor).copy()
        if tensor.name == "w1":
            array[2] = 0
        elif tensor.name == "b1":
            array[2] = -1  # 0 behind the Relu
        elif tensor.name == "w2":
            array[:, 2] = 1e4
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, path)
    done = equalized(path, 0.25)
    assert np.array_equal(logits(done), logits(path))
    weights = next(
        numpy_helper.to_array(t) for t in onnx.load(done).graph.initializer if t.dims == [8, 8, 3, 3]
    )
    assert np.abs(weights[:, 2]).max() < 4 * np.median(np.abs(weights).max(axis=(0, 2, 3)))


# -- trained networks --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory) -> Path:
    from export_zoo.exporter.cli.app import main

    out = tmp_path_factory.mktemp("equalize") / "bundle"
    assert main([*map(str, [*digits.arguments(), "--out", out])]) == 0
    return next((out / "files").glob("resnet18.*.onnx"))


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    import digits as recipe

    return recipe.digits()[0][1::2]


DIGITS = PREPROCESS.model_copy(
    update={
        "resize_size": 32,
        "crop_height": 32,
        "crop_width": 32,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }
)


class Pixels(ImageStream):
    """A stream of pixels that are there already."""

    def __init__(self, array: np.ndarray, preprocess: Preprocess = DIGITS) -> None:
        files = [ImageFile(Path(), str(i), f"{i:064}", None) for i in range(len(array))]
        super().__init__(files, preprocess, 8, Path())
        self.array = array

    def __iter__(self):
        self.images = list(self.files)
        for start in range(0, len(self.array), 8):
            yield self.array[start : start + 8]


def int8_sqnr(path: Path, fp32: Path, pixels: np.ndarray, target: str) -> float:
    """SQNR of the INT8 graph of `path` to the float logits of `fp32`, in dB, on images not calibrated on."""
    ranges = collect(path, Pixels(pixels[:128]), histograms=quantized_tensors(graph_io.load(path).graph))
    out = path.with_name(f"{path.stem}-{target}.onnx")
    quantize(path, ranges, out, rules=TARGETS[target].int8)
    if target == "tensorrt":
        write_twin(out, out.with_suffix(".twin.onnx"))
        out = out.with_suffix(".twin.onnx")
    held_out = normalize(pixels[400:528], DIGITS)
    found = OnnxRuntimeEngine(out, fused=target != "tensorrt").run(held_out)
    return compare(OnnxRuntimeEngine(fp32).run(held_out), found).sqnr


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
@pytest.mark.slow
def test_a_rescaled_network_is_quantized_within_a_decibel_of_the_network_before(trained, pixels, target):
    plain = int8_sqnr(trained, trained, pixels, target)
    twin = rescaled(trained, 7)
    assert np.array_equal(logits(twin, pixels[:32], DIGITS), logits(trained, pixels[:32], DIGITS))
    assert int8_sqnr(twin, trained, pixels, target) < 5, "without equalization nothing is left"
    saved = max(
        int8_sqnr(equalized(twin, strength, pixels[:64], DIGITS), trained, pixels, target)
        for strength in STRENGTHS
    )
    assert saved > plain - 1
