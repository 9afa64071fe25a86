"""Finds the module in which a graph begins to differ from the eager network."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import nn

from export_zoo.base import graph_io
from export_zoo.engines.parity.metrics import relative_errors
from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine
from export_zoo.exporter.models.eager import module_outputs

MIN_DIFFERENCE = 1e-3
"""Default of `least`: more than rounding amounts to in most networks."""


def first_different_module(
    graph: Path, model: nn.Module, images: npt.NDArray[np.float32], least: float = MIN_DIFFERENCE
) -> str:
    """Path of the first module, in the order of the graph, whose output differs from eager's; empty if none does.

    Modules that run more than once or return no single tensor are not compared: then the next one is named.

    Args:
        graph: the graph; its nodes carry their module's path.
        images: one batch of inputs, float32 [N, C, H, W].
        least: difference of a module's output, relative to its largest value, from which the module is named.
    """
    eager: dict[str, list[npt.NDArray[np.float32]]] = {}
    for path, tensor in module_outputs(model, torch.from_numpy(images)):
        eager.setdefault(path, []).append(tensor.float().numpy())
    found = _outputs_of_modules(graph, images)
    for path, output in found.items():
        wanted = eager.get(path, [])
        comparable = len(wanted) == 1 and wanted[0].shape == output.shape
        if comparable and not max(relative_errors(wanted[0], output)) <= least:
            return path
    return ""


def _outputs_of_modules(graph: Path, images: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[np.float32]]:
    """Output of the last node of each module, by the module's path, in the order of the graph."""
    model = graph_io.load(graph)
    last: dict[str, ir.Node] = {}
    for node in model.graph:
        if module := graph_io.module_of(node):
            last.pop(module, None)  # so that the order is that of the last nodes
            last[module] = node
    values = {
        module: node.outputs[0]
        for module, node in last.items()
        if node.outputs[0].dtype == ir.DataType.FLOAT and node.outputs[0] not in model.graph.outputs
    }
    count = len(model.graph.outputs)
    model.graph.outputs.extend(values.values())
    with tempfile.TemporaryDirectory(prefix="export-zoo-") as directory:
        path = Path(directory) / "graph.onnx"
        graph_io.save(model, path)
        outputs = OnnxRuntimeEngine(path, fused=False).run_all(images)
    return dict(zip(values, outputs[count:], strict=True))
