"""From the bytes of an image file to its pixels."""

from __future__ import annotations

import io
import logging
import warnings
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from export_zoo.base.errors import EnvironmentFailureError

# Reasons reach the user as ours. Without a handler, they would go to stderr, too.
logging.getLogger("PIL").addHandler(logging.NullHandler())
logging.getLogger("tifffile").addHandler(logging.NullHandler())

Float32Array = npt.NDArray[np.float32]
Mode = Literal["RGB", "L", "RGBA", "bands"]

LARGEST = "export_zoo_largest"
"""Key of `Image.info`: the largest value of an image of 16 bits, before it is cut to 8."""

_ORIENTATION = 0x0112
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG = b"\x89PNG\r\n\x1a\n"


class UnreadableImageError(Exception):
    """The bytes are not an image that can be decoded to the pixels that are wanted."""


def register_heif() -> bool:
    """Whether HEIC can be decoded: pillow-heif is installed. Pillow 11.3 and later decode AVIF themselves."""
    try:
        import pillow_heif  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _is_color_png16(data: bytes) -> bool:
    """Whether the bytes are a PNG of 16 bits with several channels, of which Pillow keeps the high bytes only."""
    return data.startswith(_PNG) and data[24:25] == b"\x10" and data[25:26] in (b"\2", b"\4", b"\6")


def _not_an_image(data: bytes) -> str:
    if data.startswith(_TIFF):
        return "a TIFF that Pillow does not know: `mode: bands` in a --preprocess file reads it"
    return "not an image format that Pillow knows" if data else "empty file"


def decode(data: bytes, mode: Literal["RGB", "L", "RGBA"] = "RGB") -> Image.Image:
    """Decode image bytes to an upright 8-bit image.

    Alpha is dropped (unless `mode` is RGBA) and CMYK, palette and gray are converted as `Image.convert` does, which is
    what torchvision's ImageFolder feeds networks in training; 16-bit gray keeps its high byte (Pillow would
    clip it), and `info[LARGEST]` has its largest value. The first frame of an animation or of a multi-page file is
    used. L is the luma of the RGB image, (19595 R + 38470 G + 7471 B + 32768) >> 16.

    Raises:
        UnreadableImageError: not an image, truncated, a decompression bomb, or a mode with no 8-bit meaning.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            gray16 = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
            if image.mode in ("I", "F") and not gray16:
                raise UnreadableImageError(
                    f"pixel mode {image.mode!r} has no defined 8-bit range: give the value that counts as 1 with "
                    "`scale` in the --preprocess file"
                )
            upright = _upright(image)
            info: dict[str | tuple[int, int], Any] = {}
            if _is_color_png16(data) and image.mode in ("RGB", "RGBA"):
                info[LARGEST] = int(np.asarray(image).max()) << 8 | 255
            if gray16:
                values = np.asarray(upright).astype(np.uint32)
                info[LARGEST] = int(values.max())
                upright = Image.fromarray((values >> 8).astype(np.uint8))
            found = upright.convert("RGBA") if mode == "RGBA" else upright.convert("RGB")
            found = found.convert("L") if mode == "L" else found
            found.info = info
            return found
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


def decode_bands(data: bytes, bands: int, *, gray: bool = False) -> Float32Array:
    """Decode an image to its values as they are in the file, float32 [H, W, bands].

    TIFF (by tifffile: any number of bands, interleaved, planar or one a page; integers and floats) and PNG of 16 bits
    (by imagecodecs) need `pip install tifffile imagecodecs`. Other files are decoded by Pillow. A palette becomes RGB.
    The orientation in EXIF is applied.

    Args:
        gray: whether an image of one band gives all bands, as gray becomes RGB.

    Raises:
        UnreadableImageError: not an image, truncated, with another number of bands, or values that are not finite.
        EnvironmentFailureError: a library is not installed.
    """
    try:
        if data.startswith(_TIFF):
            values = _tiff(data, bands)
        elif _is_color_png16(data):
            with Image.open(io.BytesIO(data)) as image:
                orientation = image.getexif().get(_ORIENTATION, 1)
            values = _turned(_library("imagecodecs").png_decode(data), orientation)
        else:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                upright = _upright(image)
                values = np.asarray(upright.convert("RGB") if upright.mode == "P" else upright)
    except (UnreadableImageError, EnvironmentFailureError):
        raise
    except UnidentifiedImageError:
        raise UnreadableImageError(_not_an_image(data)) from None
    except Exception as error:
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error
    if values.ndim == 2:
        values = values[..., None]
    if values.dtype.kind not in "buif":
        raise UnreadableImageError(f"values of type {values.dtype}, not integers or floats")
    if gray and values.ndim == 3 and values.shape[2] == 1:
        values = np.repeat(values, bands, axis=2)
    if values.ndim != 3 or values.shape[2] != bands:
        raise UnreadableImageError(
            f"an array {list(values.shape)} of {values.dtype}, not of {bands} band(s), which mean and std are for"
        )
    found = np.ascontiguousarray(values, dtype=np.float32)
    if not np.isfinite(found).all():
        raise UnreadableImageError("it has values that are not finite")
    return found


def _library(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise EnvironmentFailureError(
            f"{name}, which decodes TIFF with bands and PNG of 16 bits, cannot be imported: {error}",
            hint="pip install tifffile imagecodecs",
        ) from error


def _tiff(data: bytes, bands: int) -> npt.NDArray[Any]:
    """The first image of a TIFF, or its first series of pages, with the bands last."""
    tifffile = _library("tifffile")
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        found: npt.NDArray[Any] = series.asarray()
        axes = series.axes
        tag = file.pages.first.tags.get(_ORIENTATION)
        orientation = int(tag.value) if tag is not None else 1
        if found.ndim == 2 and bands > 1 and len(file.pages) == bands:  # a page a band
            found, axes = np.stack([page.asarray() for page in file.pages]), "QYX"
    if found.ndim == 3 and (axes[0] == "S" or (axes[1:] == "YX" and found.shape[0] == bands)):
        found = np.moveaxis(found, 0, -1)  # planar, or a page a band
    return _turned(found, orientation)


def _turned(values: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """An array [H, W, ...] made upright: EXIF 2.32, table 6, values 1 to 8; others leave it as it is."""
    if orientation in (5, 6, 7, 8):
        values = np.swapaxes(values, 0, 1)
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    return values


def check_header(data: bytes, *, bands: bool = False) -> None:
    """Parse only the header: cheap, and finds most files that are not images.

    Args:
        bands: whether `decode_bands` will decode it, which knows TIFF that Pillow does not.

    Raises:
        UnreadableImageError: the header is not that of an image.
    """
    if bands and data.startswith(_TIFF):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `decode` reports them
            with Image.open(io.BytesIO(data)):
                pass
    except UnidentifiedImageError:
        raise UnreadableImageError(_not_an_image(data)) from None
    except Exception as error:
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error
