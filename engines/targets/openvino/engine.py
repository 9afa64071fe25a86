"""An ONNX graph that OpenVINO runs on the CPU."""

from __future__ import annotations

import re
import threading
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openvino as ov

from export_zoo.base import graph_io
from export_zoo.base.errors import BadInputError, TargetRefusalError
from export_zoo.base.machine import library_versions, session_threads
from export_zoo.engines.targets.batch import checked_batch

Float32Array = npt.NDArray[np.float32]


_VERSION = library_versions("openvino")["openvino"]


@cache
def _core() -> ov.Core:
    return ov.Core()


def check_graph(graph: Path) -> None:
    """Let OpenVINO read an FP32 graph.

    Raises:
        TargetRefusalError: it does not take the graph; the message names node and module.
    """
    try:
        _core().read_model(graph)
    except RuntimeError as error:
        raise TargetRefusalError(
            f"openvino {_VERSION} does not take the graph: {_reason(str(error), graph)}",
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


def compiled(graph: Path, *, threads: int, profiled: bool = False) -> tuple[ov.Model, ov.CompiledModel]:
    """An ONNX graph, as it was read and as it was compiled for this CPU.

    Args:
        threads: number of threads, 0 for all usable cores.
        profiled: whether requests tell the time of each node.

    Raises:
        BadInputError: OpenVINO cannot load the file.
    """
    options = {
        # Otherwise floats are computed in bfloat16 on CPUs with AMX.
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        # Otherwise two engines of one thread each are bound to the same core.
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_NUM_THREADS": session_threads(threads),
        "PERF_COUNT": profiled,
    }
    try:
        model = _core().read_model(graph)
        return model, _core().compile_model(model, "CPU", options)
    except RuntimeError as error:
        raise BadInputError(
            f"{graph}: OpenVINO {_VERSION} cannot load it: {' '.join(str(error).split())[:500]}",
            hint="export it again: the file is damaged, or was made for another version",
        ) from error


class OpenVinoEngine:
    """An ONNX graph that OpenVINO compiled for this CPU. Safe to share between threads: each has a request of its own.

    Args:
        graph: the ONNX file.
        threads: number of threads, 0 for all usable cores.

    Raises:
        BadInputError: OpenVINO cannot load the file.
    """

    def __init__(self, graph: Path, *, threads: int = 0) -> None:
        model, self._compiled = compiled(graph, threads=threads)
        (feed,) = model.inputs
        self.input_shape = tuple(d.get_length() if d.is_static else "any" for d in feed.get_partial_shape())
        # Names as read: outputs that are the same tensor share all their names when they are compiled.
        self.output_names = [port.get_any_name() for port in model.outputs]
        self._requests = threading.local()

    def run_all(self, batch: Float32Array) -> tuple[Float32Array, ...]:
        """All outputs, float32, of a preprocessed batch float32 [N, 3, H, W].

        Raises:
            BadInputError: wrong dtype or shape.
        """
        batch = checked_batch(batch, self.input_shape)
        request = getattr(self._requests, "request", None)
        if request is None:
            request = self._requests.request = self._compiled.create_infer_request()
        found = request.infer([np.ascontiguousarray(batch)])
        return tuple(np.array(found[port], dtype=np.float32) for port in self._compiled.outputs)
