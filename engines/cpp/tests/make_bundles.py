"""Bundles, images, and what Python makes of them, for the C++ tests: make_bundles.py DIR.

Writes DIR/<model>.bundle (FP32 and INT8 engines, random weights, 64x64), DIR/images, and for each engine
DIR/<model>-<engine>.npy, the logits of all images, and DIR/<model>-inputs.npy. DIR/dynamic.bundle takes 48 to 96
pixels, with inputs and logits of some sizes: DIR/dynamic-inputs-HxW.npy, DIR/dynamic-<engine>-HxW.npy.
DIR/Pixels.bundle is of a network of our own with two outputs, the first for each pixel; the second one's values are
DIR/Pixels-<engine>-output1.npy.
DIR/head-<kind>.bundle are of networks with other heads, or other inputs, and DIR/head-<kind>.npy their outputs.
DIR/attestation.json is what `verify` says here of the first. saturating_bundles.py writes two more.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from PIL import Image

ROOT = Path(__file__).parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import photos  # noqa: E402
import saturating_bundles  # noqa: E402

import export_zoo  # noqa: E402
from export_zoo.engines.verification.verify import verify  # noqa: E402
from export_zoo.exporter.option_values import BatchRange, SizeRange, Tolerance  # noqa: E402

OWN = str(ROOT / "tests" / "own_networks.py")
BOTH = ("onnxruntime", "openvino")
MODELS = {
    "resnet18": ("onnxruntime",),
    "mobilenet_v2": BOTH,
    "squeezenet1_1": ("onnxruntime",),
    f"{OWN}:Pixels": BOTH,
}
"""Targets, by model."""
PREPROCESS = {
    "resize_size": 72,
    "crop_height": 64,
    "crop_width": 64,
    "interpolation": "bilinear",
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}
GRAY = {
    **PREPROCESS,
    "crop_width": 48,
    "interpolation": "bicubic",
    "mean": [0.4],
    "std": [0.2],
    "mode": "L",
    "crop_mode": "squash",
}
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "logit": ("binary", {**PREPROCESS, "labels": ["no", "yes"]}),
    "yes": ("binary", PREPROCESS),
    "labels": ("multilabel", PREPROCESS),
    "shares": ("classification", PREPROCESS),
    "number": ("regression", PREPROCESS),
    "directions": ("embedding", PREPROCESS),
    "tokens": ("embedding", PREPROCESS),
    "quantities": ("regression", GRAY),
}
"""Task and preprocessing of each kind of head in own_networks.Headed."""
SIZES = ((48, 48), (64, 64), (61, 79), (96, 50), (96, 96))


def write_images(folder: Path) -> list[Path]:
    """Photographs as they come: JPEG of all kinds, PNG, turned, gray, CMYK."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {
        "baseline.jpg": lambda im: (im, {"quality": 90}),
        "progressive.jpg": lambda im: (im, {"quality": 70, "progressive": True}),
        "444.jpg": lambda im: (im, {"quality": 95, "subsampling": 0}),
        "gray.jpg": lambda im: (im.convert("L"), {}),
        "cmyk.jpg": lambda im: (im.convert("CMYK"), {}),
        "plain.png": lambda im: (im, {}),
        "palette.png": lambda im: (im.convert("P"), {}),
        "alpha.png": lambda im: (im.convert("RGBA"), {}),
        **{f"turned{o}.jpg": lambda im, o=o: (im, {"exif": turned(o)}) for o in range(1, 9)},
    }
    pictures = photos.photographs()
    paths = []
    for index, (name, kind) in enumerate(kinds.items()):
        picture = pictures[index % len(pictures)]
        width, height = picture.size
        image, options = kind(picture.crop((0, 0, min(width, 180 + 7 * index), min(height, 250 - 9 * index))))
        paths.append(folder / f"{index:02}-{name}")
        image.save(paths[-1], **options)
    return sorted(paths)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def export(out: Path, model: str, bundle: Path, targets: tuple[str, ...], **more: Any) -> list[str]:
    """Export FP32 and INT8, and return the engines' names."""
    export_zoo.export(
        export_zoo.ExportOptions(
            model,
            precisions=("fp32", "int8"),
            targets=targets,
            calib=out / "calibration",
            weights="none",
            batch=BatchRange.parse("1:4:8"),
            # With random weights, only equal logits in C++ and Python are expected.
            tolerances=tuple(Tolerance.parse(f"int8:{m}") for m in ("sqnr=0", "top1=0", "cosine=0")),
            out=bundle,
            **more,
        )
    )
    return [f"{target}-{precision}" for target in targets for precision in ("fp32", "int8")]


