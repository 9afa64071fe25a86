"""The preprocessing of a bundle, in words and in pictures."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw

from export_zoo.calibration.preprocess import Preprocess, read_pixels
from export_zoo.exporter.page.templates import thumbnail

_PICTURE = 224
"""Length of the longer side of pictures, in pixels."""


def steps(p: Preprocess) -> list[str]:
    """The preprocessing, step by step."""
    values = ", ".join(
        f"{(0 - mean) / std:.3g} to {(1 - mean) / std:.3g}" for mean, std in zip(p.mean, p.std, strict=True)
    )
    return [
        "Read the image's values as floats." if p.keeps_values else f"Decode the image as {p.mode}.",
        (
            f"Resize it to the proportions of the crop, its shorter side to {p.resize_size} pixels"
            if p.crop_mode == "squash"
            else f"Resize its shorter side to {p.resize_size} pixels"
        )
        + f": {p.interpolation}, antialiased.",
        f"Crop the centre: {p.crop_height} rows of {p.crop_width} pixels.",
        f"Divide by {p.scale:g}, subtract the mean ({', '.join(f'{m:g}' for m in p.mean)}) and divide by the standard "
        f"deviation ({', '.join(f'{s:g}' for s in p.std)}) of each channel: values are {values}.",
    ]


def _test_card(p: Preprocess) -> Image.Image:
    """A picture whose numbered squares show what a resize and a crop leave of it, 480x360."""
    image = Image.new("RGB", (480, 360))
    draw = ImageDraw.Draw(image)
    for row in range(6):
        for column in range(8):
            left, top = 60 * column, 60 * row
            colour = (40 + 25 * column, 60 + 30 * row, 200 - 20 * ((row + column) % 5))
            draw.rectangle((left, top, left + 59, top + 59), fill=colour)
            draw.text(
                (left + 18, top + 18), f"{row + 1}{'ABCDEFGH'[column]}", fill=(255, 255, 255), font_size=20
            )
    return image.convert("L" if p.channels == 1 else "RGB")


def pictures(p: Preprocess) -> list[tuple[str, str]]:
    """A test card before and after resize and crop: PNG, base64, and what it shows; empty for images of bands."""
    if p.keeps_values or p.channels not in (1, 3):
        return []
    before, buffer = _test_card(p), io.BytesIO()
    before.save(buffer, format="PNG")
    after, _ = read_pixels(buffer.getvalue(), p)
    arrays = (np.asarray(before).reshape(before.height, before.width, -1), after)
    texts = (
        f"an image of {before.width}x{before.height} pixels",
        f"as the network gets it, {p.crop_width}x{p.crop_height} pixels",
    )
    return [(thumbnail(array, _PICTURE), text) for array, text in zip(arrays, texts, strict=True)]
