"""Networks to measure with: the zoo's, with random weights, as `export-zoo` would hand them on."""

from __future__ import annotations

from pathlib import Path

from export_zoo.calibration.preprocess import Preprocess, normalize
from export_zoo.calibration.synthetic import synthetic_images
from export_zoo.exporter.graph import simplify, to_onnx
from export_zoo.exporter.models import zoo
from export_zoo.exporter.options import ExportOptions


def simplified(model: str, directory: Path) -> tuple[Path, Preprocess]:
    """The exported and simplified FP32 graph of a model, written to `directory`, and its preprocessing."""
    spec = zoo.resolve(ExportOptions(model=model, weights="none"))
    p = spec.preprocess
    module, _ = zoo.build(spec)
    inputs = normalize(synthetic_images(4, p, 1), p)
    to_onnx.export(module, p.crop_height, p.crop_width, directory / "model.onnx")
    simplify.simplify(directory / "model.onnx", directory, inputs)
    return directory / "graph.onnx", p