def write_heads(out: Path, paths: list[Path]) -> None:
    for kind, (task, preprocess) in HEADS.items():
        file, bundle = out / "preprocess-head.json", out / f"head-{kind}.bundle"
        file.write_text(json.dumps(preprocess))
        export_zoo.export(
            export_zoo.ExportOptions(
                f"{OWN}:Headed",
                targets=("onnxruntime",),
                model_args=(("kind", kind), ("channels", str(len(preprocess["mean"])))),
                task=task,
                preprocess=file,
                batch=BatchRange.parse("1:4:8"),
                out=bundle,
            )
        )
        engine = export_zoo.load(bundle)
        inputs = engine.preprocess(paths)
        outputs = [engine.run(inputs[start : start + 4]) for start in range(0, len(inputs), 4)]
        np.save(out / f"head-{kind}-inputs.npy", inputs)
        np.save(out / f"head-{kind}.npy", np.concatenate(outputs))


def fp32_graph(bundle: Path) -> Path:
    document = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    return bundle / str(document["artifacts"]["engines"][0]["file"]["path"])


def write_fp32_graph(out: Path) -> None:
    """DIR/resnet18.onnx: the FP32 engine of DIR/resnet18.bundle."""
    shutil.copyfile(fp32_graph(out / "resnet18.bundle"), out / "resnet18.onnx")


def write_fixed_batch(out: Path) -> None:
    """DIR/fixed-batch.onnx: the FP32 engine of DIR/head-logit.bundle, for batches of four images only."""
    model = onnx.load(fp32_graph(out / "head-logit.bundle"))
    for port in (*model.graph.input, *model.graph.output):
        port.type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(model, out / "fixed-batch.onnx")


def write_unused(out: Path) -> None:
    """DIR/unused.onnx: the FP32 engine of DIR/head-logit.bundle, with a weight that nothing reads: a warning."""
    model = onnx.load(fp32_graph(out / "head-logit.bundle"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(4, np.float32), "unused_weight"))
    onnx.save(model, out / "unused.onnx")


def write_unknown_operator(out: Path) -> None:
    """DIR/unknown.onnx: the FP32 engine of DIR/head-logit.bundle, with an operator that no runtime has."""
    model = onnx.load(fp32_graph(out / "head-logit.bundle"))
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, out / "unknown.onnx")


def write_external_weights(out: Path) -> None:
    """DIR/external.onnx: the FP32 engine of DIR/resnet18.bundle, with its weights in DIR/external.bin."""
    model = onnx.load(fp32_graph(out / "resnet18.bundle"))
    (out / "external.bin").unlink(missing_ok=True)  # onnx appends
    onnx.save(model, out / "external.onnx", save_as_external_data=True, location="external.bin")


def write_dynamic(out: Path, paths: list[Path]) -> None:
    bundle = out / "dynamic.bundle"
    for name in export(out, "squeezenet1_1", bundle, BOTH, dynamic_size=SizeRange.parse("48:64:96")):
        engine = export_zoo.load(bundle, engine=name)
        for height, width in SIZES:
            inputs = engine.preprocess(paths[:8], size=(height, width))
            np.save(out / f"dynamic-inputs-{height}x{width}.npy", inputs)
            np.save(out / f"dynamic-{name}-{height}x{width}.npy", engine.run(inputs))


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    paths = write_images(out / "images")
    photos.write(out / "calibration", 80)
    preprocess = out / "preprocess.json"
    preprocess.write_text(json.dumps(PREPROCESS))
    for network, targets in MODELS.items():
        model = network.rpartition(":")[2]
        bundle = out / f"{model}.bundle"
        more = {"input_size": (64, 64), "preprocess": preprocess if ":" in network else None}
        for name in export(out, network, bundle, targets, **more):
            engine = export_zoo.load(bundle, engine=name)
            inputs = engine.preprocess(paths)
            np.save(out / f"{model}-inputs.npy", inputs)
            parts = [engine.run_all(inputs[start : start + 4]) for start in range(0, len(inputs), 4)]
            for index, output in enumerate(parts[0]):
                further = f"-output{index}" if index else ""
                np.save(
                    out / f"{model}-{name}{further}.npy", np.concatenate([part[output] for part in parts])
                )
    write_fp32_graph(out)
    write_dynamic(out, paths)
    write_heads(out, paths)
    write_fixed_batch(out)
    write_unused(out)
    write_unknown_operator(out)
    write_external_weights(out)
    _, attestation = verify(out / "resnet18.bundle")
    assert attestation is not None
    attestation.replace(out / "attestation.json")
    attestation.parent.rmdir()
    saturating_bundles.write(out, template=out / "resnet18.bundle")


if __name__ == "__main__":
    main()
