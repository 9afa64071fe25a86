"""INT8 accuracy of one network of each family, trained on digits: eager PyTorch's top-1 beside each target's.

    python benchmarks/families.py [FAMILY ...] [--out DIR]

Each network is trained for a minute or three (`examples/digits.py`, 32x32; ViT and Swin are torchvision's classes,
smaller), exported by `export-zoo` with its defaults, and judged on 224 digits that were neither trained nor calibrated
on. For TensorRT-RTX the precision graph is run. Prints a table; exits with 1 where INT8 loses more than a point.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import digits  # noqa: E402
import small_networks  # noqa: E402

from export_zoo import ExportOptions, export  # noqa: E402
from export_zoo.exporter.option_values import BatchRange, Tolerance  # noqa: E402
from export_zoo.exporter.pipeline import KeptError  # noqa: E402

OWN = {"vit": small_networks.vit, "swin": small_networks.swin}
FAMILIES = {
    "resnet": "resnet18",
    "vgg": "vgg11_bn",
    "densenet": "densenet121",
    "squeezenet": "squeezenet1_1",
    "mobilenet v2": "mobilenet_v2",
    "mobilenet v3": "mobilenet_v3_small",
    "efficientnet": "efficientnet_b0",
    "convnext": "convnext_tiny",
    "shufflenet": "shufflenet_v2_x1_0",
    "mnasnet": "mnasnet0_5",
    "regnet": "regnet_x_400mf",
    "vit": "vit",
    "swin": "swin",
}
PREPROCESS = {
    "resize_size": digits.INPUT_SIZE,
    "crop_height": digits.INPUT_SIZE,
    "crop_width": digits.INPUT_SIZE,
    "interpolation": "bilinear",
    "mean": digits.MEAN,
    "std": digits.STD,
}
POINT = 0.01


def trained(name: str, out: Path) -> tuple[Path, float]:
    """The state dict file, and the seconds that training took, which the file holds: a second run does not train."""
    path, begin = out / f"{name}.safetensors", time.monotonic()
    if not path.exists():
        model, _ = digits.train(name, make=OWN.get(name))
        seconds = f"{time.monotonic() - begin:.0f}"
        save_file(model.state_dict(), path, metadata={"trained_seconds": seconds})
    with safe_open(path, "pt") as file:
        return path, float(file.metadata()["trained_seconds"])


def exported(name: str, weights: Path, out: Path) -> list[Any]:
    """The INT8 engines, as the manifest describes them."""
    preprocess = out / "preprocess.json"
    preprocess.write_text(json.dumps(PREPROCESS))
    options = ExportOptions(
        f"{EXAMPLES / 'small_networks.py'}:{name}" if name in OWN else name,
        precisions=("int8",),
        targets=("onnxruntime", "tensorrt-rtx"),
        calib=out / "images",
        verify_images=224,
        weights=str(weights),
        preprocess=preprocess,
        num_classes=10,
        batch=BatchRange.parse("1:8:32"),
        tolerances=(
            Tolerance.parse("accuracy_drop=1"),
            Tolerance.parse("top1=0"),
            Tolerance.parse("sqnr=-100"),
        ),
        out=out / f"{name}.bundle",
    )
    try:
        return list(export(options).engines)
    except KeptError as error:  # the table shows how much is lost
        return list(error.result.engines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--out", type=Path, default=Path("demo/families"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    digits.write_images(options.out / "images")
    lost = []
    print(
        "| family | network | eager top-1 | onnxruntime INT8 | SQNR dB | tensorrt-rtx INT8 | SQNR dB | trained in s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for family in options.families:
        name = FAMILIES[family]
        weights, seconds = trained(name, options.out)
        engines = exported(name, weights, options.out)
        row = [family, name, f"{100 * engines[0].gate.eager_metrics['reference_accuracy']:.1f} %"]
        for engine in engines:
            figures = engine.gate.eager_metrics
            drop = figures["accuracy_drop"]
            row += [f"{100 * figures['accuracy']:.1f} % ({0.0 - 100 * drop:+.1f})", f"{figures['sqnr']:.1f}"]
            if drop > POINT:
                lost.append(f"{family} on {engine.target}")
        print("| " + " | ".join([*row, f"{seconds:.0f}"]) + " |", flush=True)
    print(
        "INT8 loses more than a point: " + ", ".join(lost)
        if lost
        else "INT8 is within a point of eager everywhere."
    )
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
