"""INT8 mended by --aim: a network on digits that 8 bits spoil, and real networks beside NNCF's accuracy control.

    python benchmarks/aim.py digits
    python benchmarks/aim.py real --images DIR [--nncf PYTHON] [--sqnr 30]

`digits` trains torchvision's EfficientNet-B0 (SiLU, squeeze-and-excitation) on digits at 64 pixels, about two minutes.
Then powers of two (2^-5 to 2^5 a channel) are moved through the residual stream of one stage: the same function to the
bit, but the stage's tensors need a scale for each channel, which 8 bits do not have.

`real` takes the networks of real_networks.py and asks for an SQNR. NNCF's `quantize_with_accuracy_control` gets our
FP32 graph, the images that ours calibrates on and those that ours selects on, and the same time; PYTHON is that of an
environment with nncf and openvino. Both are judged on verify images that neither chose anything on, and timed on one
image and one thread, each in turn with FP32 of its own runtime.
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
import torch
from real_networks import NETWORKS, Bundle
from safetensors.torch import save_file
from torchvision.models import efficientnet_b0

from export_zoo.base.machine import cpu_model, library_versions
from export_zoo.calibration import images
from export_zoo.calibration.preprocess import normalize
from export_zoo.exporter.options import DEFAULT_CALIB_IMAGES, DEFAULT_VERIFY_IMAGES

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import digits  # noqa: E402

STAGE = 3
"""Stage of EfficientNet-B0 whose stream is rescaled: 4 of 50 layers write or read it."""


def rescaled(state: dict[str, torch.Tensor], stage: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """The state dict of torchvision's EfficientNet-B0 with powers of two moved through a stage's residual stream."""
    blocks = efficientnet_b0().features[stage]
    twin = {name: tensor.clone() for name, tensor in state.items()}
    norms = [f"features.{stage}.{i}.block.{len(block.block) - 1}.1" for i, block in enumerate(blocks)]
    readers = [f"features.{stage}.{i}.block.0.0.weight" for i in range(1, len(blocks))]
    channels = len(twin[f"{norms[0]}.weight"])
    rng = np.random.default_rng(seed)
    scales = torch.from_numpy(np.exp2(rng.integers(-5, 6, channels)).astype(np.float32))
    for norm in norms:
        for kind in ("weight", "bias"):
            twin[f"{norm}.{kind}"] *= scales
    for reader in [*readers, f"features.{stage + 1}.0.block.0.0.weight"]:
        twin[reader] /= scales.view(1, -1, 1, 1)
    return twin


def exported(arguments: list[str], out: Path) -> list[dict[str, Any]]:
    """The engines of an export, whether its gates pass or not."""
    document = out.with_suffix(".json")
    command = [sys.executable, "-m", "export_zoo", *arguments, "--out", str(out), "--json", str(document)]
    done = subprocess.run([*command, "--quiet"], check=False, stderr=subprocess.PIPE, text=True)
    if done.returncode not in (0, 3):
        sys.exit(done.stderr)
    found: list[dict[str, Any]] = json.loads(document.read_text())["engines"]
    return found


def on_digits(directory: Path) -> None:
    network, accuracy = digits.train("efficientnet_b0", size=64)
    digits.write_images(directory / "images", size=64)
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    twin = rescaled(state, STAGE)
    with torch.inference_mode():
        image = digits.tensor(digits.digits(64)[0][:8])
        other = efficientnet_b0(num_classes=10).eval()
        other.load_state_dict(twin)
        same = torch.equal(network(image), other(image))
    print(f"eager PyTorch: {100 * accuracy:.1f} % top-1; rescaled, the same logits to the bit: {same}\n")
    print(
        "| weights | target | --aim | SQNR dB | top-1 agreement % | layers in float | of | ms | FP32 ms | gate |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, tensors, aims in (
        ("as trained", state, [None]),
        ("rescaled", twin, [None, "top1=0.95", "sqnr=20"]),
    ):
        weights = directory / "weights.safetensors"
        save_file(tensors, weights)
        for aim in aims:
            arguments = [
                "efficientnet_b0",
                "--weights",
                str(weights),
                "--num-classes",
                "10",
                "--input-size",
                "64",
            ]
            arguments += [
                "--resize-size",
                "64",
                "--calib",
                str(directory / "images"),
                "--verify-images",
                "224",
            ]
            arguments += ["--precision", "int8", "--target", "onnxruntime", "--target", "tensorrt-rtx"]
            for engine in exported([*arguments, *(["--aim", aim] if aim else [])], directory / "bundle"):
                print(line(engine, f"{name} | {engine['target']}"), flush=True)


LAYERS = 50
"""Layers of EfficientNet-B0 that are in 8 bits; those of its gates are always float."""


def line(engine: dict[str, Any], begin: str) -> str:
    gate, aim = engine["gate"], engine["aim"]
    figures = gate["eager_metrics"]
    kept, ms, fp32, asked = "0", "-", "-", "-"
    if aim is not None:
        kept, asked = str(len(aim["layers"])), f"{aim['metric']}={aim['value']:g}"
        if aim["ms"] is not None:
            ms, fp32 = f"{aim['ms'] + aim['added_ms']:.2f}", f"{aim['fp32_ms']:.2f}"
    verdict = "FAILED" if gate["failures"] else "ok"
    cells = [f"{figures['sqnr']:.1f}", f"{100 * figures['top1']:.1f}", kept, str(LAYERS), ms, fp32, verdict]
    return f"| {begin} | {asked} | {' | '.join(cells)} |"


def on_photographs(folder: Path, nncf: str | None, sqnr: float, names: list[str], directory: Path) -> None:
    rows = []
    for name in names:
        network = NETWORKS[name]
        preprocess = directory / "preprocess.json"
        sizes = {"resize_size": network.crop + 32, "crop_height": network.crop, "crop_width": network.crop}
        preprocess.write_text(json.dumps({**network.preprocess, **sizes}))
        out = directory / f"{name}.bundle"
        arguments = [f"{Path(__file__).with_name('real_weights.py')}:{name}", *network.options, "--no-cache"]
        arguments += ["--preprocess", str(preprocess), "--calib", str(folder), "--precision", "int8"]
        arguments += ["--target", "onnxruntime", "--aim", f"sqnr={sqnr:g}"]
        arguments += [word for limit in network.limits for word in ("--tolerance", limit)]
        (engine,) = exported(arguments, out)
        if not out.exists():
            out = out.with_name(f"{out.name}.failed")
        stages = json.loads((directory / f"{name}.json").read_text())["stages"]
        seconds = sum(s["seconds"] for s in stages if s["name"] in ("calibrate", "tune", "aim"))
        aim, reached = engine["aim"], engine["gate"]["eager_metrics"]["sqnr"]
        print(f"\n{name}: accuracy over speed, select images, FP32 {aim['fp32_ms']:.2f} ms\n")
        print("| layers in float | SQNR dB, less a margin | ms |\n|---|---|---|")
        for step in curve(aim["tried"]):
            print(
                f"| {step['layers']} | {step['value']:.1f} | {aim['ms'] + step['added_ms']:.2f} |", flush=True
            )
        ratio = aim["fp32_ms"] / (aim["ms"] + aim["added_ms"])
        rows.append((name, "ours, onnxruntime", reached, len(aim["layers"]), seconds, ratio))
        if nncf is not None:
            rows.append((name, "nncf, openvino", *controlled(Bundle(name, folder, out), nncf, sqnr, seconds)))
    print(f"\n| network | quantizer | SQNR dB (aim {sqnr:g}) | layers in float | s | speed of its FP32 |")
    print("|---|---|---|---|---|---|")
    for name, who, found, kept, seconds, ratio in rows:
        print(f"| {name} | {who} | {found:.1f} | {kept} | {seconds:.0f} | {ratio:.2f}x |")


def curve(tried: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps that no cheaper one surpasses, from the cheapest on."""
    found: list[dict[str, Any]] = []
    for step in sorted(tried, key=lambda step: step["added_ms"]):
        if not found or step["value"] > found[-1]["value"]:
            found.append(step)
    return found


