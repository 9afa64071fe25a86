"""Run a graph and look at tensors inside it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from calibration import graph_io
from calibration.preprocess import Preprocess, UInt8Array, normalize

Float32Array = npt.NDArray[np.float32]


class Observer:
    """A graph in ONNX Runtime with some of its tensors as outputs. Several threads may run it.

    Args:
        names: of the tensors; the graph's input may be one of them.
        threads: of ONNX Runtime, 0 for all cores.
    """

    def __init__(self, graph: Path, names: Iterable[str], *, threads: int = 0) -> None:
        model = graph_io.load(graph)
        self._feed = str(model.graph.inputs[0].name)
        self._names = [name for name in dict.fromkeys(names) if name != self._feed]
        values = {v.name: v for node in model.graph for v in node.outputs}
        known = {v.name for v in model.graph.outputs}
        model.graph.outputs.extend(values[name] for name in self._names if name not in known)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        with tempfile.TemporaryDirectory(prefix="export-zoo-") as directory:
            path = Path(directory) / "observed.onnx"
            graph_io.save(model, path)
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(self, batch: Float32Array) -> Mapping[str, Float32Array]:
        """The tensors, and the input, by name, for one batch of preprocessed images, float32 [N, 3, H, W]."""
        arrays = self._session.run(self._names, {self._feed: batch}) if self._names else []
        found = {name: np.asarray(array) for name, array in zip(self._names, arrays, strict=True)}
        return {self._feed: batch, **found}

    def one_by_one(self, pixels: UInt8Array, preprocess: Preprocess) -> Iterator[Mapping[str, Float32Array]]:
        """`run` on each image of uint8 [N, H, W, 3] by itself, so that memory is that of one."""
        for index in range(len(pixels)):
            yield self.run(normalize(pixels[index : index + 1], preprocess))
