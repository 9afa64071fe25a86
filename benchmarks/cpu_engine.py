"""INT8 engines on the CPU against FP32 and against ONNX Runtime's own quantizer: ratios taken in one run.

    python benchmarks/cpu_engine.py --models resnet18 resnet50 --json bench-results/cpu_engine.json

For each model, thread count and batch, three sessions run in turn: the FP32 graph, our INT8 engine, with the regions in
float that the cost file of export-zoo names, and the model
that `onnxruntime.quantization.quantize_static` (uint8 activations, int8 weights per channel, MinMax) makes of the
same graph with the same images. Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from glob import escape
from pathlib import Path

import numpy as np
from networks import simplified
from peers import quantize_with_onnxruntime

from export_zoo.base import graph_io
from export_zoo.base.machine import cpu_model, instruction_set, library_versions
from export_zoo.calibration.collect import collect
from export_zoo.calibration.preprocess import Preprocess, normalize
from export_zoo.calibration.synthetic import SyntheticStream, synthetic_images
from export_zoo.engines.precision.int8.qdq import quantize
from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine
from export_zoo.engines.targets.registry import TARGETS


def prepare(model: str, directory: Path) -> tuple[dict[str, Path], Preprocess]:
    """FP32 graph, our INT8 graph and the peer's, by name."""
    fp32, p = simplified(model, directory)
    ours, peer = directory / "ours.onnx", directory / "peer.onnx"
    stream = SyntheticStream(16, 0, p, 16)
    target = TARGETS["onnxruntime"]
    fast = target.float_for_speed(graph_io.load(fp32).graph, frozenset(), None)
    layers = [escape(layer) for layer in fast.layers] if fast is not None else []
    quantize(fp32, collect(fp32, stream), ours, rules=target.int8, keep_float=layers)
    quantize_with_onnxruntime(fp32, peer, [normalize(batch, p) for batch in stream])
    return {"fp32": fp32, "ours": ours, "quantize_static": peer}, p


def measure(
    paths: dict[str, Path], p: Preprocess, threads: int, batch: int, seconds: float
) -> dict[str, float]:
    """Median milliseconds per engine over rounds taken in turn, and the medians of the rounds' ratios.

    In each turn one untimed run brings the engine's weights back into the caches.
    """
    engines = {name: OnnxRuntimeEngine(path, threads=threads) for name, path in paths.items()}
    x = normalize(synthetic_images(batch, p, 2), p)
    times: dict[str, list[float]] = {name: [] for name in engines}
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times["fp32"]) < 7:
        for name, engine in engines.items():
            engine.run(x)
            start = time.perf_counter()
            engine.run(x)
            times[name].append(time.perf_counter() - start)
    t = {name: np.asarray(values) for name, values in times.items()}
    return {
        **{f"{name}_ms": float(np.median(values)) * 1e3 for name, values in t.items()},
        "fp32_over_ours": float(np.median(t["fp32"] / t["ours"])),
        "quantize_static_over_ours": float(np.median(t["quantize_static"] / t["ours"])),
        "rounds": len(t["fp32"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--seconds", type=float, default=10.0, help="per row of the table")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    print(f"{cpu_model()}, {instruction_set()}, {library_versions('onnxruntime')}")
    columns = {
        "threads": 8,
        "batch": 6,
        "fp32 ms": 10,
        "ours ms": 10,
        "ORT q ms": 10,
        "x FP32": 8,
        "x ORT": 8,
    }
    print(f"{'model':<14}" + "".join(f"{name:>{width}}" for name, width in columns.items()))
    for model in options.models:
        with tempfile.TemporaryDirectory() as directory:
            paths, p = prepare(model, Path(directory))
            for threads in options.threads:
                for batch in options.batches:
                    row = measure(paths, p, threads, batch, options.seconds)
                    rows.append({"model": model, "threads": threads, "batch": batch, **row})
                    print(
                        f"{model:<14}{threads:>8}{batch:>6}{row['fp32_ms']:>10.2f}{row['ours_ms']:>10.2f}"
                        f"{row['quantize_static_ms']:>10.2f}{row['fp32_over_ours']:>8.2f}"
                        f"{row['quantize_static_over_ours']:>8.2f}",
                        flush=True,
                    )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        document = {"machine": cpu_model(), "instruction_set": instruction_set(), "rows": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
