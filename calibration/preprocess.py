"""From image bytes to the input tensor, bit-equal to torchvision's eval transforms on PIL images.

Kept free of torch so that a bundle can be used and verified without it.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from export_zoo.calibration.decode import LARGEST, Mode, UnreadableImageError, decode, decode_bands

Pixels = npt.NDArray[np.number[Any]]
"""Images after resize and crop, [N, H, W, C]: uint8, or float32 if the preprocessing `keeps_values`."""
Float32Array = npt.NDArray[np.float32]

_MAX_SIDE = 65_500
"""Longest side after the resize; JPEG's own limit. A 1x30000 strip would become gigabytes."""

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_CHANNELS = {"RGB": 3, "L": 1, "RGBA": 4}
MAX_CHANNELS = 512


class Preprocess(BaseModel):
    """Everything that turns an image file into the network's input.

    The steps, in order: decode, EXIF orientation, `mode`, resize of the *shorter* side to `resize_size`
    (antialiased), centre crop (zero-padded where the image is smaller), `x / scale`, `(x - mean) / std`, NCHW.
    This is `torchvision.transforms._presets.ImageClassification` on PIL images, for RGB and a scale of 255.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    resize_size: int = Field(ge=1, description="Length of the shorter side after the resize, in pixels.")
    crop_height: int = Field(ge=1, description="Height of the centre crop and of the input, in pixels.")
    crop_width: int = Field(ge=1, description="Width of the centre crop and of the input, in pixels.")
    interpolation: Literal["bilinear", "bicubic"]
    antialias: Literal[True] = Field(default=True, description="Pillow's resize always antialiases.")
    mean: tuple[float, ...] = Field(description="Per channel, on the 0..1 scale.")
    std: tuple[float, ...] = Field(description="Per channel, on the 0..1 scale.")
    source: str = Field(description="Where the parameters come from, for people.")
    # Fields that earlier versions do not know are left out at their defaults, so that those read the bundle.
    mode: Mode = Field(
        default="RGB",
        exclude_if=lambda mode: mode == "RGB",
        description="Channels: RGB, L (gray), RGBA, or `bands`: those of the file, one for each entry of mean and std.",
    )
    crop_mode: Literal["center", "squash"] = Field(
        default="center",
        exclude_if=lambda mode: mode == "center",
        description="`squash` resizes the image to the proportions of the crop, whatever its own: its shorter side to "
        "`resize_size`.",
    )
    scale: float = Field(
        default=255.0,
        gt=0,
        allow_inf_nan=False,
        exclude_if=lambda scale: scale == 255,
        description="Value in the file that becomes 1: 255 for 8 bits, 4095 for 12, 65535 for 16, or 10000 for "
        "reflectances. With another value than 255, values are not cut to 8 bits.",
    )

    @model_validator(mode="after")
    def _channels(self) -> Preprocess:
        wanted = _CHANNELS.get(self.mode, len(self.mean))
        if not len(self.mean) == len(self.std) == wanted or not 1 <= wanted <= MAX_CHANNELS:
            raise ValueError(
                f"mean has {len(self.mean)} and std {len(self.std)} values, mode {self.mode} has "
                f"{wanted if self.mode in _CHANNELS else f'as many of both, 1 to {MAX_CHANNELS}'}"
            )
        return self

    @property
    def channels(self) -> int:
        """Number of channels of the input."""
        return len(self.mean)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image of the input: channels, height and width."""
        return self.channels, self.crop_height, self.crop_width

    @property
    def keeps_values(self) -> bool:
        """Whether images keep the values of their files, as float32, instead of 8 bits."""
        return self.mode == "bands" or self.scale != 255

    def figures(self) -> dict[str, Any]:
        """All parameters that affect the pixels: all except `source`, which is for people."""
        return self.model_dump(exclude={"source"})

    def at_size(self, height: int, width: int) -> Preprocess:
        """This preprocessing for another input size, in pixels; the resize keeps its proportion to the crop."""
        ratio = self.resize_size / min(self.crop_height, self.crop_width)
        changes = {"resize_size": max(1, round(min(height, width) * ratio))}
        return self.model_copy(update={**changes, "crop_height": height, "crop_width": width})


