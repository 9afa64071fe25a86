"""Cross-layer equalization: move powers of two between the channels of neighbouring layers.

A layer's output channel times s, and what reads it divided by s, is the same function where all between the two is
positively homogeneous (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
arXiv 1906.04721, section 4.1). With powers of two no product and no sum is rounded otherwise: float logits stay the
same to the bit. Only the ranges change, and with them what 8 bits make of a tensor whose channels differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from export_zoo.engines.precision.placement import constant, readers, weight_of
from export_zoo.engines.precision.rewrites import add_constant, remove_unused_initializers

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

HOMOGENEOUS = frozenset(
    {"Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity"}
)
"""Operators for which f(s x) = s f(x), s > 0, exactly where s is a power of two."""

MAX_EXPONENT = 24
"""Of a scale, far from what float32 cannot hold."""

STRENGTHS = (0.25, 0.75)
"""Powers of the need that are tried: with 0 each channel fills the range, with 1 the weights that read it are alike."""

HEADROOM = 0.8
"""Part of a ReLU6's ceiling that calibrated magnitudes may reach: other images have larger ones."""

LEAST_NEED = 2.0**-16
"""Of a channel that nothing reads."""


@dataclass(frozen=True)
class Reader:
    """A layer that reads the scaled channels."""

    node: ir.Node
    offset: int
    """Of the first channel among the layer's input channels (or features)."""
    repeat: int
    """Input features per channel: height times width behind a Flatten."""


@dataclass
class Link:
    """A layer whose output channels can be scaled, and all that reads them."""

    producer: ir.Node
    activation: ir.Value
    """The producer's output, behind its Relu where it has one."""
    channels: int
    ceiling: float | None
    """What the activation is cut off at: 6 of a ReLU6."""
    readers: list[Reader] = field(default_factory=list)


def links(graph: ir.Graph, *, approximate: bool = False) -> Iterator[Link]:
    """Every layer whose output reaches weighted layers only, through homogeneous operators only.

    Args:
        approximate: through a ReLU6 right behind the layer, too.
    """
    for node in graph:
        weight = weight_of(node)
        if weight is None or node.op_type != "Conv":
            continue
        output = node.outputs[0]
        following = readers(output)
        behind, ceiling = output, None
        if len(following) == 1 and not output.is_graph_output():
            ceiling = _ceiling(following[0]) if approximate else None
            if following[0].op_type == "Relu" or ceiling is not None:
                behind = following[0].outputs[0]
        value = node.inputs[1]
        assert value is not None
        assert value.shape is not None
        link = Link(node, behind, int(value.shape.numpy()[0]), ceiling)
        if _trace(behind, 0, 1, link) and link.readers:
            yield link


def _trace(value: ir.Value, offset: int, repeat: int, link: Link) -> bool:
    """Follow a value to the layers that read it; False where something else does."""
    if value.is_graph_output():
        return False
    for use in value.uses():
        node = use.node
        if node.op_type in HOMOGENEOUS:
            if not _trace(node.outputs[0], offset, repeat, link):
                return False
        elif node.op_type == "Concat" and node.attributes.get_int("axis", 0) == 1 and repeat == 1:
            before = [_size(other, 1) for other in node.inputs[: use.idx]]
            if None in before or not _trace(node.outputs[0], offset + sum(b or 0 for b in before), 1, link):
                return False
        elif node.op_type in ("Flatten", "Reshape"):
            area = _area(value, node.outputs[0])
            if area is None or not _trace(node.outputs[0], offset * area, repeat * area, link):
                return False
        elif use.idx == 0 and node.op_type in ("Conv", "Gemm") and weight_of(node) is not None:
            link.readers.append(Reader(node, offset, repeat))
        else:
            return False
    return True


def _ceiling(node: ir.Node) -> float | None:
    """Of a Clip from 0 on; None of anything else."""
    if node.op_type != "Clip" or len(node.inputs) < 3 or not all(map(constant, node.inputs[1:3])):
        return None
    low, high = (float(_array(node, index)) for index in (1, 2))
    return high if low == 0 < high else None


def _size(value: ir.Value | None, axis: int) -> int | None:
    if value is None or value.shape is None or len(value.shape) <= axis:
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None


def _area(value: ir.Value, flat: ir.Value) -> int | None:
    """Height times width of what is flattened from [N, C, H, W] to [N, C * H * W]; None where it is something else."""
    sizes = [_size(value, axis) for axis in (1, 2, 3)]
    if (
        value.shape is None
        or len(value.shape) != 4
        or flat.shape is None
        or len(flat.shape) != 2
        or None in sizes
    ):
        return None
    channels, height, width = (int(size or 0) for size in sizes)
    return height * width if _size(flat, 1) == channels * height * width else None


def _table(node: ir.Node) -> Float64Array:
    """Largest magnitude with which each output channel of a layer reads each input channel (of a Gemm: feature)."""
    weight = np.abs(_array(node)).astype(np.float64)
    if node.op_type == "Gemm":
        return weight if node.attributes.get_int("transB", 0) else weight.T
    groups = node.attributes.get_int("group", 1)
    flat = weight.reshape(*weight.shape[:2], -1).max(axis=2)
    table = np.zeros((len(flat), groups * flat.shape[1]))
    rows, columns = len(flat) // groups, flat.shape[1]
    for group in range(groups):
        part = slice(group * rows, (group + 1) * rows)
        table[part, group * columns : (group + 1) * columns] = flat[part]
    return table


def _by_channel(array: Float64Array, reader: Reader, channels: int) -> Float64Array:
    """The link's part of something per input channel of a reader, float64 [channels]."""
    part = array[reader.offset : reader.offset + channels * reader.repeat]
    return np.asarray(part.reshape(channels, reader.repeat).max(axis=1))


