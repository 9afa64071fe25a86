"""What zoo-infer prints and writes, of classes and of logits for each pixel: check_infer.py ZOO_INFER BUNDLES."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np


def main() -> None:
    program, bundles = sys.argv[1], Path(sys.argv[2])
    images = sorted((bundles / "images").iterdir())[:5]

    def infer(model: str, *more: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [program, bundles / f"{model}.bundle", *images, "--engine", "onnxruntime-fp32", *more]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        assert done.returncode == code, done
        return done

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "logits.npy"
        for model in ("resnet18", "Pixels"):
            want = np.load(bundles / f"{model}-onnxruntime-fp32.npy")[: len(images)]
            done = infer(model, "--logits", file, "--top", "2")
            plain = done.stdout
            assert "onnxruntime-fp32 (verified, ONNX Runtime " in done.stderr, done
            assert done.stderr.endswith("): asked for\n"), done
            assert np.array_equal(np.load(file), want), model
            printed = json.loads(infer(model, "--logits", file, "--top", "2", "--json").stdout)
            assert printed["engine"] == "onnxruntime-fp32", printed
            assert (printed["state"], printed["backend"][:13]) == ("verified", "ONNX Runtime "), printed
            assert printed["why"] == "asked for", printed
            assert [entry["image"] for entry in printed["images"]] == [*map(str, images)], printed
            for entry, logits in zip(printed["images"], want, strict=True):
                if model == "Pixels":  # no class of an image, and none of its first pixels
                    assert (plain, entry.keys()) == ("", {"image"}), (plain, entry)
                else:
                    best = [found["index"] for found in entry["classes"]]
                    assert best == [*np.argsort(-logits, kind="stable")[:2]], entry
                    assert plain.count("%") == 2 * len(images), plain
    refused = infer("Pixels", code=1).stderr
    assert "--logits FILE" in refused, refused


if __name__ == "__main__":
    main()
