"""Weights are rounded so that a layer's output changes least: never worse than to nearest, near the best there is."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from support.layers import LAYERS, PIXELS, PREPROCESS, network, wide_ranges
from threadpoolctl import threadpool_limits

from export_zoo.base import graph_io
from export_zoo.calibration.layer_inputs import input_sizes, layer_statistics
from export_zoo.calibration.preprocess import normalize
from export_zoo.engines.precision.int8.qdq import quantize
from export_zoo.engines.precision.int8.rounding import (
    LARGEST,
    output_error,
    round_small_groups,
    round_to_least_error,
    rounding,
)
from export_zoo.engines.precision.int8.saturation.pairs import NONE, overflowing, within_pairs
from export_zoo.engines.targets.registry import TARGETS


def moments_of(graph: Path, pixels: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Second moments of the inputs of `layer`."""
    found = layer_statistics(graph, pixels, PREPROCESS, ["layer"], largest=LARGEST)
    return [(name, statistics.moments) for name, statistics in found]


def correlated(size: int, seed: int) -> np.ndarray:
    """Second moments of inputs that have a common part."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(200, size)) + 2 * rng.normal(size=(200, 1))
    return x.T @ x / len(x)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 150), st.integers(1, 6), st.booleans())
def test_no_channel_is_worse_than_rounded_to_nearest(seed, size, channels, paired):
    rng = np.random.default_rng(seed)
    scaled = rng.uniform(-127, 127, size=(channels, size))
    moments = correlated(size, seed)
    partners = some_pairs(rng, size) if paired else None
    found = round_to_least_error(scaled, moments, partners)
    assert np.array_equal(found, np.rint(found))
    assert np.abs(found).max() <= 127
    nearest = np.rint(scaled)
    if partners is not None:
        assert not overflowing(found, partners).any()
        nearest = within_pairs(nearest, partners)
    assert (output_error(found - scaled, moments) <= output_error(nearest - scaled, moments)).all()


def some_pairs(rng: np.random.Generator, size: int) -> np.ndarray:
    """Partners of about two thirds of some inputs, anywhere among them."""
    some = rng.permutation(size)[: 2 * (size // 3)].reshape(-1, 2)
    partners = np.full(size, NONE)
    partners[some[:, 0]], partners[some[:, 1]] = some[:, 1], some[:, 0]
    return partners


def test_a_pair_that_overflows_is_rounded_near_the_least_error():
    moments, scaled = correlated(4, 3), np.array([[100.2, 90.7, -20.3, 5.5], [-127.0, -3.4, 60.1, 70.9]])
    partners = np.array([1, 0, 3, 2])
    found = round_to_least_error(scaled, moments, partners)
    fits = np.array(list(itertools.product(range(-127, 128), repeat=2)))
    fits = fits[np.abs(fits.sum(axis=1)) <= 128]  # of one sign or of two
    for row, have in zip(scaled, found, strict=True):
        # Every first pair that is allowed, with the second pair that makes up for it best, unrounded.
        error = fits - row[:2]
        rest = -error @ moments[:2, 2:] @ np.linalg.inv(moments[2:, 2:])
        best = output_error(np.concatenate([error, rest], axis=1), moments).min()
        assert output_error((have - row)[None], moments)[0] < 1.5 * best + 2.0


def test_the_error_is_near_the_least_of_all_roundings_up_and_down():
    scaled = np.random.default_rng(0).uniform(-100, 100, size=(40, 8))
    moments = correlated(8, 1)
    up_or_down = np.array(list(itertools.product((0, 1), repeat=8)))
    best = np.array(
        [output_error(np.floor(row) + up_or_down - row, moments).min() for row in scaled]
    )  # all 256 of each channel
    found = output_error(round_to_least_error(scaled, moments) - scaled, moments)
    nearest = output_error(np.rint(scaled) - scaled, moments)
    assert found.mean() < 1.5 * best.mean()
    assert nearest.mean() > 2 * best.mean()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 3), st.integers(1, 12))
def test_many_groups_at_once_are_rounded_like_each_alone(seed, groups, channels, size):
    scaled = np.random.default_rng(seed).uniform(-140, 140, size=(groups, channels, size))
    moments = np.stack([correlated(size, seed + group) for group in range(groups)])
    found = round_small_groups(scaled, moments)
    want = np.stack([round_to_least_error(*both) for both in zip(scaled, moments, strict=True)])
    assert np.array_equal(found, want)


def test_inputs_that_do_not_vary_together_are_rounded_to_nearest():
    scaled = np.random.default_rng(0).uniform(-100, 100, size=(5, 300))
    assert np.array_equal(round_to_least_error(scaled, np.diag(np.arange(300.0))), np.rint(scaled))


def inputs_of(kind: str, pixels: np.ndarray) -> np.ndarray:
    """[groups, samples, K], by definition: one place after the other."""
    x = normalize(pixels, PREPROCESS).astype(np.float64)
    if kind not in LAYERS:
        return x.reshape(1, len(x), -1)
    (channels, per_group, height, width), attributes = LAYERS[kind]
    del channels
    (top, left, bottom, right), (down, across) = (
        attributes.get("pads", [0] * 4),
        attributes.get("strides", [1, 1]),
    )
    rows, columns = attributes.get("dilations", [1, 1])
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    found = []
    for y in range(0, x.shape[2] - (height - 1) * rows, down):
        for z in range(0, x.shape[3] - (width - 1) * columns, across):
            patch = x[
                :, :, y : y + (height - 1) * rows + 1 : rows, z : z + (width - 1) * columns + 1 : columns
            ]
            found.append(patch.reshape(len(x), 3 // per_group, -1))
    return np.concatenate(found).swapaxes(0, 1)


@pytest.mark.parametrize("kind", [*LAYERS, "gemm", "transposed"])
def test_moments_are_those_of_all_places(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("export_zoo.calibration.layer_inputs.PLACES", 1000)
    graph, _ = network(tmp_path / "graph.onnx", kind)
    want = inputs_of(kind, PIXELS)
    ((name, found),) = moments_of(graph, PIXELS)
    assert name == "layer"
    assert input_sizes(graph, ["layer"]) == {"layer": (len(want), want.shape[2])}
    want = want.swapaxes(1, 2) @ want / want.shape[1]
    assert (np.abs(found - want) <= 1e-4 * np.maximum(1, np.abs(want))).all()


def test_how_many_cores_there_are_does_not_show(tmp_path, monkeypatch):
    graph, _ = network(tmp_path / "graph.onnx", "transposed")
    found = []
    for cores in (1, 4):
        monkeypatch.setattr("export_zoo.calibration.layer_inputs.usable_cores", lambda cores=cores: cores)
        monkeypatch.setattr(
            "export_zoo.engines.precision.int8.rounding.usable_cores", lambda cores=cores: cores
        )
        with threadpool_limits(limits=cores, user_api="blas"):
            moments = moments_of(graph, PIXELS.repeat(20, axis=0))
            found.append(
                (
                    moments[0][1].tobytes(),
                    rounding(graph_io.load(graph).graph, moments, TARGETS["onnxruntime"].int8),
                )
            )
    (first, one), (second, four) = found
    assert first == second
    assert np.array_equal(one["layer"], four["layer"])


def test_moments_of_some_places_resemble_those_of_all(tmp_path):
    graph, _ = network(tmp_path / "graph.onnx", "padded")
    ((_, found),) = moments_of(graph, PIXELS)
    want = inputs_of("padded", PIXELS)
    want = want.swapaxes(1, 2) @ want / want.shape[1]
    assert 0 < np.linalg.norm(found - want) < 0.3 * np.linalg.norm(want)


@pytest.mark.parametrize("kind", [*LAYERS, "gemm", "transposed"])
@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_the_graph_has_the_rounded_weights_and_its_layer_is_nearer(kind, target, tmp_path):
    graph, weight = network(tmp_path / "graph.onnx", kind)
    coarse = np.random.default_rng(2).integers(0, 256, (120, 4, 4, 3), dtype=np.uint8)
    pixels = coarse.repeat(3, axis=1).repeat(3, axis=2)  # neighbours resemble each other
    moments = moments_of(graph, pixels[:80])
    steps = rounding(graph_io.load(graph).graph, moments, TARGETS[target].int8)
    ranges = wide_ranges(graph)

    def error(**options) -> float:
        """Mean squared error of the layer's output, of inputs that it was not rounded for, and of float ones."""
        out = tmp_path / "int8.onnx"
        quantize(graph, ranges, out, rules=TARGETS[target].int8, **options)
        stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer}
        integers = stored["layer_weight_quantized"].astype(np.float64)
        scales = next(a for n, a in stored.items() if n.startswith("layer_weight_scale")).astype(np.float64)
        assert np.abs(integers).max() <= 127
        axis = 1 if kind == "gemm" else 0
        shaped = scales.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
        difference = np.moveaxis(integers * shaped - weight, axis, 0).reshape(weight.shape[axis], -1)
        x = inputs_of(kind, pixels[80:])
        by_group = difference.reshape(len(x), -1, x.shape[2])
        return float(((x @ by_group.swapaxes(1, 2)) ** 2).mean())

    assert error(rounding=steps) < 0.8 * error()
