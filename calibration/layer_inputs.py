"""Statistics of layer inputs for bias correction and rounding: means and second moments."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from math import gcd
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from export_zoo.base import graph_io
from export_zoo.base.machine import one_blas_thread, usable_cores
from export_zoo.calibration.observe import Observer
from export_zoo.calibration.preprocess import Pixels, Preprocess

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

PLACES = 16
"""Number of positions per image at which a convolution's input is sampled for its second moments."""

MOMENTS = 512 << 20
"""Bytes of second moments that are held at once. A network with more is run several times."""

_AT_ONCE = 1024
"""Number of input samples of a layer that are multiplied at once."""


class _Windows:
    """The patches of a padded input that a Conv (explicit pads) multiplies with its weight."""

    def __init__(self, node: ir.Node) -> None:
        weight = node.inputs[1]
        assert weight is not None
        assert weight.shape is not None
        self._kernel = weight.shape.numpy()[2:]
        self._strides = node.attributes.get_ints("strides", [1, 1])
        self._dilations = node.attributes.get_ints("dilations", [1, 1])
        self._pads = node.attributes.get_ints("pads", [0, 0, 0, 0])

    def _padded(self, array: Float32Array) -> Float32Array:
        top, left, bottom, right = self._pads
        return np.pad(array, ((0, 0), (0, 0), (top, bottom), (left, right)))

    def mean(self, array: Float32Array) -> Float64Array:
        """Mean patch, float64 [C, kH, kW], of [N, C, H, W].

        Columns are summed first, then rows: kH + kW sums instead of kH * kW.
        """
        padded = self._padded(array)
        rows, columns = (
            [range(k * step, size - (kernel - 1 - k) * step, stride) for k in range(kernel)]
            for kernel, step, stride, size in zip(
                self._kernel, self._dilations, self._strides, padded.shape[2:], strict=True
            )
        )
        sums = np.empty((padded.shape[1], len(rows), len(columns)))
        for x, taken in enumerate(columns):
            # Along the contiguous axis NumPy adds in pairs, so that float32 suffices for a row.
            of_rows = np.add.reduce(padded[..., taken.start : taken.stop : taken.step], axis=3)
            for y, lines in enumerate(rows):
                sums[:, y, x] = of_rows[:, :, lines.start : lines.stop : lines.step].sum((0, 2), np.float64)
        return sums / (len(padded) * len(rows[0]) * len(columns[0]))

    def of(self, array: Float32Array) -> Float32Array:
        """[N, C, H, W] -> a view [N, C, oH, oW, kH, kW] of the padded array."""
        padded = self._padded(array)
        spans = [(size - 1) * step + 1 for size, step in zip(self._kernel, self._dilations, strict=True)]
        view = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=(2, 3))
        rows, columns = self._dilations
        return view[:, :, :: self._strides[0], :: self._strides[1], ::rows, ::columns]


def _mean(node: ir.Node, array: Float32Array) -> Float64Array:
    """Mean layer input of one batch, over all its images and positions."""
    if node.op_type != "Conv":
        return np.asarray(array.reshape(-1, array.shape[-1]).mean(axis=0, dtype=np.float64))
    return _Windows(node).mean(array)


def layer_means(
    graph: Path, pixels: Pixels, preprocess: Preprocess, layers: Collection[str]
) -> dict[str, Float64Array]:
    """Mean input of each layer, over the images and all positions at which its weight is applied.

    Args:
        pixels: [N, H, W, C]; images are run one at a time, so that memory is needed for one image only.
        layers: names of Conv (explicit pads), Gemm and MatMul nodes.

    Returns float64 by node name: [C, kH, kW] for a Conv, with padding counted as zeros; [K] for the others.
    """
    nodes = _nodes(graph, layers)
    totals: dict[str, Float64Array] = {}
    for arrays in Observer(graph, map(_input_name, nodes.values())).one_by_one(pixels, preprocess):
        for name, node in nodes.items():
            mean = _mean(node, arrays[_input_name(node)])
            totals[name] = totals[name] + mean if name in totals else mean
    return {name: total / len(pixels) for name, total in totals.items()}