def controlled(bundle: Bundle, python: str, sqnr: float, seconds: float) -> tuple[float, int, float, float]:
    """NNCF's SQNR on the verify images, its layers in float, its seconds, and its speed beside its FP32.

    Prints what it had reached on the select images in the seconds that ours took.
    """
    scanned = images.scan(bundle.folder, option="--images")
    splits = images.split(scanned, calibrate=DEFAULT_CALIB_IMAGES, verify=DEFAULT_VERIFY_IMAGES, seed=0)
    arrays = {
        "calibrate.npy": bundle.calibrate().all(),
        "select.npy": images.ImageStream(splits["select"], bundle.preprocess, 8, bundle.folder).all(),
        "held-out.npy": bundle.held_out.pixels,
    }
    for file, pixels in arrays.items():
        np.save(bundle.place.with_name(file), normalize(pixels, bundle.preprocess))
    files = [bundle.graph, *map(bundle.place.with_name, arrays), bundle.place.with_name("logits.npy")]
    worker = [python, str(Path(__file__).with_name("nncf_accuracy_worker.py")), str(sqnr), str(seconds)]
    done = subprocess.run([*worker, *map(str, files)], stdout=subprocess.PIPE, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    print(
        f"\nNNCF on the select images of {bundle.name}: {figures['in_time']:.1f} dB in the {seconds:.0f} s of ours, "
        f"{figures['select']:.1f} dB at the end, after {figures['tried']} models"
    )
    row = bundle.row("nncf", np.load(files[-1]), figures["seconds"])
    return row.sqnr, figures["float_layers"], figures["seconds"], figures["speedup"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("digits")
    real = commands.add_parser("real")
    real.add_argument("--images", type=Path, required=True, help="folder of photographs")
    real.add_argument(
        "--networks", nargs="+", choices=NETWORKS, default=["efficientnet_lite0", "mobilenet_v2"]
    )
    real.add_argument("--sqnr", type=float, default=30.0)
    real.add_argument("--nncf", metavar="PYTHON", help="of an environment with nncf and openvino")
    given = parser.parse_args()
    print(f"{cpu_model()}; {library_versions('torch', 'onnxruntime', 'tensorrt-rtx')}\n")
    with tempfile.TemporaryDirectory() as directory:
        if given.command == "digits":
            on_digits(Path(directory))
        else:
            on_photographs(given.images, given.nncf, given.sqnr, given.networks, Path(directory))


if __name__ == "__main__":
    main()
