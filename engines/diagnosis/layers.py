"""The layers of an engine, and the roundings that each stands for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from export_zoo.base import graph_io
from export_zoo.engines.diagnosis.counterparts import Counterparts, nodes_by_name
from export_zoo.engines.diagnosis.mixtures import casts_of, constant_of, pair_of
from export_zoo.engines.precision.int8.rules import Int8Rules

PARTS = ("_product", "_product_with_bias", "")
"""Suffixes of the nodes that a layer may consist of, see `targets.onnxruntime.kernels`; first that with its weight."""


@dataclass(frozen=True)
class Layer:
    """A layer in 8 bits or in half.

    Attributes:
        name: name of its node; in FP16, of one node of its module.
        module: path of its module in PyTorch; its name if that is not known.
    """

    name: str
    module: str


class Layers(ABC):
    """The layers of an engine, in the order of its graph, and which roundings there are if only some are rounded."""

    def __init__(self, layers: list[Layer], nodes: Mapping[str, frozenset[str]] | None = None) -> None:
        self.layers = layers
        self.nodes = nodes or {layer.name: frozenset({layer.name}) for layer in layers}
        """Names of the nodes of each layer, by its name."""
        self.names = frozenset(layer.name for layer in layers)

    @abstractmethod
    def rounded(self, names: Collection[str]) -> frozenset[str]:
        """The roundings that there are if these layers are rounded and all others are float."""


class QuantizedLayers(Layers):
    """The layers of an INT8 engine. Which tensors have Q/DQ pairs is what the placement policy says.

    Args:
        roundings: names of all roundings.
    """

    def __init__(self, counterparts: Counterparts, rules: Int8Rules, roundings: Collection[str]) -> None:
        assert counterparts.original is not None
        self._graph, self._kept = counterparts.original.graph, counterparts.kept
        self._place, self._roundings = rules.place, frozenset(roundings)
        nodes = nodes_by_name(self._graph)
        names = counterparts.placement.weights
        super().__init__([Layer(name, graph_io.module_of(nodes[name]) or name) for name in names])

    def rounded(self, names: Collection[str]) -> frozenset[str]:
        chosen = frozenset(names)
        tensors = self._place(self._graph, self._kept | (self.names - chosen)).activations
        weights = {
            constant_of(f"{name}{part}", index) for name in chosen for part in PARTS for index in (0, 1, 2)
        }
        return self._roundings & (weights | set(map(pair_of, tensors)))


MOST_MODULES = 100
"""Number of modules above which their parents are taken: each is tried in a graph of its own."""


class HalfLayers(Layers):
    """The modules of an FP16 engine, or their parents if there are many; a node without a module stands for itself.

    Arguments: see `QuantizedLayers`.
    """

    def __init__(self, counterparts: Counterparts, roundings: Collection[str]) -> None:
        known, self._own = frozenset(roundings), dict[str, frozenset[str]]()
        nodes: dict[str, frozenset[str]] = {}
        found: dict[str, Layer] = {}
        owned: list[tuple[ir.Node, frozenset[str]]] = []
        exact = nodes_by_name(counterparts.exact.graph)
        for node in counterparts.rounded.graph:
            own = {casts_of(str(value.name)) for value in node.outputs}
            own |= {constant_of(str(node.name), index) for index in range(len(node.inputs))}
            if own := own & known:
                owned.append((_owner(node, exact), frozenset(own)))
        paths = [(graph_io.module_of(owner) or str(owner.name)).split(".") for owner, _ in owned]
        depth = max(map(len, paths), default=1)
        while depth > 1 and len({tuple(path[:depth]) for path in paths}) > MOST_MODULES:
            depth -= 1
        groups: dict[str, list[tuple[ir.Node, frozenset[str]]]] = {}
        for one, path in zip(owned, paths, strict=True):
            groups.setdefault(".".join(path[:depth]), []).append(one)
        for module, members in groups.items():
            name = str(_foremost([owner for owner, _ in members]).name)
            found[module] = Layer(name, module)
            self._own[name] = frozenset[str]().union(*(own for _, own in members))
            nodes[name] = frozenset(str(owner.name) for owner, _ in members)
        super().__init__([*found.values()], nodes)

    def rounded(self, names: Collection[str]) -> frozenset[str]:
        return frozenset[str]().union(*(self._own[name] for name in names))


WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def measurable(node: ir.Node) -> bool:
    """Whether a node's output is one tensor of floats."""
    return len(node.outputs) == 1 and node.outputs[0].dtype == ir.DataType.FLOAT


def _foremost(nodes: Sequence[ir.Node]) -> ir.Node:
    """The node that a module is shown by: its first one with a weight, else its last one that makes floats."""
    weighted = [node for node in nodes if node.op_type in WEIGHTED]
    return next(iter([*weighted, *filter(measurable, reversed(nodes)), *nodes]))


def _owner(node: ir.Node, exact: Mapping[str, ir.Node]) -> ir.Node:
    """The node itself, if FP32 has it; for a cast, the node whose output it casts, or which reads the input."""
    while str(node.name) not in exact:
        source = node.inputs[0]
        producer = source.producer() if source is not None else None
        node = producer if producer is not None else _reader(node, exact)
    return node


def _reader(node: ir.Node, exact: Mapping[str, ir.Node]) -> ir.Node:
    """The first node of the FP32 graph behind a cast of the graph's input."""
    while str(node.name) not in exact:
        readers = [use.node for use in node.outputs[0].uses()]
        node = next((reader for reader in readers if reader.op_type != "Shape"), readers[0])
    return node