def _reads(reader: Reader, channels: int, inputs: Float64Array) -> Float64Array:
    """How strongly a layer reads each channel: its weight as a part of the largest product of weight and activation in
    the same output channel, float64 [channels]. No scaling of output channels, or of other input channels, changes it.

    Args:
        inputs: largest magnitude of each of the layer's input channels, float64.
    """
    table = _table(reader.node)
    largest = (table * inputs).max(axis=1, keepdims=True)
    return _by_channel((table / np.where(largest > 0, largest, np.inf)).max(axis=0), reader, channels)


def _array(node: ir.Node, index: int = 1) -> Float32Array:
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy(), dtype=np.float32)


def _replace(graph: ir.Graph, node: ir.Node, index: int, array: Float32Array) -> None:
    """A constant of its own for one operand: the old one may have other readers."""
    name = f"{node.name}_equalized_{index}"
    if name in graph.initializers:
        graph.initializers[name].const_value = ir.tensor(array, name=name)
        return
    node.replace_input_with(index, add_constant(graph, name, array))


def scale(graph: ir.Graph, link: Link, scales: Float32Array) -> None:
    """Multiply the producer's channels by `scales`, powers of two float32 [channels], and divide what reads them."""
    weight = _array(link.producer)
    _replace(graph, link.producer, 1, weight * scales.reshape(-1, *[1] * (weight.ndim - 1)))
    if len(link.producer.inputs) > 2 and constant(link.producer.inputs[2]):
        _replace(graph, link.producer, 2, _array(link.producer, 2) * scales)
    for reader in link.readers:
        weight = _array(reader.node).copy()
        factors = np.repeat(1 / scales, reader.repeat)
        begin, end = reader.offset, reader.offset + len(factors)
        if reader.node.op_type == "Gemm":
            if reader.node.attributes.get_int("transB", 0):
                weight[:, begin:end] *= factors
            else:
                weight[begin:end] *= factors[:, None]
        else:
            groups = reader.node.attributes.get_int("group", 1)
            whole = np.ones(groups * weight.shape[1], dtype=np.float32)
            whole[begin:end] = factors
            by_group = np.repeat(whole.reshape(groups, weight.shape[1]), len(weight) // groups, axis=0)
            weight *= by_group[:, :, None, None]
        _replace(graph, reader.node, 1, weight)


def powers_of_two(scales: npt.NDArray[np.floating]) -> Float32Array:
    """Nearest powers of two, float32, within 2^-MAX_EXPONENT and 2^MAX_EXPONENT."""
    exponents = np.rint(np.log2(scales)).clip(-MAX_EXPONENT, MAX_EXPONENT)
    return np.asarray(np.exp2(exponents), dtype=np.float32)


def _below(ceiling: float, have: Float64Array, scales: Float64Array) -> Float32Array:
    """Powers of two that leave alone what reaches the ceiling, and bring nothing else to more than HEADROOM of it."""
    free = (have > 0) & (have < HEADROOM * ceiling)
    most = np.exp2(np.floor(np.log2(HEADROOM * ceiling / np.where(free, have, 1.0))))
    return np.where(free, np.minimum(powers_of_two(scales), most), 1.0).astype(np.float32)


def observed(graph: ir.Graph, *, approximate: bool = False) -> list[str]:
    """Activations whose channels `equalize` wants to know the magnitudes of."""
    found = list(links(graph, approximate=approximate))
    names = {str(link.activation.name) for link in found}
    names |= {str(_input(reader.node).name) for link in found for reader in link.readers}
    return sorted(names)


def _input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def equalize(
    graph: ir.Graph, magnitudes: Mapping[str, Float32Array], strength: float, *, approximate: bool = False
) -> int:
    """Scale the channels of every link by how much they matter to what reads them; returns how many layers changed.

    The paper balances the weights of both layers. Ours have a scale per output channel, which leaves nothing to
    balance in the first; what is balanced are an activation's channels, which share one scale, with the weights that
    read them, which share one in each output channel. A channel's largest activation becomes a power of its need, the
    largest share that it has in any output channel of what reads it; so the result does not depend on how channels
    were scaled before.

    Args:
        magnitudes: largest magnitude of each channel, float32 [channels], of the activations in `observed`, by name.
        strength: that power, 0 to 1, see STRENGTHS.
        approximate: scale through ReLU6, too: channels whose magnitude stays under its ceiling, to under it. On images
            with larger ones the function is another one.
    """
    changed = 0
    known = {name: array.astype(np.float64) for name, array in magnitudes.items()}
    decided: list[tuple[Link, Float32Array]] = []
    for link in links(graph, approximate=approximate):
        have = known[str(link.activation.name)]
        reads, needs = [], []
        for reader in link.readers:
            inputs = known[str(_input(reader.node).name)]
            reads.append(_reads(reader, link.channels, inputs))
            needs.append(reads[-1] * _by_channel(inputs, reader, link.channels))
        read, need = np.max(reads, axis=0), np.maximum(np.max(needs, axis=0), LEAST_NEED)
        alive = have > 0
        if not alive.any():
            continue
        # A channel that never moves is read as weakly as the usual one, so that it costs the others nothing.
        usual = np.median(need[alive] ** (1 - strength))
        idle = np.where(read > 0, read / usual, 1.0)
        scales = np.where(alive, need**strength / np.where(alive, have, 1.0), idle)
        if link.ceiling is None:
            decided.append((link, powers_of_two(scales)))
        else:
            decided.append((link, _below(link.ceiling, have, scales * have.max())))
    for link, chosen in decided:
        if (chosen != 1).any():
            scale(graph, link, chosen)
            changed += 1
    remove_unused_initializers(graph)
    return changed
