"""The embedded engine: a precision graph in ONNX Runtime on the CPU."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidProtobuf

from export_zoo.base.errors import BadInputError, TargetUnavailableError
from export_zoo.base.machine import session_threads
from export_zoo.engines.precision.int8.saturation.probe import EXACT_SESSION, saturates
from export_zoo.engines.targets.batch import checked_batch

if TYPE_CHECKING:
    import onnx_ir as ir

Float32Array = npt.NDArray[np.float32]


CRASHING = ["NchwcTransformer"]
"""Optimizations in which ONNX Runtime 1.31 segfaults on FP16 ViTs."""


class OnnxRuntimeEngine:
    """An ONNX graph loaded on the CPU. Thread-safe: ONNX Runtime allows concurrent `run` calls.

    Args:
        graph: the ONNX file.
        threads: intra-op threads of each stream, 0 for all usable cores.
        streams: batches that are computed at the same time, each with threads of its own.
        fused: if False, graph optimization is off: Q/DQ pairs are computed one by one, in float.
        half: the graph computes in FP16. The layout optimizer crashes on FP16 transformers, so it is disabled.
        saturating_session: session configuration that is added if int8 sums saturate and the graph is fused, see
            `saturation.probe`. Empty for a graph that cannot saturate.

    Raises:
        BadInputError: ONNX Runtime cannot load the file.
        TargetUnavailableError: its kernels saturate here, and the graph cannot be run exactly.
    """

    def __init__(
        self,
        graph: Path,
        *,
        threads: int = 0,
        streams: int = 1,
        fused: bool = True,
        half: bool = False,
        saturating_session: Mapping[str, str] = EXACT_SESSION,
    ) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = session_threads(threads, streams)
        options.log_severity_level = 3
        # Otherwise, idle threads of one engine spin on the next one's cores: three engines in turn are up to 4x slower.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if not fused:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session_config: dict[str, str] = {}
        """Configuration that this session got because kernels saturate here."""
        if fused and saturating_session and saturates():
            self.session_config = dict(saturating_session)
        for key, value in self.session_config.items():
            options.add_session_config_entry(key, value)
        disabled = CRASHING if half else []
        try:
            # A session of one thread computes in the thread that calls it. Another one has threads that callers share.
            sessions = 1 if options.intra_op_num_threads == 1 else streams
            self._sessions = [_session(graph, options, disabled) for _ in range(sessions)]
        except TargetUnavailableError:
            raise
        except InvalidProtobuf as error:
            raise BadInputError(f"{graph}: is no ONNX file: {error}", hint="export it again") from error
        except Exception as error:  # ONNX Runtime raises a dozen types of its own
            if _of_memory(error):
                raise MemoryError(f"ONNX Runtime while loading {graph}") from error
            raise BadInputError(
                f"{graph}: ONNX Runtime {ort.__version__} cannot load it: {error}",
                hint="export it again: the file is damaged, or was made for another version",
            ) from error
        self._turns = itertools.cycle(self._sessions)
        self._thread = threading.local()
        (feed,) = self._sessions[0].get_inputs()
        self.input_name: str = feed.name
        self.output_names = [output.name for output in self._sessions[0].get_outputs()]
        self.input_shape: tuple[int | str, ...] = tuple(feed.shape)

    def run(self, batch: Float32Array) -> Float32Array:
        """The first output, logits float32 [N, classes] or [N, classes, H, W], of a batch float32 [N, 3, H, W].

        Raises:
            BadInputError: wrong dtype or shape.
        """
        return self.run_all(batch)[0]

    def run_all(self, batch: Float32Array) -> tuple[Float32Array, ...]:
        """All outputs, float32, of a preprocessed batch float32 [N, 3, H, W].

        Raises:
            BadInputError: wrong dtype or shape.
        """
        batch = checked_batch(batch, self.input_shape)
        try:
            outputs = self._of_this_thread().run(None, {self.input_name: batch})
        except Exception as error:
            if not _of_memory(error):
                raise
            raise MemoryError(f"ONNX Runtime at batch {batch.shape[0]}") from error
        return tuple(np.asarray(output, dtype=np.float32) for output in outputs)

    def _of_this_thread(self) -> ort.InferenceSession:
        session: ort.InferenceSession | None = getattr(self._thread, "session", None)
        if session is None:
            session = self._thread.session = next(self._turns)
        return session


def _of_memory(error: Exception) -> bool:
    """Whether ONNX Runtime had no memory, by its message: `bad_alloc`, `Failed to allocate memory`."""
    return "alloc" in str(error)


_SHARED = ("replace the existing tensor", "Initializer with same name exists")
"""Parts of ONNX Runtime's error messages if nodes share an int8 weight or zero point under `session.x64quantprecision`:
in 1.24 and later, and in 1.23."""


def _session(graph: Path, options: ort.SessionOptions, disabled: list[str]) -> ort.InferenceSession:
    def opened(model: Path | bytes) -> ort.InferenceSession:
        return ort.InferenceSession(
            model, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
        )

    def refused(error: Exception) -> bool:
        return any(words in str(error) for words in _SHARED)

    def not_exact(more: str = "") -> TargetUnavailableError:
        return TargetUnavailableError(
            f"{graph}: int8 sums saturate on this CPU, and ONNX Runtime {ort.__version__} cannot compute this graph "
            f"exactly: nodes share int8 tensors{more}",
            hint="export the bundle again, or load its FP32 engine",
        )

    try:
        return opened(graph)
    except Exception as error:
        if not refused(error):
            raise
    # Sums must be exact, so each node gets int8 tensors of its own, in memory.
    from export_zoo.base import graph_io
    from export_zoo.engines.precision.rewrites import own_int8_constants

    if graph_io.external_files(graph):
        raise not_exact(", and its weights are outside the file")
    model = graph_io.load(graph)
    own_int8_constants(model.graph)
    try:
        return opened(_serialized(model))
    except Exception as error:
        if refused(error):
            raise not_exact() from error
        raise


def _serialized(model: ir.Model) -> bytes:
    import onnx_ir as ir

    data: Any = ir.to_proto(model).SerializeToString()
    return bytes(data)
