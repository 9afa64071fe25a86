"""Statistics of layer inputs for bias correction and rounding: means and second moments."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from math import gcd
from pathlib import Path
from typing import NamedTuple

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
"""Number of positions per image at which a convolution's input is sampled."""

MOMENTS = 512 << 20
"""Bytes of second moments that are held at once. A network with more is run several times."""

_AT_ONCE = 1024
"""Number of input samples of a layer that are multiplied at once."""


class Statistics(NamedTuple):
    """Statistics of the inputs of a layer, over images and positions."""

    mean: Float64Array
    """Mean input, float64 [groups, K]. K is ordered like one row of the weight: C, kH, kW for a Conv."""
    moments: Float64Array | None
    """Second moments E[x xᵀ], float64 [groups, K, K]; None if they were not asked for."""


def _patches(node: ir.Node, array: Float32Array, index: int) -> Float32Array:
    """Patches of the padded input that a Conv (explicit pads) multiplies with its weight, [N, places, C, kH, kW].

    Args:
        array: the layer's input, [N, C, H, W].
        index: number of images before. Each image continues the walk through all positions where the last one ended.
    """
    weight = node.inputs[1]
    assert weight is not None
    assert weight.shape is not None
    kernel = weight.shape.numpy()[2:]
    strides = node.attributes.get_ints("strides", [1, 1])
    dilations = node.attributes.get_ints("dilations", [1, 1])
    pads = node.attributes.get_ints("pads", [0, 0, 0, 0])
    sizes = [
        (size + pads[axis] + pads[axis + 2] - (kernel[axis] - 1) * dilations[axis] - 1) // strides[axis] + 1
        for axis, size in enumerate(array.shape[2:])
    ]
    count = sizes[0] * sizes[1]
    step = max(1, count // PLACES)
    while gcd(step, count) != 1:  # so that no position is left out
        step += 1
    taken = min(PLACES, count)
    corners = np.divmod((index * taken + np.arange(taken)) * step % count, sizes[1])
    rows, columns = (
        corner[:, None] * strides[axis] + np.arange(kernel[axis]) * dilations[axis] - pads[axis]
        for axis, corner in enumerate(corners)
    )
    inside = [(at >= 0) & (at < size) for at, size in zip((rows, columns), array.shape[2:], strict=True)]
    rows, columns = (
        np.clip(at, 0, size - 1) for at, size in zip((rows, columns), array.shape[2:], strict=True)
    )
    found = array[:, :, rows[:, :, None], columns[:, None, :]]
    if not all(part.all() for part in inside):
        found = found * (inside[0][:, :, None] & inside[1][:, None, :])
    return np.moveaxis(found, 2, 1)


def _samples(node: ir.Node, array: Float32Array, index: int) -> Float32Array:
    """Input samples of a layer, [groups, samples, K]: of a Conv, at up to PLACES positions of each image."""
    if node.op_type != "Conv":
        return array.reshape(1, -1, array.shape[-1]).copy()  # a copy: the next run overwrites the array
    patches = _patches(node, array, index)
    groups = node.attributes.get_int("group", 1)
    flat = patches.reshape(-1, groups, int(np.prod(patches.shape[2:])) // groups)
    return np.moveaxis(flat, 1, 0)


class _Sums:
    """Sums up x and x xᵀ, for many samples at once."""

    def __init__(self, groups: int, size: int, *, moments: bool) -> None:
        self._mean = np.zeros((groups, size))
        self._moments = np.zeros((groups, size, size)) if moments else None
        self._waiting: list[Float32Array] = []
        self._count = self._seen = 0

    def look(self, node: ir.Node, arrays: Mapping[str, Float32Array]) -> None:
        """Add the layer's input samples of one image."""
        self._waiting.append(_samples(node, arrays[_input_name(node)], self._seen))
        self._seen += 1
        if sum(x.shape[1] for x in self._waiting) >= _AT_ONCE:
            self.take()

    def take(self) -> None:
        """Add the waiting samples to the sums."""
        if not self._waiting:
            return
        x = np.concatenate(self._waiting, axis=1)
        self._mean += x.sum(axis=1, dtype=np.float64)
        if self._moments is not None:
            self._moments += x.swapaxes(1, 2) @ x
        self._count += x.shape[1]
        self._waiting = []

    def statistics(self) -> Statistics:
        moments = self._moments / self._count if self._moments is not None else None
        return Statistics(self._mean / self._count, moments)


def input_sizes(graph: Path, layers: Collection[str]) -> dict[str, tuple[int, int]]:
    """Number of groups of each layer, and number of inputs K of one output channel.

    `layer_statistics` yields one K x K matrix per group.
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


def layer_statistics(
    graph: Path,
    pixels: Pixels,
    preprocess: Preprocess,
    layers: Collection[str],
    *,
    largest: int,
    budget: int = MOMENTS,
) -> Iterator[tuple[str, Statistics]]:
    """Means and second moments of layers' inputs x, over the images and PLACES positions of each.

    Args:
        pixels: [N, H, W, C]; images are run one at a time, so that memory is needed for one image only.
        layers: names of Conv (explicit pads), Gemm and MatMul nodes.
        largest: maximum K, the number of inputs of an output channel, for which there are second moments.
        budget: bytes of moments to hold at once; one layer may need more.

    Layers are computed in parallel, each on one core, so that the bits do not depend on the number of cores.
    """
    nodes, sizes = _nodes(graph, layers), input_sizes(graph, layers)
    together: list[str] = []
    for name in [*nodes, ""]:
        each = [sizes[n] for n in (*together, name) if n]
        held = sum(8 * groups * size**2 for groups, size in each if size <= largest)
        if together and (not name or held > budget):
            sums = {n: _Sums(*sizes[n], moments=sizes[n][1] <= largest) for n in together}
            inputs = {_input_name(nodes[n]) for n in together}
            with one_blas_thread(), ThreadPoolExecutor(usable_cores()) as pool:
                for arrays in Observer(graph, inputs).one_by_one(pixels, preprocess):
                    list(pool.map(_Sums.look, sums.values(), (nodes[n] for n in together), repeat(arrays)))
                list(pool.map(_Sums.take, sums.values()))
            for layer in together:
                yield layer, sums.pop(layer).statistics()
            together = []
        together.append(name)


def scaled(found: Statistics, factors: Float32Array) -> Statistics:
    """The statistics of a layer after its input channels, or features, were multiplied by `factors` [channels]."""
    mean, moments = found
    by_group = factors.reshape(len(mean), -1)  # each group of a Conv has its own channels
    each = np.repeat(by_group, mean.shape[1] // by_group.shape[1], axis=1)
    if moments is not None:
        moments = moments * each[:, :, None] * each[:, None, :]
    return Statistics(mean * each, moments)


def _nodes(graph: Path, layers: Collection[str]) -> dict[str, ir.Node]:
    return {str(node.name): node for node in graph_io.load(graph).graph if node.name in layers}


def _input_name(node: ir.Node) -> str:
    value = node.inputs[0]
    assert value is not None
    return str(value.name)
