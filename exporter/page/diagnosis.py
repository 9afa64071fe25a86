"""The page of a diagnosis: one HTML file that needs nothing beside it."""

from __future__ import annotations

from pathlib import Path

from export_zoo.engines.bundle import reader
from export_zoo.engines.diagnosis.diagnose import Diagnosis
from export_zoo.exporter.options import keep_float_option
from export_zoo.exporter.page import plots
from export_zoo.exporter.page.templates import render, thumbnail

SHOWN = 20
"""Number of layers in the table; its JSON has all."""

WITH_HISTOGRAM = 10


def html(found: Diagnosis, bundle: Path) -> str:
    """The page. The bundle's held-out images are shown on it.

    Raises:
        BadInputError: the bundle is damaged.
        EnvironmentFailureError: matplotlib is not installed.
    """
    plots.check()
    manifest = reader.read_manifest(bundle)
    pixels = reader.held_out(bundle, manifest).pixels
    places = {layer.name: (place, layer) for place, layer in enumerate(found.layers, start=1)}
    rows = []
    for name in found.worst[:SHOWN]:
        place, layer = places[name]
        time = None if layer.ms is None or not found.ms else 100 * layer.ms / found.ms
        rows.append({"place": place, "layer": layer, "size": 100 * layer.bytes / found.bytes, "time": time})
    shown = [places[name][1] for name in found.worst[:WITH_HISTOGRAM]]
    return render(
        "diagnosis.html.jinja",
        title=f"{manifest.recipe.source.name}, {found.engine}: which layers cost accuracy",
        found=found,
        option=keep_float_option(quantized=found.quantized),
        rows=rows,
        largest=max(layer.share for layer in found.layers) or 1.0,
        curve=plots.curve(found),
        along=plots.along(found),
        histograms=[
            (layer.module, plots.histogram(layer.input, f"values of the input of {layer.module}"))
            for layer in shown
            if layer.input is not None
        ],
        images=[(thumbnail(pixels[answer.index]), answer) for answer in found.answers],
    )
