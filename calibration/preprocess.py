"""From image bytes to the input tensor, bit-equal to torchvision's eval transforms on PIL images.

Kept free of torch so that a bundle can be used and verified without it.
"""

from __future__ import annotations

import io
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field

UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]

_MAX_SIDE = 65_500
"""Longest side after the resize; JPEG's own limit. A 1x30000 strip would become gigabytes."""

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class UnreadableImageError(Exception):
    """The bytes are not an image that can be decoded to 8-bit RGB."""


class Preprocess(BaseModel):
    """Everything that turns an image file into the network's input.

    The steps, in order: decode, EXIF orientation, RGB, resize of the *shorter* side to `resize_size`
    (antialiased), centre crop (zero-padded where the image is smaller), `x / 255`, `(x - mean) / std`, NCHW.
    This is `torchvision.transforms._presets.ImageClassification` on PIL images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    resize_size: int = Field(ge=1, description="Length of the shorter side after the resize, in pixels.")
    crop_height: int = Field(ge=1, description="Height of the centre crop and of the input, in pixels.")
    crop_width: int = Field(ge=1, description="Width of the centre crop and of the input, in pixels.")
    interpolation: Literal["bilinear", "bicubic"]
    antialias: Literal[True] = Field(default=True, description="Pillow's resize always antialiases.")
    mean: tuple[float, float, float] = Field(description="Per channel RGB, on the 0..1 scale.")
    std: tuple[float, float, float] = Field(description="Per channel RGB, on the 0..1 scale.")
    source: str = Field(description="Where the parameters come from, for people.")

    def figures(self) -> dict[str, Any]:
        """All parameters that affect the pixels: all except `source`, which is for people."""
        return self.model_dump(exclude={"source"})

    def at_size(self, height: int, width: int) -> Preprocess:
        """This preprocessing for another input size, in pixels; the resize keeps its proportion to the crop."""
        ratio = self.resize_size / min(self.crop_height, self.crop_width)
        changes = {"resize_size": max(1, round(min(height, width) * ratio))}
        return self.model_copy(update={**changes, "crop_height": height, "crop_width": width})


def _not_an_image(data: bytes) -> str:
    return "not an image format that Pillow knows" if data else "empty file"


def decode(data: bytes) -> Image.Image:
    """Decode image bytes to an upright 8-bit RGB image.

    Alpha is dropped and CMYK, palette and gray are converted as `Image.convert("RGB")` does, which is what
    torchvision's ImageFolder feeds networks in training; 16-bit gray keeps its high byte (Pillow would
    clip it). The first frame of an animation or of a multi-page file is used.

    Raises:
        UnreadableImageError: not an image, truncated, a decompression bomb, or a mode with no 8-bit meaning.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            gray16 = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
            if image.mode in ("I", "F") and not gray16:
                raise UnreadableImageError(f"pixel mode {image.mode!r} has no defined 8-bit range")
            upright = _upright(image)
            if gray16:
                high_byte = (np.asarray(upright).astype(np.uint32) >> 8).astype(np.uint8)
                upright = Image.fromarray(high_byte)
            return upright.convert("RGB")
    except UnreadableImageError:
        raise
    except UnidentifiedImageError:
        raise UnreadableImageError(_not_an_image(data)) from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ValueError, bombs, ...
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; metadata that cannot be parsed is ignored."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def check_header(data: bytes) -> None:
    """Parse only the header: cheap, and finds most files that are not images.

    Raises:
        UnreadableImageError: the header is not that of an image.
    """
    try:
        with Image.open(io.BytesIO(data)):
            pass
    except UnidentifiedImageError:
        raise UnreadableImageError(_not_an_image(data)) from None
    except Exception as error:
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error


def resize_and_crop(image: Image.Image, preprocess: Preprocess) -> UInt8Array:
    """Resize and centre-crop an RGB image; returns uint8 [crop_height, crop_width, 3].

    Sizes and offsets follow torchvision.transforms.functional (`_compute_resized_output_size`,
    `center_crop`), including its truncation of the long side and its rounding of offsets.

    Raises:
        UnreadableImageError: the image is so narrow that the resize would make it longer than 65,500 pixels.
    """
    width, height = image.size
    short, long = min(width, height), max(width, height)
    new_short, new_long = preprocess.resize_size, int(preprocess.resize_size * long / short)
    new_size = (new_short, new_long) if width <= height else (new_long, new_short)
    if new_long > _MAX_SIDE:
        raise UnreadableImageError(
            f"{width}x{height} is too narrow: the resize would make it {new_long} long"
        )
    if new_size != image.size:
        image = image.resize(new_size, _RESAMPLING[preprocess.interpolation])
    pixels = np.asarray(image)
    crop_h, crop_w = preprocess.crop_height, preprocess.crop_width
    pad_h, pad_w = max(crop_h - pixels.shape[0], 0), max(crop_w - pixels.shape[1], 0)
    if pad_h or pad_w:
        pixels = np.pad(pixels, ((pad_h // 2, (pad_h + 1) // 2), (pad_w // 2, (pad_w + 1) // 2), (0, 0)))
    top = round((pixels.shape[0] - crop_h) / 2.0)
    left = round((pixels.shape[1] - crop_w) / 2.0)
    return np.ascontiguousarray(pixels[top : top + crop_h, left : left + crop_w])


def normalize(pixels: UInt8Array, preprocess: Preprocess) -> Float32Array:
    """uint8 [N, H, W, 3] to float32 [N, 3, H, W]: `(x / 255 - mean) / std`, each step rounded to float32."""
    mean = np.asarray(preprocess.mean, dtype=np.float32)
    std = np.asarray(preprocess.std, dtype=np.float32)
    # Only 256 values exist per channel: a table gives the same bits as the arithmetic, several times faster.
    table = ((np.arange(256, dtype=np.float32) / np.float32(255))[None, :] - mean[:, None]) / std[:, None]
    out = np.empty((pixels.shape[0], 3, *pixels.shape[1:3]), dtype=np.float32)
    for channel in range(3):
        np.take(table[channel], pixels[..., channel], out=out[:, channel])
    return out
