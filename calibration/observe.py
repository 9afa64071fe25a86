"""Runs a graph and returns tensors inside it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from threading import local

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from export_zoo.base import graph_io
from export_zoo.base.machine import session_threads
from export_zoo.calibration.preprocess import Pixels, Preprocess, normalize

Float32Array = npt.NDArray[np.float32]


class Observer:
    """A graph in ONNX Runtime with some of its tensors as outputs. Several threads may run it.

    Args:
        names: names of the tensors; the graph's input may be one of them.
        threads: number of ONNX Runtime threads; 0 for all usable cores.
    """

    def __init__(self, graph: Path, names: Iterable[str], *, threads: int = 0) -> None:
        model = graph_io.load(graph)
        self._feed = str(model.graph.inputs[0].name)
        self._names = [name for name in dict.fromkeys(names) if name != self._feed]
        values = {v.name: v for node in model.graph for v in node.outputs}
        known = {v.name for v in model.graph.outputs}
        model.graph.outputs.extend(values[name] for name in self._names if name not in known)
        options = ort.SessionOptions()
        options.intra_op_num_threads = session_threads(threads)
        options.log_severity_level = 3
        with tempfile.TemporaryDirectory(prefix="export-zoo-") as directory:
            path = Path(directory) / "observed.onnx"
            graph_io.save(model, path)
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        (feed,) = self._session.get_inputs()
        self._shapes = {out.name: out.shape for out in self._session.get_outputs() if out.name in self._names}
        self._known = all(
            shape[:1] == feed.shape[:1] and all(isinstance(size, int) for size in shape[1:])
            for shape in self._shapes.values()
        )
        self._own = local()

    def run(self, batch: Float32Array) -> Mapping[str, Float32Array]:
        """The tensors, and the input, by name, for one batch of preprocessed images, float32 [N, 3, H, W].

        They are valid until the same thread's next call, because ONNX Runtime reuses their memory. New memory for each
        call, and the copy, would take up to an eighth of the time.
        """
        if not self._names:
            return {self._feed: batch}
        if not self._known:
            arrays = self._session.run(self._names, {self._feed: batch})
            return {self._feed: batch, **dict(zip(self._names, map(np.asarray, arrays), strict=True))}
        batch = np.ascontiguousarray(batch)
        if getattr(self._own, "size", None) != len(batch):
            self._own.size = len(batch)
            self._own.found = {}
            self._own.binding = self._session.io_binding()
            for name, shape in self._shapes.items():
                array = self._own.found[name] = np.empty([len(batch), *shape[1:]], dtype=np.float32)
                self._own.binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        self._own.binding.bind_input(self._feed, "cpu", 0, np.float32, batch.shape, batch.ctypes.data)
        run: Callable[[object], None] = self._session.run_with_iobinding
        run(self._own.binding)
        return {self._feed: batch, **self._own.found}

    def one_by_one(self, pixels: Pixels, preprocess: Preprocess) -> Iterator[Mapping[str, Float32Array]]:
        """Yield `run` on each image of [N, H, W, C] separately, so that memory is needed for one image only.

        Each result is valid until the next one.
        """
        for index in range(len(pixels)):
            yield self.run(normalize(pixels[index : index + 1], preprocess))
