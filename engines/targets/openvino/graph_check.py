"""Whether OpenVINO takes a graph. Apart from the engine, which also runs on emulated CPUs, where onnx_ir is absent."""

from __future__ import annotations

import re
from pathlib import Path

from export_zoo.base import graph_io
from export_zoo.base.errors import TargetRefusalError
from export_zoo.engines.targets.openvino.engine import VERSION, core


def check_graph(graph: Path) -> None:
    """Let OpenVINO read an FP32 graph.

    Raises:
        TargetRefusalError: it does not take the graph; the message names node and module.
    """
    try:
        core().read_model(graph)
    except RuntimeError as error:
        raise TargetRefusalError(
            f"openvino {VERSION} does not take the graph: {_reason(str(error), graph)}",
            hint="leave --target openvino out",
        ) from error


_UNKNOWN = re.compile(r"No conversion rule found for operations: (.+)")


def _reason(text: str, graph: Path) -> str:
    """OpenVINO's reason to refuse a graph, with the node and its module where it names operators only."""
    if (found := _UNKNOWN.search(text)) is None:
        return " ".join(text.split())[:500]
    # `Det-20` of the ONNX standard, or `domain.Operator`.
    names = {name.strip().rpartition(".")[2].partition("-")[0] for name in found[1].split(",")}
    node = next((node for node in graph_io.load(graph).graph if node.op_type in names), None)
    if node is None:
        return f"it has no {', '.join(sorted(names))}"
    module = graph_io.module_of(node)
    return f"it has no {node.op_type}, which node {node.name} is" + (f" (module {module})" if module else "")
