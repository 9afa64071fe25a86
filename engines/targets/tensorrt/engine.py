"""Run a TensorRT or TensorRT-RTX engine on a CUDA device, without PyTorch.

EXPERIMENTAL: written against the documented API, and not run on a GPU yet (see docs/gpu.md).
"""

from __future__ import annotations

import importlib
import logging
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export_zoo.base.errors import BadInputError, EnvironmentFailureError, TargetUnavailableError
from export_zoo.base.files import replacing
from export_zoo.engines.targets.tensorrt.worker import MODULES

log = logging.getLogger("export_zoo.tensorrt")
Float32Array = npt.NDArray[np.float32]


def _cuda() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise TargetUnavailableError(
            "the package cuda-bindings is not installed", hint="pip install cuda-bindings"
        ) from error


def _checked(cuda: Any, result: tuple[Any, ...]) -> Any:
    """The value of a CUDA runtime call.

    Raises:
        EnvironmentFailureError: the call failed; the message has CUDA's own description.
    """
    status, *values = result
    if status != cuda.cudaError_t.cudaSuccess:
        text = cuda.cudaGetErrorString(status)[1].decode()
        raise EnvironmentFailureError(
            f"CUDA: {text} ({status.name})", hint="see nvidia-smi: driver, free memory, other processes"
        )
    return values[0] if values else None


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            log.log(logging.ERROR if "ERROR" in severity.name else logging.DEBUG, text)

    return Logger()


