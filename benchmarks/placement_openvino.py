"""INT8 in OpenVINO with two placements of Q/DQ pairs: at inputs of layers, as ours, and as for ONNX Runtime.

    python benchmarks/placement_openvino.py --models resnet18 efficientnet_b0

Graphs are not tuned, weights are random. Both run in turn, on one thread. SQNR is that to FP32, on further images.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

import numpy as np
from networks import simplified

from export_zoo.base.machine import cpu_model, instruction_set, library_versions
from export_zoo.calibration.collect import collect
from export_zoo.calibration.preprocess import normalize
from export_zoo.calibration.synthetic import SyntheticStream, synthetic_images
from export_zoo.engines.precision.int8.qdq import quantize
from export_zoo.engines.targets.base import OpenEngine
from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine
from export_zoo.engines.targets.onnxruntime.placement import place_onnxruntime
from export_zoo.engines.targets.openvino.engine import OpenVinoEngine
from export_zoo.engines.targets.openvino.placement import INT8_RULES
from export_zoo.engines.verification.throughput import Setting, in_turn

RULES = {
    "at inputs": INT8_RULES,
    "as for ONNX Runtime": dataclasses.replace(INT8_RULES, place=place_onnxruntime),
}


def measure(
    model: str, batch: int, seconds: float, directory: Path
) -> tuple[dict[str, float], dict[str, float]]:
    """Median milliseconds and SQNR in dB, by placement; milliseconds of FP32, too."""
    fp32, p = simplified(model, directory)
    ranges = collect(fp32, SyntheticStream(16, 0, p, 16))
    paths = {"FP32": fp32}
    for number, (name, rules) in enumerate(RULES.items()):
        paths[name] = directory / f"int8-{number}.onnx"
        quantize(fp32, ranges, paths[name], rules=rules)
    engines = {name: OpenVinoEngine(path, threads=1) for name, path in paths.items()}
    held_out = normalize(synthetic_images(8, p, 2), p)
    (exact, *_) = OnnxRuntimeEngine(fp32).run_all(held_out)
    signal = ((exact - exact.mean(axis=0)) ** 2).sum()
    sqnr = {
        name: float(10 * np.log10(signal / ((engines[name].run_all(held_out)[0] - exact) ** 2).sum()))
        for name in RULES
    }
    # The code of `export-zoo bench`, which compares with FP32 in ONNX Runtime.
    running: dict[str, list[OpenEngine]] = {"onnxruntime-fp32": [OnnxRuntimeEngine(fp32, threads=1)]}
    running |= {name: [engine] for name, engine in engines.items()}
    points = in_turn(running, held_out[:batch], Setting(batch, 1, 1), seconds)
    return {point.engine: point.p50_ms for point in points}, sqnr


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["resnet18", "efficientnet_b0"])
    parser.add_argument("--batch", type=int, choices=range(1, 9), default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each engine")
    given = parser.parse_args()
    print(f"{cpu_model()}, {instruction_set()}, {library_versions('openvino')}\n")
    print(
        "| model | FP32 ms | at inputs ms | as for ONNX Runtime ms | ratio | dB | dB |\n|---|---|---|---|---|---|---|"
    )
    for model in given.models:
        with tempfile.TemporaryDirectory() as directory:
            ms, sqnr = measure(model, given.batch, given.seconds, Path(directory))
        ours, theirs = RULES
        print(
            f"| {model} | {ms['FP32']:.1f} | {ms[ours]:.1f} | {ms[theirs]:.1f} | {ms[theirs] / ms[ours]:.2f}x "
            f"| {sqnr[ours]:.1f} | {sqnr[theirs]:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
