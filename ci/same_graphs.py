#!/usr/bin/env python3
"""Whether two checkouts make the same graphs and ranges, to the byte: for changes that are to change nothing.

    python ci/same_graphs.py BEFORE AFTER [--digits DIR] [--only NAME]

BEFORE and AFTER are checkouts (`git worktree add ../before <commit>` makes one), run by this Python, each with a
cache of its own. Each network is exported in FP32, FP16 and INT8 for onnxruntime and tensorrt-rtx. Compared by their
hashes are the FP32 graph, the ranges, ONNX Runtime's engines and the graphs that TensorRT compiles; by value, the parts
of the manifest that are the same for the same inputs. Plans differ from build to build, and are not compared.

--digits is what examples/digits.py wrote for resnet18; without it resnet18 has random weights, and is not tuned.
Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OWN = """
from torch import nn

def own():
    layers = [nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 32, 3, groups=2), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 7))
"""
OWN_PREPROCESS = """
resize_size: 64
crop_height: 64
crop_width: 64
interpolation: bilinear
mean: [0.5, 0.5, 0.5]
std: [0.25, 0.25, 0.25]
"""


def networks(folder: Path, photos: Path, digits: Path | None) -> dict[str, list[str]]:
    """Options of `export-zoo export` by network."""
    (folder / "own.py").write_text(OWN)
    (folder / "own.yaml").write_text(OWN_PREPROCESS)
    small = ["--input-size", "64", "--resize-size", "64"]
    random = ["--weights", "none", "--calib", str(photos)]
    trained = ["--num-classes", "10", "--input-size", "32", "--resize-size", "32"]
    if digits is not None:
        weights = ["--weights", str(digits / "resnet18.safetensors"), "--calib", str(digits / "images")]
        resnet18 = ["resnet18", *weights, *trained]
    else:
        resnet18 = ["resnet18", *random, *small]
    return {
        "resnet18": resnet18,
        "mobilenet_v2": ["mobilenet_v2", *random, *small],
        "vit_b_32": ["vit_b_32", *random],
        "densenet121": ["densenet121", *random, *small],
        "own": [f"{folder / 'own.py'}:own", "--preprocess", str(folder / "own.yaml"), *random],
        "lraspp_mobilenet_v3_large": ["lraspp_mobilenet_v3_large", *random, *small],
    }


def export(checkout: Path, given: Sequence[str], out: Path, cache: Path) -> dict[str, Any]:
    """The manifest of a bundle that a checkout makes, gate failed or not."""
    command = [
        sys.executable,
        "-m",
        "export_zoo"
        if (checkout / "export_zoo").is_dir()
        else "exporter.cli",  # before the package of that name
        *given,
        "--out",
        str(out),
        "--quiet",
    ]
    for precision in ("fp32", "fp16", "int8"):
        command += ["--precision", precision]
    for target in ("onnxruntime", "tensorrt-rtx"):
        command += ["--target", target]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "EXPORT_ZOO_CACHE": str(cache)}
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, check=False)
    for path in (out, out.with_name(f"{out.name}.failed")):
        if (path / "manifest.json").is_file():
            manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            return manifest
    sys.exit(f"{checkout}: {' '.join(given)}: no bundle:\n{done.stderr}")


def compared(manifest: dict[str, Any]) -> dict[str, Any]:
    """Parts of a manifest that must be the same, by a name."""
    recipe, artifacts = manifest["recipe"], manifest["artifacts"]
    found = {
        "FP32 graph": recipe["graph"]["sha256"],
        "ranges": recipe["calibration"]["ranges"]["sha256"],
        "preprocess": recipe["preprocess"],
        "input and outputs": [recipe["input"], recipe["output"], recipe.get("further_outputs", [])],
        "labels": recipe["labels"],
        "eager logits": artifacts["held_out"]["logits"]["sha256"],
    }
    for engine in artifacts["engines"]:
        file = engine["graph"] or engine["file"]
        found[engine["name"]] = file["sha256"]
        found[f"{engine['name']}, steps"] = [
            (step["name"], step["chosen"]) for step in (engine["tuning"] or {"steps": []})["steps"]
        ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--digits", type=Path, metavar="DIR")
    parser.add_argument("--only", action="append", metavar="NAME", help="only this network; repeatable")
    given = parser.parse_args()
    different = 0
    with tempfile.TemporaryDirectory(prefix="export-zoo-") as directory:
        folder = Path(directory)
        photos = folder / "photos"
        program = Path(__file__).resolve().parent.parent / "examples" / "photos.py"
        subprocess.run(
            [sys.executable, program, "--out", photos, "--count", "60"], check=True, capture_output=True
        )
        digits = given.digits.absolute() if given.digits is not None else None
        chosen = networks(folder, photos, digits)
        if unknown := set(given.only or []) - set(chosen):
            parser.error(f"--only {min(unknown)}: one of {', '.join(chosen)}")
        for name in given.only or chosen:
            sides = []
            for side in ("before", "after"):
                checkout = getattr(given, side).absolute()
                out, cache = folder / f"{name}-{side}.bundle", folder / f"cache-{side}"
                sides.append(compared(export(checkout, chosen[name], out, cache)))
            parts = [what for what in {**sides[0], **sides[1]} if sides[0].get(what) != sides[1].get(what)]
            different += bool(parts)
            told = f"differs: {', '.join(parts)}" if parts else f"equal, {len(sides[0])} parts"
            print(f"{name}: {told}", flush=True)
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
