"""The page of a diagnosis: one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import io
from importlib.resources import files
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from export_zoo.base.package import __version__
from export_zoo.engines.bundle import reader
from export_zoo.engines.diagnosis.diagnose import Diagnosis
from export_zoo.exporter.page import plots

SHOWN = 20
"""Number of layers in the table; its JSON has all."""

WITH_HISTOGRAM = 10
_THUMBNAIL = 112


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
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["decibels"] = decibels
    template = files(__package__).joinpath("diagnosis.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        title=f"{manifest.recipe.source.name}, {found.engine}: which layers cost accuracy",
        found=found,
        rows=rows,
        largest=max(layer.share for layer in found.layers) or 1.0,
        curve=plots.curve(found),
        along=plots.along(found),
        histograms=[
            (layer.module, plots.histogram(layer.input, f"values of the input of {layer.module}"))
            for layer in shown
            if layer.input is not None
        ],
        images=[(_thumbnail(pixels[answer.index]), answer) for answer in found.answers],
        made_by=f"export-zoo {__version__}",
    )


def decibels(value: float | None) -> str:
    """SQNR for people; a dash where there is no error."""
    return "-" if value is None else "not finite" if value <= -200 else f"{value:.1f}"


def _thumbnail(pixels: np.ndarray) -> str:
    """A small PNG, base64; empty for images that are neither gray nor RGB in 8 bits."""
    if pixels.dtype != np.uint8 or pixels.shape[-1] not in (1, 3):
        return ""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    if max(image.size) > _THUMBNAIL:
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
