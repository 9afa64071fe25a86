"""Checks what zoo-infer prints and writes, for each task and for logits of pixels: check_infer.py ZOO_INFER BUNDLES."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np


def expected(kind: str, values: np.ndarray) -> dict[str, object]:
    """The JSON that zoo-infer prints for one image's values."""
    values = np.atleast_1d(values).astype(float)
    if kind in ("logit", "yes"):
        shares = 1 / (1 + np.exp(-values)) if kind == "logit" else values
        yes = bool(shares[0] > 0.5)
        names = {"label": "yes" if yes else "no"} if kind == "logit" else {}
        return {"positive": yes, "probability": shares[0], **names}
    if kind in ("labels", "shares"):
        order = np.argsort(-values, kind="stable")
        chosen = [i for i in order if values[i] > 0.5] if kind == "labels" else order[:2]
        classes = [{"index": i, "label": str(i), "probability": values[i]} for i in chosen]
        return {"classes": classes}
    return {"embedding" if kind == "directions" else "values": list(values)}


def check_heads(program: str, bundles: Path, images: list[Path]) -> None:
    for kind in ("logit", "yes", "labels", "shares", "number", "directions", "quantities"):
        command = [program, bundles / f"head-{kind}.bundle", *images, "--top", "2"]
        with tempfile.TemporaryDirectory() as folder:
            more = ["--json", "--logits", f"{folder}/o.npy", "--inputs", f"{folder}/i.npy"]
            done = subprocess.run([*map(str, command), *more], capture_output=True, text=True, check=True)
            values, inputs = np.load(f"{folder}/o.npy"), np.load(f"{folder}/i.npy")
        assert np.array_equal(values, np.load(bundles / f"head-{kind}.npy")[: len(images)]), kind
        assert np.array_equal(inputs, np.load(bundles / f"head-{kind}-inputs.npy")[: len(images)]), kind
        for entry, row in zip(json.loads(done.stdout)["images"], values, strict=True):
            want = expected(kind, row)
            assert entry.keys() == {"image", *want}, (kind, entry)
            for name, value in want.items():
                found = entry[name]
                if name == "classes":
                    assert [c["index"] for c in found] == [c["index"] for c in value], (kind, entry)
                    found, value = ([c["probability"] for c in classes] for classes in (found, value))
                same = (
                    found == value if isinstance(value, (bool, str)) else np.allclose(found, value, atol=1e-6)
                )
                assert same, (kind, name, found, value)
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
        assert len(done.stdout.splitlines()) >= 2 * len(images) - (kind == "labels") * len(images), (
            done.stdout
        )
    refused = subprocess.run(
        [program, bundles / "head-tokens.bundle", images[0]], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1, refused
    assert "values for each token: write them with --logits FILE" in refused.stderr, refused


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
    check_heads(program, bundles, images)
    refused = infer("Pixels", code=1).stderr
    assert "--logits FILE" in refused, refused


if __name__ == "__main__":
    main()