def _resized(width: int, height: int, preprocess: Preprocess) -> tuple[int, int]:
    """Width and height after the resize, as torchvision's `_compute_resized_output_size` truncates them."""
    new_short = preprocess.resize_size
    if preprocess.crop_mode == "squash":
        crop_h, crop_w = preprocess.crop_height, preprocess.crop_width
        return new_short * crop_w // min(crop_h, crop_w), new_short * crop_h // min(crop_h, crop_w)
    short, long = min(width, height), max(width, height)
    new_long = int(new_short * long / short)
    if new_long > _MAX_SIDE:
        raise UnreadableImageError(
            f"{width}x{height} is too narrow: the resize would make it {new_long} long"
        )
    return (new_short, new_long) if width <= height else (new_long, new_short)


def resize_and_crop(image: Image.Image, preprocess: Preprocess) -> npt.NDArray[np.uint8]:
    """Resize and centre-crop an 8-bit image; returns uint8 [crop_height, crop_width, channels].

    Sizes and offsets follow torchvision.transforms.functional (`_compute_resized_output_size`,
    `center_crop`), including its truncation of the long side and its rounding of offsets.

    Raises:
        UnreadableImageError: the image is so narrow that the resize would make it longer than 65,500 pixels.
    """
    new_size = _resized(*image.size, preprocess)
    if new_size != image.size:
        image = image.resize(new_size, _RESAMPLING[preprocess.interpolation])
    pixels = np.asarray(image)
    found: npt.NDArray[np.uint8] = _crop(pixels if pixels.ndim == 3 else pixels[..., None], preprocess)
    return found


def _resize_bands(values: Float32Array, preprocess: Preprocess) -> Float32Array:
    """`resize_and_crop` of float32 [H, W, bands], each band by Pillow's resize of floats."""
    new_size = _resized(values.shape[1], values.shape[0], preprocess)
    if new_size != (values.shape[1], values.shape[0]):
        resampling = _RESAMPLING[preprocess.interpolation]
        bands = [
            Image.fromarray(np.ascontiguousarray(values[..., band])).resize(new_size, resampling)
            for band in range(values.shape[2])
        ]
        values = np.stack([np.asarray(band) for band in bands], axis=-1)
    found: Float32Array = _crop(values, preprocess)
    return found


def _crop(pixels: npt.NDArray[Any], preprocess: Preprocess) -> npt.NDArray[Any]:
    crop_h, crop_w = preprocess.crop_height, preprocess.crop_width
    pad_h, pad_w = max(crop_h - pixels.shape[0], 0), max(crop_w - pixels.shape[1], 0)
    if pad_h or pad_w:
        pixels = np.pad(pixels, ((pad_h // 2, (pad_h + 1) // 2), (pad_w // 2, (pad_w + 1) // 2), (0, 0)))
    top = round((pixels.shape[0] - crop_h) / 2.0)
    left = round((pixels.shape[1] - crop_w) / 2.0)
    return np.ascontiguousarray(pixels[top : top + crop_h, left : left + crop_w])


def read_pixels(data: bytes, preprocess: Preprocess) -> tuple[Pixels, int]:
    """Decode, resize and crop an image: [crop_height, crop_width, channels], as `Pixels`.

    Returns the pixels, and the largest value of an image of 16 bits that is cut to 8; 0 for others.

    Raises:
        UnreadableImageError: the image cannot be decoded, is too narrow, or has another number of bands.
        EnvironmentFailureError: a library that decodes its format is not installed.
    """
    if preprocess.keeps_values:
        values = decode_bands(data, preprocess.channels, gray=preprocess.mode == "RGB")
        return _resize_bands(values, preprocess), 0
    assert preprocess.mode != "bands"
    image = decode(data, preprocess.mode)
    return resize_and_crop(image, preprocess), image.info.get(LARGEST, 0)


def normalize(pixels: Pixels, preprocess: Preprocess) -> Float32Array:
    """[N, H, W, C] to float32 [N, C, H, W]: `(x / scale - mean) / std`, each step rounded to float32."""
    mean = np.asarray(preprocess.mean, dtype=np.float32)
    std = np.asarray(preprocess.std, dtype=np.float32)
    scale = np.float32(preprocess.scale)
    if pixels.dtype != np.uint8:
        planes = np.moveaxis(pixels, 3, 1).astype(np.float32)
        return np.asarray((planes / scale - mean[:, None, None]) / std[:, None, None])
    # Only 256 values exist per channel: a table gives the same bits as the arithmetic, several times faster.
    table = ((np.arange(256, dtype=np.float32) / scale)[None, :] - mean[:, None]) / std[:, None]
    out = np.empty((pixels.shape[0], len(mean), *pixels.shape[1:3]), dtype=np.float32)
    for channel in range(len(mean)):
        np.take(table[channel], pixels[..., channel].view(np.uint8), out=out[:, channel])
    return out
