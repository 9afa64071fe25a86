"""Gain of tuning INT8, on images that it never saw, over several divisions of the images.

    python benchmarks/tuning_gain.py [--seeds N] [--target TARGET] MODEL OPTIONS...

OPTIONS are those of `export-zoo export`, --calib among them. For each seed, which also divides the folder anew into
images to calibrate, select and verify on, MODEL is exported without tuning (--steps none --method minmax) and with the
defaults. A Markdown line each: SQNR of both on the verify images, and each step with its gain on the select images.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

UNTUNED = ("--steps", "none", "--method", "minmax")


def exported(given: list[str], out: Path) -> dict:
    """An INT8 engine as the manifest describes it; one that failed its gate, too."""
    command = [sys.executable, "-m", "export_zoo", *given, "--precision", "int8"]
    done = subprocess.run(
        [*command, "--json", str(out / "result.json"), "--out", str(out / "bundle"), "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    document = json.loads((out / "result.json").read_text())
    if not document.get("engines"):
        sys.exit(done.stderr)
    return document["engines"][0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--target", default="onnxruntime")
    known, options = parser.parse_known_args()
    print("| seed | untuned | tuned | gain | steps: gain on select images, their standard error and number |")
    print("|---|---|---|---|---|")
    for seed in range(known.seeds):
        given = [*options, "--target", known.target, "--seed", str(seed)]
        with tempfile.TemporaryDirectory() as directory:
            found = []
            for name, further in (("untuned", UNTUNED), ("tuned", ())):
                (Path(directory) / name).mkdir()
                found.append(exported([*given, *further], Path(directory) / name))
        before, after = (engine["gate"]["eager_metrics"]["sqnr"] for engine in found)
        steps = [
            f"{step['name']} {step['chosen']} ({step['gain']:+.2f} ± {step['standard_error']:.2f} dB, {step['images']})"
            for step in found[1]["tuning"]["steps"]
        ]
        print(
            f"| {seed} | {before:.2f} dB | {after:.2f} dB | {after - before:+.2f} dB | {'; '.join(steps)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
