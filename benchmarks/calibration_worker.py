"""One calibration in a process of its own: prints seconds, those of plain forward passes, and peak memory, as JSON.

Run by `calibration_cost.py`. Needs only the calibrator that it is to measure: peers have environments of their own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

BATCH = 8
Batch = npt.NDArray[np.float32]


def batches(inputs: Path) -> Iterator[Batch]:
    """Preprocessed images, float32 [N, 3, H, W] in a .npy file, eight at a time."""
    for start in range(0, _length(inputs), BATCH):
        yield _part(inputs, start)


def _length(path: Path) -> int:
    return len(np.load(path, mmap_mode="r"))


def _part(path: Path, start: int) -> npt.NDArray[Any]:
    """A batch, mapped and let go: pages of a mapped file count as the process's memory."""
    return np.array(np.load(path, mmap_mode="r")[start : start + BATCH])


def forward(graph: Path, inputs: Path) -> None:
    session = ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for batch in batches(inputs):
        session.run(None, {name: batch})


def ours(graph: Path, inputs: Path, method: str) -> None:
    from export_zoo.base.graph_io import load
    from export_zoo.calibration.collect import collect
    from export_zoo.calibration.histogram import Histogram
    from export_zoo.calibration.images import ImageFile, ImageStream
    from export_zoo.calibration.methods import METHODS
    from export_zoo.calibration.preprocess import Preprocess
    from export_zoo.engines.targets.registry import quantized_tensors

    class Preprocessed(ImageStream):
        def __iter__(self) -> Iterator[npt.NDArray[np.uint8]]:
            self.images = list(self.files)
            for start in range(0, len(self.files), BATCH):
                yield _part(pixels, start)

    # Our stream carries uint8 pixels and normalizes them: the same numbers as the peers', which get float32.
    pixels = inputs.with_name("pixels.npy")
    preprocess = Preprocess.model_validate_json(inputs.with_name("preprocess.json").read_text())
    files = [ImageFile(Path(), str(i), f"{i:064}", None) for i in range(_length(pixels))]
    names = quantized_tensors(load(graph).graph)
    ranges = collect(graph, Preprocessed(files, preprocess, BATCH, Path()), histograms=names)
    for name in names:
        found = ranges.tensors[name]
        for symmetric in (True, False):
            METHODS[method](Histogram.decode(found.histogram), found.min, found.max, symmetric)


def onnxruntime(graph: Path, inputs: Path, method: str) -> None:
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

    name = ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"]).get_inputs()[0].name

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.iterator = batches(inputs)

        def get_next(self) -> dict[str, Batch] | None:
            batch = next(self.iterator, None)
            return None if batch is None else {name: batch}

    chosen = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}[method]
    with tempfile.TemporaryDirectory() as directory:
        calibrator = create_calibrator(
            graph,
            augmented_model_path=str(Path(directory) / "augmented.onnx"),
            calibrate_method=CalibrationMethod[chosen],
        )
        calibrator.collect_data(Reader())
        calibrator.compute_data()


def modelopt(graph: Path, inputs: Path, method: str) -> None:
    from modelopt.onnx.quantization import quantize

    name = ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"]).get_inputs()[0].name
    with tempfile.TemporaryDirectory() as directory:
        quantize(
            str(graph),
            quantize_mode="int8",
            calibration_data={name: np.load(inputs)},
            calibration_method={"minmax": "max", "entropy": "entropy"}[method],
            calibration_eps=["cpu"],
            high_precision_dtype="fp32",
            output_path=str(Path(directory) / "out.onnx"),
            log_level="ERROR",
        )


WHO: dict[str, Callable[[Path, Path, str], None]] = {
    "ours": ours,
    "onnxruntime": onnxruntime,
    "modelopt": modelopt,
}


def _peak_mib() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def _timed(call: Callable[[], None]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("who", choices=WHO)
    parser.add_argument("method")
    parser.add_argument("graph", type=Path)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("--rounds", type=int, default=1, help="0: memory only")
    options = parser.parse_args()
    calibrate, graph, inputs, method = WHO[options.who], options.graph, options.inputs, options.method
    calibrate(graph, inputs, method)
    peak, pairs = _peak_mib(), []
    for _ in range(options.rounds):
        plain = _timed(lambda: forward(graph, inputs))
        taken = _timed(lambda: calibrate(graph, inputs, method))
        pairs.append((taken, (plain + _timed(lambda: forward(graph, inputs))) / 2))
    ratio = statistics.median(taken / plain for taken, plain in pairs) if pairs else None
    seconds, plain = pairs[0] if pairs else (None, None)
    print(json.dumps({"ratio": ratio, "seconds": seconds, "forward_seconds": plain, "peak_mib": round(peak)}))


if __name__ == "__main__":
    main()
