"""Cross-layer equalization: move powers of two between the channels of neighbouring layers.

Multiplying a layer's output channel by s and dividing the weights that read it by s keeps the function, if all
operators between the two are positively homogeneous (Nagel et al. 2019, "Data-Free Quantization Through Weight
Equalization and Bias Correction", arXiv 1906.04721, section 4.1). Powers of two do not change how products and sums are
rounded: float logits stay the same to the bit. Only the ranges change, and with them the quantization error of tensors
whose channels differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from export_zoo.engines.precision.int8.names import APPROXIMATE
from export_zoo.engines.precision.placement import constant, gate_layers, gate_of, readers, weight_of
from export_zoo.engines.precision.rewrites import add_constant, remove_unused_initializers

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

HOMOGENEOUS = frozenset(
    {"Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity"}
)
"""Operators for which f(s x) = s f(x) for s > 0. The equality is exact if s is a power of two."""

MAX_EXPONENT = 24
"""Largest exponent of a scale, up or down. It is far from the limits of float32."""

STRENGTHS = (0.25, 0.75)
"""Exponents of the need that are tried. With 0, each channel fills the range. With 1, the weights that read them
are equally large."""

HEADROOM = 0.5
"""Fraction of a ReLU6's ceiling that calibrated magnitudes may reach. Other images have larger magnitudes. With 0.8 and
64 images, float logits of EfficientNet-Lite2 were within 18 dB of the original; with this and 300 images, within 35."""

LEAST_NEED = 2.0**-16
"""Lower bound on `need`; a channel that nothing reads gets this value."""


@dataclass(frozen=True)
class Reader:
    """A layer that reads the scaled channels."""

    node: ir.Node
    offset: int
    """Index of the first channel among the layer's input channels (or features)."""
    repeat: int
    """Input features per channel: height times width after a Flatten."""


@dataclass
class Link:
    """Channels that can be scaled, and all layers that read them."""

    producer: ir.Node | None
    """The layer whose output channels are scaled. None if `vector` is multiplied instead."""
    activation: ir.Value
    """The scaled tensor: the producer's output, after its Relu or ReLU6 if it has one."""
    channels: int
    ceiling: float | None = None
    """Upper bound of the activation: 6 for a ReLU6."""
    vector: ir.Value | None = None
    """One pixel an image, [N, C, 1, 1]: a product with it costs no time."""
    readers: list[Reader] = field(default_factory=list)
    scaled: list[ir.Value] = field(default_factory=list)
    """All tensors that are scaled."""


def links(graph: ir.Graph, *, approximate: bool = False) -> Iterator[Link]:
    """Every layer whose output reaches only weighted layers, and only through homogeneous operators.

    Args:
        approximate: also allow a ReLU6 directly after the layer.
    """
    gates = gate_layers(graph)  # they stay float
    for node in graph:
        weight = weight_of(node)
        if weight is None or node.op_type != "Conv" or node.name in gates:
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


def every_link(graph: ir.Graph, *, approximate: bool = False, gates: bool = False) -> Iterator[Link]:
    """All links: those of `links`, and what a factor for each channel of one pixel scales, at no cost.

    The latter are means of images; each layer's channels are scaled once.

    Args:
        approximate: see `links`.
        gates: also products of squeeze-and-excitation gates. Their values are the most heavy-tailed ones of a network,
            so that this often does not pay off.
    """
    found = list(links(graph, approximate=approximate))
    yield from found
    scaled = {reader.node.name for link in found for reader in link.readers}
    scaled |= gate_layers(graph)  # they stay float
    for node in graph:
        output = node.outputs[0]
        vector = output if node.op_type == "GlobalAveragePool" else gate_of(node) if gates else None
        channels = _size(output, 1)
        if vector is None or channels is None or _size(vector, 1) != channels:
            continue
        link = Link(None, output, channels, vector=vector)
        names = {reader.node.name for reader in link.readers} if _trace(output, 0, 1, link) else set()
        if names and scaled.isdisjoint(names):
            scaled |= names
            yield link


def _trace(value: ir.Value, offset: int, repeat: int, link: Link) -> bool:
    """Follow a value to the layers that read it. False if anything else reads it."""
    link.scaled.append(value)
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
    """Upper bound of a Clip whose lower bound is 0; None for any other node."""
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
    """Height times width if [N, C, H, W] is flattened to [N, C * H * W]. Otherwise, None."""
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


def _inputs(node: ir.Node) -> int:
    """Number of input channels of a Conv, or of input features of a Gemm."""
    rows, columns = _array(node).shape[:2]
    if node.op_type == "Gemm":
        return int(columns if node.attributes.get_int("transB", 0) else rows)
    return int(node.attributes.get_int("group", 1) * columns)


def _table(node: ir.Node) -> Float64Array:
    """Largest weight magnitude of each output channel for each input channel (for a Gemm, input feature)."""
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
    """The link's part of an array over a reader's input channels, float64 [channels]."""
    part = array[reader.offset : reader.offset + channels * reader.repeat]
    return np.asarray(part.reshape(channels, reader.repeat).max(axis=1))


