"""Mean inputs of layers: what bias correction needs to know of the images."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from calibration import graph_io
from calibration.observe import Observer
from calibration.preprocess import Preprocess, UInt8Array

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]


def _patches(node: ir.Node, array: Float32Array) -> Float64Array:
    """Mean, over images and output places, of the patch that a Conv multiplies with its weight: [C, kH, kW]."""
    weight = node.inputs[1]
    assert weight is not None
    assert weight.shape is not None
    kernel = weight.shape.numpy()[2:]
    strides = node.attributes.get_ints("strides", [1, 1])
    dilations = node.attributes.get_ints("dilations", [1, 1])
    top, left, bottom, right = node.attributes.get_ints("pads", [0, 0, 0, 0])
    padded = np.pad(array, ((0, 0), (0, 0), (top, bottom), (left, right)))
    spans = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
    ends = [whole - span + 1 for whole, span in zip(padded.shape[2:], spans, strict=True)]
    means = np.empty((array.shape[1], *kernel))
    for y in range(kernel[0]):
        for x in range(kernel[1]):
            rows = slice(y * dilations[0], y * dilations[0] + ends[0], strides[0])
            columns = slice(x * dilations[1], x * dilations[1] + ends[1], strides[1])
            means[:, y, x] = padded[:, :, rows, columns].mean(axis=(0, 2, 3), dtype=np.float64)
    return means


def layer_means(
    graph: Path, pixels: UInt8Array, preprocess: Preprocess, layers: Collection[str]
) -> dict[str, Float64Array]:
    """Mean input of each layer, over the images and all places at which its weight is applied.

    Args:
        pixels: uint8 [N, H, W, 3]; run one by one, so that memory is that of one image.
        layers: names of Conv (explicit pads), Gemm and MatMul nodes.

    Returns float64 by node name: [C, kH, kW] for a Conv, with zeros where it pads; [K] for the others.
    """
    model = graph_io.load(graph)
    nodes = {str(node.name): node for node in model.graph if node.name in layers}
    inputs = {name: str(_input(node).name) for name, node in nodes.items()}
    totals: dict[str, Float64Array] = {}
    for arrays in Observer(graph, inputs.values()).one_by_one(pixels, preprocess):
        for name, node in nodes.items():
            array = arrays[inputs[name]]
            if node.op_type == "Conv":
                mean = _patches(node, array)
            else:
                mean = array.reshape(-1, array.shape[-1]).mean(axis=0, dtype=np.float64)
            totals[name] = totals[name] + mean if name in totals else mean
    return {name: total / len(pixels) for name, total in totals.items()}


def _input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value
