"""The graph of an engine with all roundings written out, and the float graph that it stands for, node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from export_zoo.base import graph_io
from export_zoo.base.errors import BadInputError
from export_zoo.calibration.ranges import Ranges
from export_zoo.engines.bundle import reader
from export_zoo.engines.bundle.manifest import Engine, Manifest
from export_zoo.engines.precision.int8.equalize import equalize_as, observed
from export_zoo.engines.precision.int8.keep_float import kept_float
from export_zoo.engines.precision.int8.names import APPROXIMATE, OFF
from export_zoo.engines.precision.int8.qdq import float_counterpart
from export_zoo.engines.precision.int8.rules import Int8Rules
from export_zoo.engines.precision.placement import Placement
from export_zoo.engines.precision.registry import PRECISIONS
from export_zoo.engines.precision.twin import make_twin
from export_zoo.engines.targets.registry import TARGETS


@dataclass(frozen=True)
class Counterparts:
    """Two graphs of an engine, whose nodes have the same names and the same channels.

    Attributes:
        rounded: float32, with a pair of nodes for each rounding of a tensor, as the engine has them. In INT8 engines,
            what runs in half is float here: its errors are 40 dB smaller.
        exact: without roundings. It computes what eager PyTorch does, but for equalization through ReLU6.
        original: the FP32 graph before it was quantized, from which placements follow; None if nothing is quantized.
        placement: what is quantized.
        kept: names of the layers that INT8 leaves float.
    """

    rounded: ir.Model
    exact: ir.Model
    original: ir.Model | None
    placement: Placement
    kept: frozenset[str]


def of_graphs(
    rounded: ir.Model, exact: ir.Model, rules: Int8Rules, keep_float: Sequence[str]
) -> Counterparts:
    """The counterparts of an INT8 engine. Both models are changed.

    Args:
        rounded: the engine's graph.
        exact: the FP32 graph, equalized as the engine was.
        keep_float: patterns of the layers that the engine leaves float.
    """
    make_twin(rounded.graph, rounding=False)
    if rules.plain is not None:
        rules.plain(rounded.graph)
    original = exact.clone()
    kept = kept_float(exact.graph, keep_float)
    placement = float_counterpart(exact.graph, rules, kept)
    return Counterparts(rounded, exact, original, placement, kept)


def of_half(rounded: ir.Model, exact: ir.Model) -> Counterparts:
    """The counterparts of an FP16 engine, from its graph, which is changed, and the FP32 graph."""
    make_twin(rounded.graph)
    return Counterparts(rounded, exact, None, Placement(), frozenset())


def of_engine(bundle: Path, manifest: Manifest, engine: Engine) -> Counterparts:
    """The counterparts of a bundle's engine.

    Raises:
        BadInputError: files are missing or damaged, or the bundle lacks what is needed.
    """
    recipe, file = manifest.recipe, engine.precision_graph()[0]
    rounded = graph_io.load(reader.checked(bundle, file))
    exact = graph_io.load(reader.checked(bundle, recipe.graph))
    if not PRECISIONS[engine.precision].quantized:
        return of_half(rounded, exact)
    name = engine.tuning.equalized if engine.tuning is not None else OFF
    if name != OFF:
        if recipe.calibration is None:
            raise BadInputError(f"{bundle}: has no ranges", hint="export it again with --calib")
        ranges = Ranges.read(reader.checked(bundle, recipe.calibration.ranges))
        wanted = observed(exact.graph, approximate=name == APPROXIMATE)
        tensors = ranges.tensors
        if any(tensor not in tensors or not tensors[tensor].channels for tensor in wanted):
            raise BadInputError(
                f"{bundle}: its ranges lack the magnitudes of channels, as those of earlier versions do",
                hint="export it again",
            )
        equalize_as(exact.graph, {tensor: tensors[tensor].magnitudes() for tensor in wanted}, name)
    return of_graphs(rounded, exact, TARGETS[engine.target].int8, engine.kept_float(recipe))


def nodes_by_name(graph: ir.Graph) -> Mapping[str, ir.Node]:
    return {str(node.name): node for node in graph}
