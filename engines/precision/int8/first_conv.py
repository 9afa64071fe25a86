"""Reshape the first convolution of a CPU INT8 graph for ONNX Runtime's direct int8 kernel.

The direct kernel needs input channels in multiples of four. An image has three, so ONNX Runtime falls back to im2col.
A stride-2 convolution of an image is, to the bit, a stride-1 convolution of the image's 2x2 blocks (SpaceToDepth),
which have twelve channels. Measured on resnet18, batch 1, one thread, AVX512-VNNI: the layer takes half the time, the
network 7 % less. The blocks are made from floats: ONNX Runtime 1.24 has no SpaceToDepth of uint8, and the time is the
same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from export_zoo.engines.precision.rewrites import add_constant

_BLOCK = 2
_MAX_CHANNELS = 3


def _taps(kernel: int, pad: int) -> tuple[int, int]:
    """First block and number of blocks that a stride-2 kernel of this size and padding touches."""
    first = -pad // _BLOCK
    last = (kernel - 1 - pad) // _BLOCK
    return first, last - first + 1


def blocked_weight(weight: npt.NDArray[Any], pads: tuple[int, int]) -> npt.NDArray[Any]:
    """Integers [O, C, kh, kw] of a stride-2 convolution -> [O, 4 C, taps_h, taps_w] over 2x2 blocks.

    Args:
        pads: padding at the top and at the left.
    """
    outputs, channels, height, width = weight.shape
    (first_h, taps_h), (first_w, taps_w) = _taps(height, pads[0]), _taps(width, pads[1])
    blocked = np.zeros((outputs, _BLOCK * _BLOCK * channels, taps_h, taps_w), dtype=weight.dtype)
    for row in range(height):
        block_row, inner_row = divmod(row - pads[0], _BLOCK)
        for column in range(width):
            block_column, inner_column = divmod(column - pads[1], _BLOCK)
            begin = (inner_row * _BLOCK + inner_column) * channels
            place = (slice(None), slice(begin, begin + channels), block_row - first_h, block_column - first_w)
            blocked[place] = weight[:, :, row, column]
    return blocked


def _blocked_pads(conv: ir.Node, size: tuple[int, int], kernel: tuple[int, int]) -> list[int] | None:
    """Pads of the convolution over blocks; None if it cannot be written that way."""
    attributes = conv.attributes
    strides = list(attributes.get_ints("strides", [1, 1]))
    dilations = list(attributes.get_ints("dilations", [1, 1]))
    pads = list(attributes.get_ints("pads", [0, 0, 0, 0]))
    if strides != [2, 2] or dilations != [1, 1] or attributes.get_int("group", 1) != 1:
        return None
    if attributes.get_string("auto_pad", "NOTSET") != "NOTSET" or any(side % _BLOCK for side in size):
        return None
    before, after = [], []
    for axis in range(2):
        first, taps = _taps(kernel[axis], pads[axis])
        out = (size[axis] + pads[axis] + pads[axis + 2] - kernel[axis]) // 2 + 1
        before.append(-first)
        after.append(out + taps - 1 + first - size[axis] // _BLOCK)
    return None if min(before + after) < 0 else before + after


@dataclass(frozen=True)
class Blocks:
    """A first convolution that can be written over 2x2 blocks of the image."""

    conv: ir.Node
    pads: list[int]
    """Pads of the convolution over blocks."""

    @property
    def top_left(self) -> tuple[int, int]:
        """Padding at the top and at the left, in pixels."""
        top, left = self.conv.attributes.get_ints("pads", [0, 0, 0, 0])[:2]
        return int(top), int(left)


def _only_reader(value: ir.Value) -> ir.Node | None:
    nodes = [use.node for use in value.uses()]
    return nodes[0] if len(nodes) == 1 else None


def _stored(value: ir.Value | None) -> ir.Value | None:
    """The constant operand itself, or the int8 constant behind its DequantizeLinear."""
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "DequantizeLinear":
        value = producer.inputs[0]
    return value if value is not None and value.const_value is not None else None


def blocks_of(graph: ir.Graph) -> Blocks | None:
    """The convolution that alone reads the graph's input, directly or through Q/DQ; None if it cannot be blocked.

    The result is the same for an FP32 graph and for the INT8 graph that is made from it.
    """
    source = graph.inputs[0]
    if source.shape is None:
        return None
    _, channels, *size = source.shape
    if not all(isinstance(side, int) for side in (channels, *size)) or int(str(channels)) > _MAX_CHANNELS:
        return None
    node = _only_reader(source)
    if node is not None and node.op_type == "QuantizeLinear":
        dequantize = _only_reader(node.outputs[0])
        node = _only_reader(dequantize.outputs[0]) if dequantize is not None else None
    if node is None or node.op_type != "Conv" or (weight := _stored(node.inputs[1])) is None:
        return None
    assert weight.const_value is not None
    _, _, *kernel = weight.const_value.shape.numpy()
    if len(size) != 2 or len(kernel) != 2:
        return None
    height, width = (int(str(side)) for side in size)
    pads = _blocked_pads(node, (height, width), (int(kernel[0]), int(kernel[1])))
    return Blocks(node, pads) if pads is not None else None


def block_first_convolution(graph: ir.Graph) -> bool:
    """Rewrite `Q -> DQ -> Conv` on the graph's input as `SpaceToDepth -> Q -> DQ -> Conv`. False if it does not fit.

    The multiplied and summed integers are the same, so the logits are the same.
    """
    found = blocks_of(graph)
    source = graph.inputs[0]
    quantize = _only_reader(source)
    if found is None or quantize is None or quantize.op_type != "QuantizeLinear" or source.shape is None:
        return False
    conv = found.conv
    dequantize = conv.inputs[0].producer() if conv.inputs[0] is not None else None
    weight_dq = conv.inputs[1].producer() if conv.inputs[1] is not None else None
    stored = _stored(conv.inputs[1])
    if dequantize is None or weight_dq is None or stored is None or stored.const_value is None:
        return False
    _, channels, height, width = (int(str(side)) if isinstance(side, int) else 0 for side in source.shape)
    blocked = blocked_weight(stored.const_value.numpy(), found.top_left)
    weight_dq.replace_input_with(0, add_constant(graph, f"{stored.name}_blocked", blocked))
    weight_dq.outputs[0].shape = ir.Shape(blocked.shape)
    blocks = ir.node(
        "SpaceToDepth",
        [source],
        {"blocksize": _BLOCK},
        name=f"{source.name}_blocks",
    )
    output = blocks.outputs[0]
    output.name, output.dtype = f"{source.name}_blocks_output", ir.DataType.FLOAT
    output.shape = ir.Shape([source.shape[0], 4 * channels, height // 2, width // 2])
    graph.insert_before(quantize, blocks)
    quantize.replace_input_with(0, output)
    quantize.outputs[0].shape = dequantize.outputs[0].shape = output.shape
    conv.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", list(blocked.shape[2:]))
    conv.attributes["strides"] = ir.AttrInt64s("strides", [1, 1])
    conv.attributes["pads"] = ir.AttrInt64s("pads", found.pads)
    return True
