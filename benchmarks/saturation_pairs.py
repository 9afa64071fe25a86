"""Finds the pairs of int8 weights that saturate in ONNX Runtime's kernels of this CPU, by experiments alone.

    python benchmarks/saturation_pairs.py            # about a minute on two cores
    python benchmarks/saturation_pairs.py --quick    # seconds
    python benchmarks/saturation_pairs.py --option   # what session.x64quantprecision=1 makes exact, and what it refuses

x86 CPUs without VNNI multiply uint8 activations with int8 weights by `vpmaddubsw`. It adds two products in 16 bits and
saturates. The rule that is tested, of a layer with uint8 activations and int8 weights:

- The filter of an output channel is flattened in the order (row, column, input channel), each group on its own. Of a
  matrix multiplication it is the column of the weight.
- The weights 2j and 2j+1 of it are a pair. The last weight of an odd number has no partner.
- The sum of a pair is clipped to [-32768, 32767], and the sums of the pairs are added in 32 bits.
- So a pair (a, b) can saturate if and only if a + b > 128 or a + b < -128, for 255 * 129 > 32767.
- A depthwise convolution, one input and one output channel a group, never saturates. With two output channels a group
  it does: there the pairs are neighbouring taps of the kernel.

It holds for ONNX Runtime 1.23.2 to 1.32.0 on AMD Zen 3, and for 1.31.1 as Haswell under qemu-user. As Nehalem (SSE4.1)
nothing saturates.

Experiments on each layer test it:

- All weights are 127 and all activations 255: each pair must saturate, so the sum is known exactly.
- All weights are -128: the same downwards.
- One weight of each pair is 127, all others 0: nothing may saturate. The choices are such that any two weights of
  different pairs are 127 together at least once, so all pairs of positions are covered.
- Two weights are 127, all others 0, for a sample of neighbours and of random positions.
- Weights and activations are random: the outputs must be those of the rule, computed in numpy.

Exit code: 0 where the rule holds, or where this CPU's kernels do not saturate; 1 where the rule breaks.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
FORK = multiprocessing.get_context("fork")

FULL = 255
"""The largest activation."""
THRESHOLDS = [
    ((127, 1), False), ((127, 2), True), ((64, 64), False), ((65, 64), True), ((127, 127), True),
    ((-127, -1), False), ((-127, -2), True), ((-64, -64), False), ((-65, -64), True), ((-128, 0), False),
    ((-128, -1), True), ((-128, -128), True), ((127, -127), False), ((-128, 127), False),
]  # fmt: skip
"""Pairs of weights, and whether they saturate where both activations are 255."""
PAIR_STEP = 1024.0
"""Scale of the output of one pair: 2 * 255 * 127 and the 32767 that it saturates to differ, and fit in 8 bits."""
PARTS = 1 << 22
"""Elements of numpy's arrays at a time."""