def _reads(reader: Reader, channels: int, inputs: Float64Array) -> Float64Array:
    """How strongly a layer reads each channel, float64 [channels].

    This is the channel's weight divided by the largest product of weight and activation in the same output channel.
    Scaling output channels or other input channels does not change it.

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
    """Give one operand its own constant: the old constant may have other readers."""
    name = f"{node.name}_equalized_{index}"
    if name in graph.initializers:
        graph.initializers[name].const_value = ir.tensor(array, name=name)
        return
    node.replace_input_with(index, add_constant(graph, name, array))


def scale(graph: ir.Graph, link: Link, scales: Float32Array) -> None:
    """Multiply the link's channels by `scales`, and divide the weights that read them by `scales`.

    Args:
        scales: powers of two, float32 [channels].
    """
    if link.producer is None:
        _multiply(graph, link, scales)
    else:
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


def _multiply(graph: ir.Graph, link: Link, scales: Float32Array) -> None:
    """Multiply the vector of a link by `scales`. Other readers still get the unscaled values."""
    vector = link.vector
    assert vector is not None
    producer = vector.producer()
    assert producer is not None
    uses = [u for u in vector.uses() if vector is link.activation or u.node.outputs[0] is link.activation]
    name = f"{link.activation.name}_equalized"
    factors = add_constant(graph, f"{name}_factors", scales.reshape(-1, 1, 1))
    product = ir.node("Mul", [vector, factors], name=name, metadata_props=dict(producer.metadata_props))
    product.outputs[0].name = f"{name}_output"
    product.outputs[0].type, product.outputs[0].shape = vector.type, vector.shape
    graph.insert_after(producer, product)
    for use in uses:
        use.node.replace_input_with(use.idx, product.outputs[0])


def powers_of_two(scales: npt.NDArray[np.floating]) -> Float32Array:
    """Nearest powers of two, float32, from 2^-MAX_EXPONENT to 2^MAX_EXPONENT."""
    exponents = np.rint(np.log2(scales)).clip(-MAX_EXPONENT, MAX_EXPONENT)
    return np.asarray(np.exp2(exponents), dtype=np.float32)


def _below(ceiling: float, have: Float64Array, scales: Float64Array) -> Float32Array:
    """Powers of two for channels below a ceiling.

    A channel that reaches HEADROOM of the ceiling keeps the scale 1. No other channel exceeds HEADROOM of it.
    """
    free = (have > 0) & (have < HEADROOM * ceiling)
    most = np.exp2(np.floor(np.log2(HEADROOM * ceiling / np.where(free, have, 1.0))))
    return np.where(free, np.minimum(powers_of_two(scales), most), 1.0).astype(np.float32)


def observed(graph: ir.Graph, *, approximate: bool = False) -> list[str]:
    """Names of the activations whose channel magnitudes `equalize` needs."""
    found = list(every_link(graph, approximate=approximate, gates=True))
    names = {str(link.activation.name) for link in found}
    names |= {str(_input(reader.node).name) for link in found for reader in link.readers}
    return sorted(names)


def scaled_tensors(graph: ir.Graph, *, approximate: bool = False) -> set[str]:
    """Names of the tensors that `equalize` may scale."""
    found: set[str] = set()
    for link in every_link(graph, approximate=approximate, gates=True):
        values = [*link.scaled, *(link.producer.outputs if link.producer is not None else ())]
        found |= {str(value.name) for value in values}
    return found


def _input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def equalize(
    graph: ir.Graph,
    magnitudes: Mapping[str, Float32Array],
    strength: float,
    *,
    approximate: bool = False,
    gates: bool = False,
) -> dict[str, Float32Array]:
    """Scale the channels of every link by how much they matter to their readers.

    The paper balances the weights of both layers. Here, weights have a scale per output channel, so there is nothing to
    balance in the first layer. Instead, an activation's channels, which share one scale, are balanced with the weights
    that read them, which share one scale in each output channel. A channel's need is the largest share that it has in
    any output channel of its readers. Its largest activation becomes a power of its need. So the result does not depend
    on how channels were scaled before.

    Args:
        magnitudes: largest magnitude of each channel, float32 [channels], of the activations in `observed`, by name.
        strength: exponent of the need, 0 to 1, see STRENGTHS.
        approximate: also scale through ReLU6. Only channels whose magnitude is under its ceiling are scaled, and they
            stay under it. On images with larger magnitudes, the function changes.
        gates: see `every_link`.

    Returns the factors of the inputs of each layer that reads scaled channels, float32 [input channels or features], by
    node name.
    """
    factors: dict[str, Float32Array] = {}
    known = {name: array.astype(np.float64) for name, array in magnitudes.items()}
    decided: list[tuple[Link, Float32Array]] = []
    for link in every_link(graph, approximate=approximate, gates=gates):
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
        # A channel that is always 0 is read as weakly as a typical channel, so that it costs the others nothing.
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
            for reader in link.readers:
                found = factors.setdefault(str(reader.node.name), np.ones(_inputs(reader.node), np.float32))
                part = np.repeat(chosen, reader.repeat)
                found[reader.offset : reader.offset + len(part)] = part
    remove_unused_initializers(graph)
    return factors


def equalize_as(
    graph: ir.Graph, magnitudes: Mapping[str, Float32Array], name: str
) -> dict[str, Float32Array]:
    """`equalize` by the name that a manifest records: a strength, or one of `names`."""
    strength, *more = name.split()
    return equalize(
        graph, magnitudes, float(strength), approximate=name == APPROXIMATE, gates="gates" in more
    )