class TensorRTEngine:
    """A plan on the current CUDA device, with one context, one stream and buffers for its largest batch.

    `run` may be called from several threads; calls take turns.

    Args:
        plan: the engine file.
        target: `tensorrt` or `tensorrt-rtx`.
        weights: for a plan without weights, the ONNX graph that it was built from, which has the weights.
        runtime_cache: file for the kernels that TensorRT-RTX compiles for this GPU. It is read if it exists, and
            written after the first run of each input shape. `tensorrt` does not use it: it compiles nothing.
        host_code: the plan was built with `--version-compatible`. It contains its own host code, which TensorRT loads
            only if that is allowed.
        cuda_graphs: TensorRT-RTX captures the kernels of each input shape as a CUDA graph and launches that graph.
            `tensorrt` does not use it.

    Raises:
        TargetUnavailableError: the packages are missing, or the plan belongs to another GPU or version.
        EnvironmentFailureError: CUDA reports an error.
    """

    def __init__(
        self,
        plan: Path,
        *,
        target: str,
        weights: Path | None = None,
        runtime_cache: Path | None = None,
        host_code: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        self._cuda = cuda = _cuda()
        try:
            trt = importlib.import_module(MODULES[target])
        except ImportError as error:
            raise TargetUnavailableError(
                f"the package of {target} cannot be imported: {error}",
                hint=f"pip install 'export-zoo[{target}]'",
            ) from error
        _checked(cuda, cuda.cudaFree(0))  # creates a context on the device, or fails with CUDA's reason
        # Kept: an engine must not outlive the runtime, and the runtime must not outlive its logger.
        self._logger = _logger(trt)
        self._runtime = trt.Runtime(self._logger)
        if host_code:
            self._runtime.engine_host_code_allowed = True
        data = plan.read_bytes()
        if target == "tensorrt-rtx":
            validity, diagnostics = self._runtime.get_engine_validity(data)
            if validity == trt.EngineValidity.INVALID:
                names = [
                    name
                    for name, bit in trt.EngineInvalidityDiagnostics.__members__.items()
                    if int(bit) & int(diagnostics)
                ]
                raise TargetUnavailableError(
                    f"{plan}: cannot run on this machine: {', '.join(names) or 'no reason given'}",
                    hint="export again with this tensorrt-rtx version and the --compute-capability of this GPU",
                )
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise TargetUnavailableError(
                f"{plan}: TensorRT {trt.__version__} cannot load it: built for another GPU or version",
                hint="export again on this machine",
            )
        if weights is not None:
            self._refit(trt, weights)
        self._trt = trt
        is_rtx = target == "tensorrt-rtx"
        self._cache_path = runtime_cache if is_rtx else None
        self._cuda_graphs = cuda_graphs and is_rtx
        self._cache: Any = None
        self._shapes_run: set[tuple[int, ...]] = set()
        self._context = self._create_context()
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        (self.input_name,) = (name for name, mode in modes.items() if mode == trt.TensorIOMode.INPUT)
        self.output_names = [name for name, mode in modes.items() if mode == trt.TensorIOMode.OUTPUT]
        least, _, most = self._engine.get_tensor_profile_shape(self.input_name, 0)
        self._least, self._most = tuple(least), tuple(most)
        self._lock = threading.Lock()
        self._stream = _checked(cuda, cuda.cudaStreamCreate())
        self._context.set_input_shape(self.input_name, self._most)
        sizes = {
            name: 4 * math.prod(self._context.get_tensor_shape(name))
            for name in (self.input_name, *self.output_names)
        }
        self._buffers = {name: _checked(cuda, cuda.cudaMalloc(size)) for name, size in sizes.items()}
        for name, pointer in self._buffers.items():
            self._context.set_tensor_address(name, int(pointer))

    def _refit(self, trt: Any, weights: Path) -> None:
        """Give a stripped plan its weights (NVIDIA, TensorRT documentation, "Weight-Stripped Engines")."""
        refitter = trt.Refitter(self._engine, self._logger)
        parser = trt.OnnxParserRefitter(refitter, self._logger)
        if not parser.refit_from_file(str(weights)) or not refitter.refit_cuda_engine():
            raise EnvironmentFailureError(
                f"{weights}: TensorRT could not put these weights into the engine",
                hint="use -v to see its log",
            )

    def _create_context(self) -> Any:
        """An execution context, with the kernels of the runtime cache and with CUDA graphs if these were requested
        (NVIDIA, TensorRT-RTX documentation, "Working with Runtime Cache", "Working with RTX CUDA Graphs")."""
        if self._cache_path is None and not self._cuda_graphs:
            return self._created(self._engine.create_execution_context(), "an execution context")
        config = self._engine.create_runtime_config()
        if self._cuda_graphs:
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if self._cache_path is not None:
            self._cache = config.create_runtime_cache()
            # NVIDIA: a cache of another GPU or version is not used. It is then replaced by ours.
            if self._cache_path.is_file() and not self._cache.deserialize(self._cache_path.read_bytes()):
                log.warning(
                    "%s: not a runtime cache for this GPU and version: starting empty", self._cache_path
                )
            config.set_runtime_cache(self._cache)
        return self._created(self._engine.create_execution_context(config), "an execution context")

    def _created(self, what: Any, name: str) -> Any:
        """Returns `what`, or raises an error: TensorRT returns None if it cannot create an object."""
        if what is None:
            raise EnvironmentFailureError(
                f"TensorRT {self._trt.__version__} could not create {name}",
                hint="see nvidia-smi: free memory, other processes; use -v to see TensorRT's log",
            )
        return what

    def layers(self) -> str:
        """The engine's layers as JSON, each with its precision and kernel as far as TensorRT reports them."""
        inspector = self._created(self._engine.create_engine_inspector(), "an engine inspector")
        inspector.execution_context = self._context
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def start(self, count: int) -> None:
        """Launch a batch on the current content of the device's input buffer, without copies. For timing.

        Raises:
            EnvironmentFailureError: TensorRT fails.
        """
        self._context.set_input_shape(self.input_name, (count, *self._most[1:]))
        if not self._context.execute_async_v3(int(self._stream)):
            raise EnvironmentFailureError("TensorRT could not run the engine", hint="use -v to see its log")

    def wait(self) -> None:
        """Wait until all started work has ended."""
        _checked(self._cuda, self._cuda.cudaStreamSynchronize(self._stream))

    def _keep_kernels(self, shape: tuple[int, ...]) -> None:
        """Write the whole runtime cache after an input shape's first run. A full disk costs only time."""
        if self._cache is None or self._cache_path is None or shape in self._shapes_run:
            return
        self._shapes_run.add(shape)
        try:
            with replacing(self._cache_path) as temporary:
                temporary.write_bytes(self._cache.serialize())
        except OSError as error:
            log.warning("%s: cannot be written: %s", self._cache_path, error.strerror)

    def run(self, batch: Float32Array) -> Float32Array:
        """The first output, logits float32 [N, classes] or [N, classes, H, W], of a batch float32 [N, 3, H, W].

        Raises:
            As `run_all`.
        """
        return self.run_all(batch)[0]

    def run_all(self, batch: Float32Array) -> tuple[Float32Array, ...]:
        """All outputs, float32, of a preprocessed batch float32 [N, 3, H, W].

        Raises:
            BadInputError: wrong dtype or shape, or N, H or W outside the optimization profile.
            EnvironmentFailureError: CUDA or TensorRT fails.
        """
        batch = np.ascontiguousarray(batch)
        fits = batch.ndim == len(self._most) and all(
            low <= have <= high for low, have, high in zip(self._least, batch.shape, self._most, strict=True)
        )
        if batch.dtype != np.float32 or not fits:
            raise BadInputError(
                f"input {batch.dtype} {list(batch.shape)}, expected float32 {list(self._least)} to {list(self._most)}",
                hint="use the bundle's preprocess() to make the input",
            )
        cuda, kinds = self._cuda, self._cuda.cudaMemcpyKind
        source = self._buffers[self.input_name]
        with self._lock:
            self._context.set_input_shape(self.input_name, batch.shape)
            outputs = {
                name: np.empty(tuple(self._context.get_tensor_shape(name)), dtype=np.float32)
                for name in self.output_names
            }
            to, back = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost
            _checked(cuda, cuda.cudaMemcpyAsync(source, batch.ctypes.data, batch.nbytes, to, self._stream))
            if not self._context.execute_async_v3(int(self._stream)):
                raise EnvironmentFailureError(
                    "TensorRT could not run the engine", hint="use -v to see its log"
                )
            for name, output in outputs.items():
                pointer = self._buffers[name]
                _checked(
                    cuda, cuda.cudaMemcpyAsync(output.ctypes.data, pointer, output.nbytes, back, self._stream)
                )
            _checked(cuda, cuda.cudaStreamSynchronize(self._stream))
            self._keep_kernels(batch.shape)
        return tuple(outputs.values())

    def __del__(self) -> None:
        for pointer in getattr(self, "_buffers", {}).values():
            self._cuda.cudaFree(pointer)
        if hasattr(self, "_stream"):
            self._cuda.cudaStreamDestroy(self._stream)
