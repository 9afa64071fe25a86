"""Two bundles with hand-made INT8 graphs whose sums saturate on CPUs without VNNI; make_bundles.py writes them.

DIR/saturating.bundle: one convolution. DIR/shared.bundle: two convolutions that share their INT8 weight, which ONNX
Runtime refuses with `session.x64quantprecision`. Each has an FP32 engine beside, which is slower by its manifest.
DIR/bright/*.png are images for both, DIR/<bundle>-inputs.npy the inputs, and DIR/<bundle>-exact.npy the INT8 engine's
logits, computed with NumPy.
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

SIDE = 8
FILTERS = 8
INPUT_SCALE, WEIGHT_SCALE, OUTPUT_SCALE = np.float32(1 / 255), np.float32(1 / 128), np.float32(2)
ZERO_POINT = 128  # of the output
ENGINES = ("onnxruntime-fp32", "onnxruntime-int8")
Array = npt.NDArray[Any]


def weights() -> Array:
    """Filters of the largest values there are: all of one sign, and of random signs."""
    found = np.random.default_rng(0).choice(np.array([-127, 127], np.int8), (FILTERS, 3, SIDE, SIDE))
    found[0], found[1] = 127, -127
    return found


def graph(precision: str, convolutions: int, ports: tuple[str, str]) -> onnx.ModelProto:
    """Convolutions of the whole image, side by side; INT8 as Q/DQ."""
    given, logits = ports
    w, int8 = weights(), precision == "int8"
    constants = {
        "input_scale": INPUT_SCALE,
        "input_zero": np.uint8(0),
        "weight_scale": WEIGHT_SCALE,
        "weight_zero": np.int8(0),
        "output_scale": OUTPUT_SCALE,
        "output_zero": np.uint8(ZERO_POINT),
        "weight": w,
    }
    nodes = [
        helper.make_node("QuantizeLinear", [given, "input_scale", "input_zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "input_scale", "input_zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["weight", "weight_scale", "weight_zero"], ["w"]),
    ]
    if not int8:
        constants, nodes = {"w": w.astype(np.float32) * WEIGHT_SCALE}, []
    for i in range(convolutions):
        nodes.append(helper.make_node("Conv", ["x" if int8 else given, "w"], [f"y{i}"], pads=[0, 0, 0, 0]))
        if int8:
            scale = ["output_scale", "output_zero"]
            nodes.append(helper.make_node("QuantizeLinear", [f"y{i}", *scale], [f"q{i}"]))
            nodes.append(helper.make_node("DequantizeLinear", [f"q{i}", *scale], [f"d{i}"]))
        nodes.append(helper.make_node("Flatten", [f"{'d' if int8 else 'y'}{i}"], [f"f{i}"]))
    nodes.append(helper.make_node("Concat", [f"f{i}" for i in range(convolutions)], [logits], axis=1))
    image = helper.make_tensor_value_info(given, TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])
    scores = helper.make_tensor_value_info(logits, TensorProto.FLOAT, ["batch", convolutions * FILTERS])
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    made = helper.make_graph(nodes, "hand-made", [image], [scores], initializers)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def exact(pixels: Array, convolutions: int) -> Array:
    """Logits of the INT8 graph, with integer sums. Pixels are what the input's quantization gives back."""
    sums = (
        pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1).astype(np.int64)
        @ weights().reshape(FILTERS, -1).T
    )
    steps = sums * float(INPUT_SCALE * WEIGHT_SCALE / OUTPUT_SCALE)
    assert np.abs(np.abs(steps % 1) - 0.5).min() > 1e-3, "too near to a tie for one result in all arithmetics"
    quantized = np.clip(np.rint(steps) + ZERO_POINT, 0, 255)
    logits = (quantized - ZERO_POINT).astype(np.float32) * OUTPUT_SCALE
    return np.tile(logits, (1, convolutions))


def write_bundle(out: Path, name: str, convolutions: int, template: dict[str, Any]) -> None:
    """A bundle whose manifest is that of another one, as far as the C++ library reads it."""
    bundle, manifest = out / f"{name}.bundle", copy.deepcopy(template)
    (bundle / "files").mkdir(parents=True, exist_ok=True)
    recipe = manifest["recipe"]
    recipe["input"]["shape"] = ["batch", 3, SIDE, SIDE]
    recipe["output"]["shape"] = ["batch", convolutions * FILTERS]
    recipe["labels"], recipe["further_outputs"] = [], []
    recipe["preprocess"] |= {
        "resize_size": SIDE,
        "crop_height": SIDE,
        "crop_width": SIDE,
        "mean": [0, 0, 0],
        "std": [1, 1, 1],
    }
    assert [engine["name"] for engine in manifest["artifacts"]["engines"]] == [*ENGINES]
    for speedup, engine in enumerate(manifest["artifacts"]["engines"], 1):
        data = graph(engine["precision"], convolutions, (recipe["input"]["name"], recipe["output"]["name"]))
        path = f"files/{engine['name']}.onnx"
        (bundle / path).write_bytes(content := data.SerializeToString())
        sha256 = hashlib.sha256(content).hexdigest()
        engine["file"] = {"path": path, "sha256": sha256, "size_bytes": len(content)}
        engine["latency"]["speedup"] = speedup
        engine.pop("saturating_cpu_session", None)  # an older bundle
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def write(out: Path, template: Path) -> None:
    """Write both bundles, with images, inputs and logits.

    Args:
        template: a bundle with an FP32 and an INT8 engine of ONNX Runtime.
    """
    manifest = json.loads((template / "manifest.json").read_text(encoding="utf-8"))
    pixels = np.random.default_rng(1).integers(150, 256, (4, SIDE, SIDE, 3), np.uint8)
    pixels[0] = 255
    (out / "bright").mkdir(exist_ok=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(out / "bright" / f"{i}.png")
    inputs = (pixels.astype(np.float32) / np.float32(255)).transpose(0, 3, 1, 2)
    for name, convolutions in (("saturating", 1), ("shared", 2)):
        write_bundle(out, name, convolutions, manifest)
        np.save(out / f"{name}-inputs.npy", np.ascontiguousarray(inputs))
        np.save(out / f"{name}-exact.npy", exact(pixels, convolutions))
