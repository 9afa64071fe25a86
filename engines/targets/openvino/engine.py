"""An ONNX graph that OpenVINO runs on the CPU."""

from __future__ import annotations

import threading
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openvino as ov

from export_zoo.base.errors import BadInputError
from export_zoo.base.machine import library_versions, session_threads
from export_zoo.engines.targets.batch import checked_batch

Float32Array = npt.NDArray[np.float32]

VERSION = library_versions("openvino")["openvino"]


@cache
def core() -> ov.Core:
    """OpenVINO of this process."""
    return ov.Core()


def compiled(
    graph: Path, *, threads: int, streams: int = 1, profiled: bool = False
) -> tuple[ov.Model, ov.CompiledModel]:
    """An ONNX graph, as it was read and as it was compiled for this CPU.

    Args:
        threads: number of threads of each stream, 0 for all usable cores.
        streams: batches that are computed at the same time.
        profiled: whether requests tell the time of each node.

    Raises:
        BadInputError: OpenVINO cannot load the file.
    """
    options = {
        # Otherwise floats are computed in bfloat16 on CPUs with AMX.
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": streams,
        # Otherwise two engines of one thread each are bound to the same core.
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_NUM_THREADS": streams * session_threads(threads, streams),
        "PERF_COUNT": profiled,
    }
    try:
        model = core().read_model(graph)
        return model, core().compile_model(model, "CPU", options)
    except RuntimeError as error:
        raise BadInputError(
            f"{graph}: OpenVINO {VERSION} cannot load it: {' '.join(str(error).split())[:500]}",
            hint="export it again: the file is damaged, or was made for another version",
        ) from error


class OpenVinoEngine:
    """An ONNX graph that OpenVINO compiled for this CPU. Safe to share between threads: each has a request of its own.

    Args:
        graph: the ONNX file.
        threads: number of threads of each stream, 0 for all usable cores.
        streams: batches that are computed at the same time. Further ones wait.

    Raises:
        BadInputError: OpenVINO cannot load the file.
    """

    def __init__(self, graph: Path, *, threads: int = 0, streams: int = 1) -> None:
        model, self._compiled = compiled(graph, threads=threads, streams=streams)
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