def _samples(node: ir.Node, array: Float32Array) -> Float32Array:
    """Input samples of a layer, [groups, samples, K]: of a Conv, at up to PLACES positions of each image."""
    if node.op_type != "Conv":
        return array.reshape(1, -1, array.shape[-1]).copy()  # a copy: the next run overwrites the array
    view = _Windows(node).of(array)
    groups = node.attributes.get_int("group", 1)
    count = view.shape[2] * view.shape[3]
    step = max(1, count // PLACES)
    while gcd(step, count) != 1:  # so that no row or column is left out
        step += 1
    rows, columns = np.divmod(np.arange(0, count, step)[:PLACES], view.shape[3])
    chosen = np.moveaxis(view[:, :, rows, columns], 2, 1)  # [N, places, C, kH, kW]
    flat = chosen.reshape(-1, groups, view.shape[1] // groups * view.shape[4] * view.shape[5])
    return np.moveaxis(flat, 1, 0)


class _Moments:
    """Sums up x xᵀ, for many samples at once."""

    def __init__(self, groups: int, size: int) -> None:
        self._total = np.zeros((groups, size, size))
        self._waiting: list[Float32Array] = []
        self._count = 0

    def look(self, node: ir.Node, arrays: Mapping[str, Float32Array]) -> None:
        """Add the layer's input samples of one image."""
        self._waiting.append(_samples(node, arrays[_input_name(node)]))
        if sum(x.shape[1] for x in self._waiting) >= _AT_ONCE:
            self.take()

    def take(self) -> None:
        """Multiply the waiting samples and add them to the sum."""
        if not self._waiting:
            return
        x = np.concatenate(self._waiting, axis=1)
        self._total += x.swapaxes(1, 2) @ x
        self._count += x.shape[1]
        self._waiting = []

    def mean(self) -> Float64Array:
        return self._total / self._count


def input_sizes(graph: Path, layers: Collection[str]) -> dict[str, tuple[int, int]]:
    """Number of groups of each layer, and number of inputs K of one output channel.

    `layer_moments` yields one K x K matrix per group.
    """
    sizes = {}
    for name, node in _nodes(graph, layers).items():
        weight = node.inputs[1]
        assert weight is not None
        assert weight.shape is not None
        shape = weight.shape.numpy()
        if node.op_type == "Conv":
            sizes[name] = node.attributes.get_int("group", 1), int(np.prod(shape[1:]))
        else:
            sizes[name] = 1, shape[1] if node.attributes.get_int("transB", 0) else shape[0]
    return sizes


def layer_moments(
    graph: Path,
    pixels: Pixels,
    preprocess: Preprocess,
    layers: Collection[str],
    *,
    budget: int = MOMENTS,
) -> Iterator[tuple[str, Float64Array]]:
    """Second moments E[x xᵀ] of each layer's inputs x, over the images and PLACES positions of each.

    Args:
        pixels: [N, H, W, C]; images are run one at a time.
        layers: names of Conv (explicit pads), Gemm and MatMul nodes.
        budget: bytes of moments to hold at once; one layer may need more.

    Layers are computed in parallel, each on one core, so that the bits do not depend on the number of cores.

    Yields a layer's name and float64 [groups, K, K]. K is ordered like one row of the weight: C, kH, kW for a Conv.
    """
    nodes, sizes = _nodes(graph, layers), input_sizes(graph, layers)
    together: list[str] = []
    for name in [*nodes, ""]:
        held = sum(8 * groups * size**2 for groups, size in (sizes[n] for n in (*together, name) if n))
        if together and (not name or held > budget):
            sums = {n: _Moments(*sizes[n]) for n in together}
            inputs = {_input_name(nodes[n]) for n in together}
            with one_blas_thread(), ThreadPoolExecutor(usable_cores()) as pool:
                for arrays in Observer(graph, inputs).one_by_one(pixels, preprocess):
                    list(pool.map(_Moments.look, sums.values(), (nodes[n] for n in together), repeat(arrays)))
                list(pool.map(_Moments.take, sums.values()))
            for layer in together:
                yield layer, sums.pop(layer).mean()
            together = []
        together.append(name)


def _nodes(graph: Path, layers: Collection[str]) -> dict[str, ir.Node]:
    return {str(node.name): node for node in graph_io.load(graph).graph if node.name in layers}


def _input_name(node: ir.Node) -> str:
    value = node.inputs[0]
    assert value is not None
    return str(value.name)
