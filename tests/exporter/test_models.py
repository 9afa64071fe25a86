"""The zoo: ten architectures to a verified bundle, all precisions; INT8's quality on trained networks."""

from __future__ import annotations

import numpy as np
import pytest

from export_zoo.base.cuda import has_cuda_device
from export_zoo.engines.precision.registry import PRECISIONS
from export_zoo.engines.targets.registry import TARGETS

# The least input size that each architecture is defined for keeps this affordable; what is exported is the same.
SIZES = {
    "alexnet": 64,
    "densenet121": 64,
    "googlenet": 64,
    "inception_v3": 96,
    "mobilenet_v2": 64,
    "resnet18": 64,
    "resnet50": 64,
    "squeezenet1_1": 64,
    "vgg11_bn": 64,
    "vit_b_32": 64,
}

EVERYWHERE = ("densenet121", "mobilenet_v2", "resnet18", "squeezenet1_1")
"""Those for TensorRT-RTX, too: it takes minutes to compile large networks. `make demo` does resnet50, and
test_own_models.py a small vision transformer."""

LARGE = ("alexnet", "vgg11_bn", "vit_b_32")
"""Those whose runs take as long as reading their weights: many images at a time, never one."""


@pytest.mark.parametrize("model", sorted(SIZES))
def test_model_reaches_a_verified_bundle(model, cli, photos, tmp_path):
    arguments = [model, "--weights", "none", "--input-size", str(SIZES[model])]
    arguments += ["--batch", "4:32:32" if model in LARGE else "1:4:8"]
    others = ("openvino", "tensorrt-rtx") if model in EVERYWHERE else () if model in LARGE else ("openvino",)
    built = ["onnxruntime", *(target for target in others if not TARGETS[target].unavailable)]
    arguments += [word for precision in PRECISIONS for word in ("--precision", precision)]
    arguments += [word for target in built for word in ("--target", target)]
    done = cli(*arguments, "--calib", photos, "--out", tmp_path / "out", "--no-cache")
    assert done.code == 0, done.err
    compiled = "verified" if has_cuda_device() else "graph verified"
    assert {e["name"]: e["state"] for e in done.json["engines"]} == {
        f"{target}-{precision}": compiled if TARGETS[target].compiled else "verified"
        for target in built
        for precision in PRECISIONS
    }
    checked = cli("verify", tmp_path / "out", "--no-latency")
    assert checked.code == 0, checked.err


@pytest.mark.parametrize("model", ["resnet18", "mobilenet_v2", "squeezenet1_1"])
def test_int8_is_no_worse_than_onnxruntimes_quantizer(model, digits, cli, tmp_path):
    """Top-1 within 0.5 points of eager, SQNR no worse than quantize_static's, on the same images and graph."""
    from peers import quantize_with_onnxruntime

    from export_zoo.calibration import images
    from export_zoo.calibration.preprocess import normalize
    from export_zoo.engines.bundle import reader
    from export_zoo.engines.parity.metrics import compare
    from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine
    from export_zoo.engines.verification.gate import run_in_batches

    out = tmp_path / "out"
    done = cli(*digits.arguments(model), "--precision", "int8", *digits.tuned_once(), "--out", out)
    assert done.code == 0, done.err
    ours = done.json["engines"][0]["gate"]["metrics"]
    assert ours["images"] >= 200
    assert ours["accuracy_drop"] <= 0.005

    manifest = reader.read_manifest(out)
    p, held = manifest.recipe.preprocess, reader.held_out(out, manifest)
    splits = images.split(images.scan(digits.images, option="--calib"), calibrate=512, verify=224, seed=0)
    stream = images.ImageStream(splits["calibrate"], p, 8, digits.images)
    peer = tmp_path / "peer.onnx"
    quantize_with_onnxruntime(out / manifest.recipe.graph.path, peer, (normalize(b, p) for b in stream))
    (logits,) = run_in_batches(OnnxRuntimeEngine(peer), held.pixels, p, 8)
    theirs = compare(np.asarray(held.logits), logits)
    assert ours["sqnr"] >= theirs.sqnr, f"ours {ours['sqnr']:.2f} dB, quantize_static {theirs.sqnr:.2f} dB"