@dataclass(frozen=True)
class Layer:
    """A layer to be tested: an operator, its shapes and the zero point of its input."""

    op: str
    """conv, conv_basic, conv_blocks, gemm, gemm_float, matmul, matmul_float, matmul_integer: see `model_of`."""
    channels: int
    """Input channels, or K of a matrix multiplication."""
    outputs: int
    """Output channels, or N of a matrix multiplication."""
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    dilation: int = 1
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    group: int = 1
    size: int = 1
    """Height and width of the output of a convolution."""
    batch: int = 1
    """Batch size, or M of a matrix multiplication."""
    zero_point: int = 0
    trans_b: bool = False
    threads: int = 1

    @property
    def is_conv(self) -> bool:
        return self.op.startswith("conv")

    @property
    def depthwise(self) -> bool:
        return self.is_conv and self.channels == self.outputs == self.group

    @property
    def length(self) -> int:
        """Number of weights of a filter."""
        return self.kernel[0] * self.kernel[1] * (self.channels // self.group)

    @property
    def middle(self) -> int:
        """Index of the output in the middle of the first image."""
        return self.size // 2 * (self.size + 1) if self.is_conv else 0

    @property
    def exact_sum(self) -> bool:
        """The output is the sum itself: int32, or float32 that holds it exactly."""
        return self.op in ("matmul_integer", "matmul_float", "gemm_float")

    @property
    def has_bias(self) -> bool:
        return self.is_conv or self.op == "gemm"

    def name(self) -> str:
        if not self.is_conv:
            text = f"{self.op} M={self.batch} K={self.channels} N={self.outputs}" + " transB" * self.trans_b
        else:
            text = f"{self.op} {self.kernel[0]}x{self.kernel[1]} {self.channels}->{self.outputs}"
            text += f" g{self.group}" * (self.group > 1) + f" stride {self.stride}" * (self.stride > 1)
            text += f" dilation {self.dilation}" * (self.dilation > 1)
            text += f" pads {','.join(map(str, self.pads))}" * any(self.pads)
            text += f" out {self.size}x{self.size}" + f" batch {self.batch}" * (self.batch > 1)
        return (
            text
            + f" zp {self.zero_point}" * (self.zero_point > 0)
            + f" {self.threads} threads" * (self.threads > 1)
        )

    def position(self, index: int) -> tuple[int, ...]:
        """Weight `index` of a filter as (row, column, input channel); of a matrix as (k,)."""
        if not self.is_conv:
            return (index,)
        return tuple(int(i) for i in np.unravel_index(index, (*self.kernel, self.channels // self.group)))

    def input_shape(self) -> tuple[int, ...]:
        if not self.is_conv:
            return (self.batch, self.channels)
        span = [self.dilation * (k - 1) + 1 + self.stride * (self.size - 1) for k in self.kernel]
        height, width = span[0] - self.pads[0] - self.pads[2], span[1] - self.pads[1] - self.pads[3]
        return (self.batch, self.channels, height, width)


def _weight_of(layer: Layer, filters: Array) -> Array:
    """Filters [outputs, length] in the layout of the operator's weight."""
    if layer.is_conv:
        shape = (layer.outputs, *layer.kernel, layer.channels // layer.group)
        return np.ascontiguousarray(filters.reshape(shape).transpose(0, 3, 1, 2))
    return np.ascontiguousarray(filters if layer.trans_b else filters.T)


def model_of(layer: Layer, filters: Array, bias: Array, step: float) -> bytes:
    """The ONNX model of a layer.

    `conv`, `gemm` and `matmul` are Q/DQ graphs as `qdq.py` writes them, whose output is quantized with
    the scale `step` and the zero point 128; `conv_blocks` has SpaceToDepth before it, as `first_conv.py` does;
    `conv_basic` is a QLinearConv itself. `gemm_float` and `matmul_float` are Q/DQ graphs whose output stays float.
    All other scales are 1.
    """
    tensors = {
        "one": np.float32(1), "step": np.float32(step), "zero": np.uint8(layer.zero_point), "half": np.uint8(128),
        "weight": _weight_of(layer, filters.astype(np.int8)),
        "ones": np.ones(layer.outputs, np.float32), "zeros": np.zeros(layer.outputs, np.int8),
        "bias": bias.astype(np.int32), "bias_zeros": np.zeros(layer.outputs, np.int32),
    }  # fmt: skip
    attributes: dict[str, Any] = {}
    if layer.is_conv:
        attributes = {
            "kernel_shape": layer.kernel, "strides": [layer.stride] * 2, "dilations": [layer.dilation] * 2,
            "pads": layer.pads, "group": layer.group,
        }  # fmt: skip
    shape: tuple[int, ...] = layer.input_shape()
    kind = TensorProto.FLOAT
    out = kind
    if layer.op == "conv_basic":
        kind = out = TensorProto.UINT8
        inputs = ["x", "one", "zero", "weight", "ones", "zeros", "step", "half", "bias"]
        nodes = [helper.make_node("QLinearConv", inputs, ["y"], "layer", **attributes)]
    elif layer.op == "matmul_integer":
        kind, out = TensorProto.UINT8, TensorProto.INT32
        nodes = [helper.make_node("MatMulInteger", ["x", "weight", "zero"], ["y"], "layer")]
    else:
        axis = 0 if layer.is_conv or layer.trans_b else 1
        nodes, source = [], "x"
        if layer.op == "conv_blocks":
            shape = (shape[0], shape[1] // 4, shape[2] * 2, shape[3] * 2)
            nodes.append(helper.make_node("SpaceToDepth", ["x"], ["x_blocks"], "blocks", blocksize=2))
            source = "x_blocks"
        operands = ["x_dq", "weight_dq"]
        nodes += [
            helper.make_node("QuantizeLinear", [source, "one", "zero"], ["x_q"], "x_quantize"),
            helper.make_node("DequantizeLinear", ["x_q", "one", "zero"], ["x_dq"], "x_dequantize"),
            helper.make_node("DequantizeLinear", ["weight", "ones", "zeros"], ["weight_dq"], "w", axis=axis),
        ]
        if not layer.op.startswith("matmul"):
            inputs = ["bias", "ones", "bias_zeros"]
            nodes.append(helper.make_node("DequantizeLinear", inputs, ["bias_dq"], "bias_dequantize", axis=0))
            operands.append("bias_dq")
        op_type = "Conv" if layer.is_conv else "MatMul" if layer.op.startswith("matmul") else "Gemm"
        if op_type == "Gemm":
            attributes = {"transB": int(layer.trans_b)}
        float_out = layer.op.endswith("_float")
        nodes.append(
            helper.make_node(op_type, operands, ["y" if float_out else "sum"], "layer", **attributes)
        )
        if not float_out:
            nodes += [
                helper.make_node("QuantizeLinear", ["sum", "step", "half"], ["y_q"], "y_quantize"),
                helper.make_node("DequantizeLinear", ["y_q", "step", "half"], ["y"], "y_dequantize"),
            ]
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", out, None)],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in tensors.items() if n in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def session_of(
    model: bytes, *, precise: bool = False, threads: int = 1, level: str = ""
) -> ort.InferenceSession:
    """A session as the product makes it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if level:
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    if precise:
        options.add_session_config_entry("session.x64quantprecision", "1")
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _blocks_to_depth(x: Array) -> Array:
    """The image of which SpaceToDepth makes `x`."""
    batch, channels, height, width = x.shape
    blocks = x.reshape(batch, 2, 2, channels // 4, height, width)
    return np.ascontiguousarray(
        blocks.transpose(0, 3, 4, 1, 5, 2).reshape(batch, channels // 4, height * 2, width * 2)
    )


def outputs_of(
    layer: Layer, filters: Array, bias: Array, step: float, x: Array, *, precise: bool = False
) -> Array:
    """ONNX Runtime's sums: [positions, outputs], integers."""
    level = "ORT_ENABLE_BASIC" if layer.op == "conv_basic" else ""
    session = session_of(
        model_of(layer, filters, bias, step), threads=layer.threads, level=level, precise=precise
    )
    feed = _blocks_to_depth(x) if layer.op == "conv_blocks" else x
    if layer.op not in ("conv_basic", "matmul_integer"):
        feed = feed.astype(np.float32) - layer.zero_point
    (y,) = session.run(None, {"x": feed})
    if layer.is_conv:
        y = y.transpose(0, 2, 3, 1).reshape(-1, layer.outputs)
    if not layer.exact_sum and layer.op != "conv_basic":
        y = y / np.float32(step) + 128
    return np.asarray(y, dtype=np.int64)


def _windows(layer: Layer, x: Array) -> Array:
    """The activations that each output sees: [groups, positions, length]."""
    if not layer.is_conv:
        return x[None]
    top, left, bottom, right = layer.pads
    padded = np.pad(x, [(0, 0), (0, 0), (top, bottom), (left, right)], constant_values=layer.zero_point)
    span = layer.stride * (layer.size - 1) + 1
    per_group = layer.channels // layer.group
    taps = []
    for row in range(layer.kernel[0]):
        for column in range(layer.kernel[1]):
            h, w = row * layer.dilation, column * layer.dilation
            tap = padded[:, :, h : h + span : layer.stride, w : w + span : layer.stride]
            taps.append(tap.transpose(0, 2, 3, 1).reshape(-1, layer.group, per_group))
    return np.stack(taps, axis=2).transpose(1, 0, 2, 3).reshape(layer.group, -1, layer.length)


def sums_of(layer: Layer, filters: Array, x: Array, *, exact: bool = False) -> Array:
    """The sums by the rule, or the exact ones: [positions, outputs] int64."""
    if not any(layer.pads) and (x == x.flat[0]).all():
        window = np.full((layer.group, 1, layer.length), x.flat[0])
    else:
        window = _windows(layer, x)
    odd = layer.length % 2
    weights = np.pad(filters.astype(np.int32), [(0, 0), (0, odd)]).reshape(
        layer.group, -1, layer.length + odd
    )
    window = np.pad(window.astype(np.int32), [(0, 0), (0, 0), (0, odd)])
    found = []
    for values, group in zip(window, weights, strict=True):
        columns, rows = group.T[:, None], values.T[:, :, None]
        part = max(1, PARTS // (group.shape[0] * group.shape[1]))
        sums = []
        for begin in range(0, rows.shape[1], part):
            some = rows[:, begin : begin + part]
            products = some[0::2] * columns[0::2] + some[1::2] * columns[1::2]
            if not (layer.depthwise or exact):
                products = np.clip(products, -32768, 32767)
            sums.append(products.sum(axis=0, dtype=np.int64))
        found.append(np.concatenate(sums))
    total = np.concatenate(found, axis=1)
    return np.asarray(total - layer.zero_point * filters.astype(np.int64).sum(axis=1))


def agrees(layer: Layer, filters: Array, x: Array, step: float = 1.0) -> Array:
    """Which outputs of ONNX Runtime are those of the rule everywhere: bool [outputs].

    With step 1 the bias brings the sum in the middle of the image to 0, so any difference there is seen. With a larger
    step there is no bias.
    """
    sums = sums_of(layer, filters, x)
    bias = np.zeros(layer.outputs, dtype=np.int64)
    if layer.has_bias and step == 1:
        bias = -sums[min(layer.middle, len(sums) - 1)]
    actual = outputs_of(layer, filters, bias, step, x)
    expected = sums + bias
    if not layer.exact_sum:
        scaled = np.rint((expected.astype(np.float32) / np.float32(step)).astype(np.float64))
        expected = np.clip(scaled + 128, 0, 255).astype(np.int64)
    return np.asarray((np.broadcast_to(expected, actual.shape) == actual).all(axis=0))


class Probe:
    """The experiments on one layer."""

    def __init__(self, layer: Layer, rng: np.random.Generator, thorough: bool) -> None:
        self.layer = layer
        self.rng = rng
        self.thorough = thorough
        self.full = np.full(layer.input_shape(), FULL, np.uint8)
        # A quantized product without a bias shows small sums only, but for zero point 255, where the exact sum is 0.
        self.coarse = not (layer.exact_sum or layer.has_bias or layer.zero_point == FULL)

    def _agree(self, filters: Array, step: float = 1.0) -> Array:
        """`agrees` for any number of filters, with activations of 255."""
        found = []
        for begin in range(0, len(filters), self.layer.outputs):
            some = filters[begin : begin + self.layer.outputs]
            padded = np.zeros((self.layer.outputs, self.layer.length), np.int16)
            padded[: len(some)] = some
            found.append(agrees(self.layer, padded, self.full, step)[: len(some)])
        return np.concatenate(found) if found else np.zeros(0, bool)

    def _filters_of(self, sets: list[list[int]], value: int = 127) -> Array:
        filters = np.zeros((len(sets), self.layer.length), np.int16)
        for row, positions in zip(filters, sets, strict=True):
            row[positions] = value
        return filters

    def _saturates(self, positions: list[int]) -> bool:
        """Whether a filter of 127 at these positions gives less than its exact sum, whatever the rule says."""
        layer, filters = self.layer, self._filters_of([positions] * self.layer.outputs)
        exact = sums_of(layer, filters, self.full, exact=True)
        exact = np.broadcast_to(exact, (max(len(exact), layer.middle + 1), layer.outputs))[layer.middle]
        bias = -exact if layer.has_bias else np.zeros_like(exact)
        step = PAIR_STEP if self.coarse else 1.0
        actual = outputs_of(layer, filters, bias, step, self.full)[layer.middle]
        shown = exact if layer.exact_sum else np.rint((exact + bias) / step) + 128
        return bool((actual < shown).any())

    def _culprits(self, positions: list[int]) -> list[int]:
        """Two positions of a set that saturates which saturate together."""
        low, high = 1, len(positions)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._saturates(positions[:middle]) else (middle + 1, high)
        last, rest = positions[low - 1], positions[: low - 1]
        low, high = 0, max(0, len(rest) - 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._saturates([*rest[middle:], last]) else (low, middle - 1)
        return [*rest[low : low + 1], last]

    def _choices(self) -> list[list[int]]:
        """Sets with one position of each pair; any two positions of different pairs are together in one of them."""
        pairs = np.arange((self.layer.length + 1) // 2)
        sides = [np.zeros_like(pairs), np.ones_like(pairs)]
        for bit in range(int(pairs[-1]).bit_length()):
            sides += [pairs >> bit & 1, 1 - (pairs >> bit & 1)]
        sets = [[int(p) for p in 2 * pairs + side if p < self.layer.length] for side in sides]
        return [positions for positions in sets if positions]

    def _sample(self) -> list[list[int]]:
        """Neighbours and random pairs of positions; all pairs of a short filter."""
        length = self.layer.length
        if length < 2:
            return []
        if self.thorough and length <= 24:
            return [[p, q] for q in range(length) for p in range(q)]
        count = 32 if self.thorough else 8
        starts = sorted({int(p) for p in self.rng.integers(0, length - 1, count)} | {0, length - 2})
        found = [[p, p + 1] for p in starts]
        for _ in range(count):
            found.append(sorted(int(p) for p in self.rng.choice(length, 2, replace=False)))
        return found

    def run(self) -> str:
        """Why the rule breaks, with the first counterexample; empty where it holds."""
        for experiment in (self._all, self._one_of_each, self._two, self._thresholds, self._random):
            if fault := experiment():
                return fault
        return ""

    def _all(self) -> str:
        if self.coarse:
            return ""
        length = self.layer.length
        filters = np.repeat(np.array([[127], [-128]], np.int16), length, axis=1)
        if self._agree(filters).all():
            return ""
        for first in range(0, length - 1, 2):
            pair = [first, first + 1]
            if self.layer.depthwise and self._saturates(pair):
                return f"{self._named(pair)} saturate, and should not"
            if not self.layer.depthwise and not self._saturates(pair):
                return f"{self._named(pair)} do not saturate, and should"
        return "all weights 127 or -128: not the sum that the rule gives, though each pair of 127 by itself obeys it"

    def _one_of_each(self) -> str:
        if self.coarse:
            return ""
        sets = self._choices()
        right = self._agree(self._filters_of(sets))
        if right.all():
            return ""
        positions = sets[int(np.argmin(right))]
        return f"{self._named(self._culprits(positions))} saturate, and should not"

    def _two(self) -> str:
        sets = self._sample()
        right = self._agree(self._filters_of(sets), PAIR_STEP if self.coarse else 1.0)
        if right.all():
            return ""
        pair = sets[int(np.argmin(right))]
        done = "saturate" if self._saturates(pair) else "do not saturate"
        return f"{self._named(pair)} {done}, against the rule"

    def _thresholds(self) -> str:
        if self.layer.length < 2 or self.coarse:
            return ""
        filters = np.zeros((2 * len(THRESHOLDS), self.layer.length), np.int16)
        for index, (pair, saturates) in enumerate(THRESHOLDS):
            assert saturates == (not -128 <= sum(pair) <= 128)
            first = 2 * int(self.rng.integers(0, self.layer.length // 2))
            filters[2 * index, first : first + 2] = pair
            filters[2 * index + 1, first : first + 2] = pair[::-1]
        right = self._agree(filters)
        return "" if right.all() else f"weights {THRESHOLDS[int(np.argmin(right)) // 2][0]}: against the rule"

    def _random(self) -> str:
        layer = self.layer
        for _ in range(2 if self.thorough else 1):
            filters = self.rng.integers(-128, 128, (layer.outputs, layer.length)).astype(np.int16)
            large = self.rng.random(filters.shape) < 0.3
            filters[large] = np.where(filters[large] < 0, -128, 127)
            x = self.rng.integers(0, 256, layer.input_shape()).astype(np.uint8)
            x[self.rng.random(x.shape) < 0.3] = FULL
            # A power of two, so that scaling is exact; about 3 standard deviations of the sum are shown.
            step = 1.0 if layer.exact_sum else 2.0 ** np.ceil(np.log2(3 * 170 * 90 * layer.length**0.5 / 128))
            if layer.op != "conv_basic" and layer.zero_point and not layer.exact_sum:
                step *= 2
            if not agrees(layer, filters, x, step).all():
                return "random weights and activations: not the sum of saturated pairs"
        return ""

    def _named(self, positions: list[int]) -> str:
        kind = "(row, column, channel)" if self.layer.is_conv else "k"
        places = [self.layer.position(p) for p in positions]
        shown = " and ".join(str(p if len(p) > 1 else p[0]) for p in places)
        return f"weights {' and '.join(map(str, positions))}, {kind} {shown}, of {self.layer.length}"


def layers(quick: bool) -> Iterator[Layer]:
    """The layers to test."""
    conv = "conv"
    if quick:
        yield Layer(conv, 16, 8, (3, 3), pads=(1, 1, 1, 1), size=4)
        yield Layer(conv, 3, 16, (5, 5), stride=2, size=3)
        yield Layer(conv, 5, 17, size=2)
        yield Layer(conv, 6, 4, (3, 3), group=2, size=3)
        yield Layer(conv, 8, 8, (3, 3), group=8, size=3)
        yield Layer(conv, 4, 8, (3, 3), group=4, size=3)
        yield Layer("conv_blocks", 12, 8, (4, 4), pads=(2, 2, 1, 1), size=5)
        yield Layer("conv_basic", 16, 8, (3, 3), size=2, zero_point=128)
        yield Layer("gemm", 17, 8, trans_b=True)
        yield Layer("matmul_float", 64, 17, batch=8, zero_point=255)
        yield Layer("matmul_integer", 33, 3)
        return
    kernels = ((1, 1), (3, 3), (5, 5), (7, 7))
    for kernel in kernels:
        for channels in (1, 2, 3, 4, 5, 8, 15, 16, 17, 32, 64):
            outputs = {1: 17, 3: 16, 5: 8}.get(channels, 16 if channels % 2 else 17)
            yield Layer(conv, channels, outputs, kernel, size=7 if kernel[0] < 5 else 3)
            pad = kernel[0] // 2
            yield Layer(conv, channels, 16, kernel, stride=2, pads=(pad,) * 4, size=3)
    for outputs in (1, 2, 8, 16, 17, 32):
        for channels in (1, 3, 4, 16):
            for kernel in kernels[:2]:
                yield Layer(conv, channels, outputs, kernel, size=4)
    for size in (1, 2, 7, 14):
        for channels, kernel in ((16, (1, 1)), (3, (3, 3)), (16, (3, 3)), (12, (4, 4))):
            for batch in (1, 8):
                yield Layer(conv, channels, 16, kernel, size=size, batch=batch)
    for channels in (1, 3, 8, 16):
        yield Layer(conv, channels, 8, (3, 3), dilation=2, size=4)
        yield Layer(conv, channels, 16, (3, 3), dilation=2, pads=(2, 2, 2, 2), size=7)
    yield Layer(conv, 4, 8, (1, 7), size=3)
    yield Layer(conv, 5, 8, (3, 1), size=3)
    for group, channels, outputs in (
        (2, 2, 4), (2, 6, 4), (2, 8, 8), (2, 10, 2), (2, 32, 32), (2, 34, 34), (4, 4, 8), (4, 8, 4), (4, 12, 8),
        (4, 16, 16), (4, 20, 4), (4, 64, 64), (8, 8, 16), (16, 16, 32), (3, 9, 6), (3, 9, 3), (32, 128, 128),
    ):  # fmt: skip
        for kernel in kernels[:3]:
            yield Layer(conv, channels, outputs, kernel, group=group, size=3)
        yield Layer(conv, channels, outputs, (3, 3), group=group, stride=2, pads=(1, 1, 1, 1), size=4)
    for channels in (1, 2, 3, 4, 8, 15, 16, 17, 32, 64):
        for kernel in kernels:
            yield Layer(conv, channels, channels, kernel, group=channels, size=4)
        yield Layer(conv, channels, channels, (3, 3), group=channels, stride=2, pads=(1, 1, 1, 1), size=4)
        yield Layer(
            conv, channels, channels, (3, 3), group=channels, dilation=2, size=4, batch=2, zero_point=128
        )
        if channels > 1:
            yield Layer(conv, channels, 2 * channels, (3, 3), group=channels, size=4)
    for zero_point in (128, 255):
        for channels, outputs, group in (
            (3, 16, 1),
            (16, 16, 1),
            (17, 8, 1),
            (10, 4, 2),
            (8, 8, 8),
            (8, 16, 8),
        ):
            for kernel in kernels[:2]:
                pad = kernel[0] // 2
                yield Layer(
                    conv,
                    channels,
                    outputs,
                    kernel,
                    group=group,
                    pads=(pad,) * 4,
                    size=5,
                    zero_point=zero_point,
                )
    for channels, kernel in ((12, (4, 4)), (12, (2, 2)), (4, (4, 4)), (12, (3, 3))):
        for zero_point in (0, 114):
            yield Layer(
                "conv_blocks", channels, 16, kernel, pads=(1, 1, 1, 1), size=6, zero_point=zero_point, batch=2
            )
    for channels, outputs, kernel, group in (
        (3, 8, (3, 3), 1), (16, 17, (3, 3), 1), (16, 16, (1, 1), 1), (5, 1, (5, 5), 1), (6, 4, (3, 3), 2),
        (8, 8, (3, 3), 8), (8, 16, (3, 3), 8),
    ):  # fmt: skip
        for zero_point in (0, 128):
            yield Layer("conv_basic", channels, outputs, kernel, group=group, size=5, zero_point=zero_point)
    yield Layer(conv, 16, 64, (3, 3), size=28, threads=2)
    for k in (1, 3, 16, 17, 64, 513):
        for n in (1, 8, 16, 17):
            for m in (1, 8):
                for trans_b in (False, True):
                    op = "gemm_float" if n in (1, 16) else "gemm"
                    yield Layer(op, k, n, batch=m, trans_b=trans_b)
                op = "matmul_float" if n in (8, 17) else "matmul"
                yield Layer(op, k, n, batch=m, zero_point=FULL)
                yield Layer(op, k, n, batch=m)
                yield Layer("matmul_integer", k, n, batch=m, zero_point=128 if k == 64 else 0)
    for zero_point in (128, 255):
        yield Layer("gemm", 65, 9, batch=3, trans_b=True, zero_point=zero_point)
        yield Layer("gemm_float", 65, 9, zero_point=zero_point)


def probe_saturation() -> int:
    """The sum of 64 products 255 * 127 that MatMulInteger computes; 2072640 is exact."""
    layer = Layer("matmul_integer", 64, 1)
    ones = np.full(layer.input_shape(), FULL, np.uint8)
    return int(outputs_of(layer, np.full((1, 64), 127), np.zeros(1), 1.0, ones)[0, 0])


EXACT = 64 * FULL * 127
"""Sum of the 64 products that no kernel may fall short of."""


SHARED = {
    "own": "two convolutions that share nothing",
    "weight": "a DequantizeLinear each of one int8 weight",
    "dequantize": "one int8 weight and its DequantizeLinear",
    "zero_point": "the int8 zero points of two weights",
    "weight, 7 bits": "the same, all weights in [-64, 63]",
    "zero_point, 7 bits": "the same, all weights in [-64, 63]",
    "zero_point, one 7 bits": "the same, the weights of one of them in [-64, 63]",
    "one_output": "nothing; one output channel each, so two equal zero points of one element",
    "equal": "nothing; equal weights in two initializers",
}
"""Constants that two convolutions of one Q/DQ graph share."""


def _two_layers(kind: str) -> tuple[bytes, list[int]]:
    """Two convolutions of one input that share what `SHARED` says, and their exact sums where activations are 255."""
    kind, _, bits = kind.partition(", ")
    outputs, rest = 1 if kind == "one_output" else 2, 63 if bits == "7 bits" else 127
    shares_weight = kind in ("weight", "dequantize")
    last = 63 if bits == "one 7 bits" else rest if shares_weight or kind == "equal" else rest - 1
    tensors: dict[str, Array] = {"one": np.array(1, np.float32), "step": np.array(4096, np.float32)}
    tensors["zero"] = np.array(0, np.uint8)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["x_q"], "x_quantize"),
        helper.make_node("DequantizeLinear", ["x_q", "one", "zero"], ["x_dq"], "x_dequantize"),
    ]
    for name, value in (("a", rest), ("b", last)):
        tensors[f"weight_{name}"] = np.full((outputs, 16, 1, 1), value, np.int8)
        tensors[f"zeros_{name}"] = np.zeros(outputs, np.int8)
        tensors[f"ones_{name}"] = np.ones(outputs, np.float32)
        inputs = [
            "weight_a" if shares_weight else f"weight_{name}",
            f"ones_{name}",
            "zeros_a" if kind == "zero_point" else f"zeros_{name}",
        ]
        dequantized = "w_a" if kind == "dequantize" else f"w_{name}"
        if dequantized == f"w_{name}":
            nodes.append(helper.make_node("DequantizeLinear", inputs, [f"w_{name}"], f"w_{name}", axis=0))
        nodes += [
            helper.make_node("Conv", ["x_dq", dequantized], [f"sum_{name}"], f"conv_{name}"),
            helper.make_node("QuantizeLinear", [f"sum_{name}", "step", "zero"], [f"q_{name}"], f"q_{name}"),
            helper.make_node("DequantizeLinear", [f"q_{name}", "step", "zero"], [f"y_{name}"], f"y_{name}"),
        ]
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 16, 2, 2])],
        [helper.make_tensor_value_info(f"y_{name}", TensorProto.FLOAT, None) for name in "ab"],
        [numpy_helper.from_array(a, n) for n, a in tensors.items() if n in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString()), [16 * FULL * value for value in (rest, last)]


def _precise_layer(layer: Layer) -> str:
    """Whether the option makes a layer exact."""
    filters = np.random.default_rng(0).integers(-128, 128, (layer.outputs, layer.length))
    x = np.full(layer.input_shape(), FULL, np.uint8)
    step = 1.0 if layer.exact_sum else 2.0**13
    actual = outputs_of(layer, filters, np.zeros(layer.outputs, np.int64), step, x, precise=True)
    expected = sums_of(layer, filters, x, exact=True)
    if not layer.exact_sum:
        expected = np.clip(np.rint(expected / step) + 128, 0, 255).astype(np.int64)
    return "exact" if (actual == expected).all() else "saturates"


def _precise_graph(kind: str) -> str:
    """Effect of the option on two convolutions."""
    model, sums = _two_layers(kind)
    x = np.full((1, 16, 2, 2), FULL, np.float32)
    try:
        outputs = session_of(model, precise=True).run(None, {"x": x})
    except Exception as error:  # ONNX Runtime raises types of its own
        return f"refused: {str(error).strip().splitlines()[0][-70:]}"
    exact = all((y == np.rint(s / 4096) * 4096).all() for y, s in zip(outputs, sums, strict=True))
    return "exact" if exact else "saturates"


def _send_result(send: Connection, kind: str, layer: Layer | None) -> None:
    send.send(_precise_graph(kind) if layer is None else _precise_layer(layer))


def precision_option() -> dict[str, str]:
    """Effect of `session.x64quantprecision=1`: by operator, and by what two layers share.

    Each graph has a process of its own, for ONNX Runtime before 1.30 aborts on a MatMulInteger whose weight has no zero
    point.
    """
    found = {}
    cases: list[tuple[str, Layer | None]] = [(layer.name(), layer) for layer in layers(quick=True)]
    for name, layer in [*cases, *((kind, None) for kind in SHARED)]:
        receive, send = FORK.Pipe(duplex=False)
        process = FORK.Process(target=_send_result, args=(send, name, layer))
        process.start()
        send.close()
        try:
            text = str(receive.recv())
        except EOFError:
            text = ""
        process.join()
        title = name if layer is not None else f"{name}: {SHARED[name]}"
        found[title] = text or f"KILLED: the process ends with {process.exitcode}"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few layers, in seconds")
    parser.add_argument("--option", action="store_true", help="try session.x64quantprecision=1 instead")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    found = probe_saturation()
    result: dict[str, Any] = {
        "onnxruntime": ort.__version__, "sum": found, "exact_sum": EXACT, "saturates": found != EXACT,
        "quick": arguments.quick, "layers": [],
    }  # fmt: skip
    print(f"onnxruntime {ort.__version__}: 64 products of 255 and 127 sum to {found}; exact is {EXACT}")
    broken = 0
    if arguments.option:
        result["x64quantprecision"] = precision_option()
        for kind, text in result["x64quantprecision"].items():
            print(f"{kind:<95} {text}")
    elif found == EXACT:
        print("these kernels do not saturate: nothing to check")
    else:
        rng = np.random.default_rng(arguments.seed)
        for layer in layers(arguments.quick):
            fault = Probe(layer, rng, not arguments.quick).run()
            broken += bool(fault)
            rule = "never saturates" if layer.depthwise else "pairs 2j, 2j+1"
            result["layers"].append({"layer": layer.name(), "rule": rule, "fault": fault})
            print(f"{layer.name():<58} {rule:<16} {'BREAKS: ' + fault if fault else 'holds'}")
        print(
            f"{len(result['layers'])} layers, {broken} break the rule, {time.perf_counter() - started:.0f} s"
        )
    result["seconds"] = round(time.perf_counter() - started, 1)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
