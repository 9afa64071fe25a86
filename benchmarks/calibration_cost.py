"""Cost of calibration: time as a ratio to plain forward passes over the same images, and peak memory.

    python benchmarks/calibration_cost.py
    python benchmarks/calibration_cost.py --modelopt .venv-modelopt/bin/python --json result.json

ONNX Runtime's calibrators come with it. NVIDIA ModelOpt patches ONNX Runtime's quantizer and pins old packages: give it
an environment of its own (`pip install 'nvidia-modelopt[onnx]'`). Each calibration is a process of its own with all
cores, as its authors set it up; plain passes are taken before and after each. Weights are random: calibration's cost
does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from networks import simplified

from export_zoo.base.machine import cpu_model, library_versions
from export_zoo.calibration.preprocess import Preprocess, normalize
from export_zoo.calibration.synthetic import synthetic_images

MODELS = ("resnet18", "resnet50", "mobilenet_v2")
OURS = ("minmax", "percentile", "entropy", "mse")
THEIRS = ("minmax", "entropy", "percentile")
MODELOPT = ("minmax", "entropy")


def prepare(model: str, count: int, directory: Path) -> tuple[Path, Path]:
    """The simplified graph of a model, and so many preprocessed images."""
    fp32, preprocess = simplified(model, directory)
    return fp32, images(preprocess, count, directory)


def images(preprocess: Preprocess, count: int, directory: Path) -> Path:
    folder = directory / str(count)
    folder.mkdir(exist_ok=True)
    few = synthetic_images(min(count, 64), preprocess, 2)
    pixels = np.concatenate([few] * (count // len(few)))
    np.save(folder / "pixels.npy", pixels)
    floats = np.lib.format.open_memmap(
        folder / "inputs.npy", "w+", np.float32, (count, 3, *pixels.shape[1:3])
    )
    for start in range(0, count, 64):
        floats[start : start + 64] = normalize(pixels[start : start + 64], preprocess)
    floats.flush()
    (folder / "preprocess.json").write_text(preprocess.model_dump_json())
    return folder / "inputs.npy"


def measure(
    python: str, who: str, method: str, graph: Path, inputs: Path, rounds: int
) -> dict[str, Any] | None:
    worker = Path(__file__).with_name("calibration_worker.py")
    command = [python, worker, who, method, graph, inputs, "--rounds", rounds]
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=False, env={"PYTHONPATH": str(root)}
    )
    if done.returncode:
        print(f"{who} {method}: failed: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
        return None
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3, help="of our own; peers are measured once")
    parser.add_argument("--modelopt", help="Python of an environment that has nvidia-modelopt[onnx]")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--memory", type=int, nargs=2, default=[64, 1024], help="images")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runs = [("ours", method, sys.executable) for method in OURS]
    if not options.no_peers:
        runs += [("onnxruntime", method, sys.executable) for method in THEIRS]
        runs += [("modelopt", method, options.modelopt) for method in MODELOPT if options.modelopt]
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        if options.json:  # each time: the next peer may take the machine's memory
            options.json.write_text(json.dumps(rows, indent=1) + "\n")

    print(f"{cpu_model()}; {library_versions('onnxruntime', 'numpy', 'numba')}")
    print(f"{'model':<14}{'calibrator':<24}{'x forward':>10}{'seconds':>9}{'peak MiB':>10}")
    for model in options.models:
        with tempfile.TemporaryDirectory() as directory:
            fp32, inputs = prepare(model, options.images, Path(directory))
            for who, method, python in runs:
                rounds = options.rounds if who == "ours" else 1
                found = measure(python, who, method, fp32, inputs, rounds)
                if found is None:
                    continue
                add({"model": model, "who": who, "method": method, "images": options.images, **found})
                print(
                    f"{model:<14}{who + ' ' + method:<24}{found['ratio']:>9.2f}x"
                    f"{found['seconds']:>9.1f}{found['peak_mib']:>10}",
                    flush=True,
                )
            if options.memory[1]:
                preprocess = Preprocess.model_validate_json(
                    inputs.with_name("preprocess.json").read_text(encoding="utf-8")
                )
                peaks = []
                for count in options.memory:
                    other = images(preprocess, count, Path(directory))
                    found = measure(sys.executable, "ours", "entropy", fp32, other, 0)
                    peaks.append(found["peak_mib"] if found else None)
                add({"model": model, "memory_images": options.memory, "peak_mib": peaks})
                print(f"{model:<14}peak MiB of {options.memory} images: {peaks}", flush=True)


if __name__ == "__main__":
    main()
