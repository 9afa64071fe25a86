"""Preprocessing is bit-equal to torchvision's on PIL images; what is no image is refused with a reason."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import InterpolationMode, functional
from torchvision.transforms._presets import ImageClassification

from export_zoo.calibration.decode import UnreadableImageError, check_header, decode
from export_zoo.calibration.preprocess import Preprocess, normalize, resize_and_crop

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ORIENTATION = 0x0112


def preprocess(resize: int, height: int, width: int, interpolation: str = "bilinear", **fields) -> Preprocess:
    sizes = {"resize_size": resize, "crop_height": height, "crop_width": width}
    return Preprocess(
        **{**sizes, "interpolation": interpolation, "mean": MEAN, "std": STD, "source": "test", **fields}
    )


def ours(image: Image.Image, parameters: Preprocess) -> np.ndarray:
    return normalize(resize_and_crop(image, parameters)[None], parameters)[0]


def by_torchvision(image: Image.Image, parameters: Preprocess) -> np.ndarray:
    mode = InterpolationMode(parameters.interpolation)
    resized = functional.resize(image, [parameters.resize_size], interpolation=mode, antialias=True)
    cropped = functional.center_crop(resized, [parameters.crop_height, parameters.crop_width])
    scaled = functional.convert_image_dtype(functional.pil_to_tensor(cropped))
    return functional.normalize(scaled, mean=list(parameters.mean), std=list(parameters.std)).numpy()


def assert_same_bits(first: np.ndarray, second: np.ndarray) -> None:
    assert first.dtype == second.dtype == np.float32
    assert first.shape == second.shape
    assert np.array_equal(first.view(np.uint32), np.ascontiguousarray(second).view(np.uint32))


@pytest.fixture(scope="module")
def photographs(photos: Path) -> list[Image.Image]:
    return [pil_loader(str(path)) for path in sorted(photos.iterdir())[:20]]


@pytest.fixture(scope="module")
def photograph(photographs: list[Image.Image]) -> Image.Image:
    """A small colourful one, wider than high."""
    return photographs[0].resize((96, 64))


def zoo_presets() -> Iterator[tuple[str, ImageClassification, Preprocess]]:
    """Every distinct preprocessing among torchvision's classification weights."""
    from export_zoo.exporter.models.sources.torchvision_zoo import preprocess_of

    seen = set()
    for name in torchvision.models.list_models(module=torchvision.models):
        for weights in torchvision.models.get_model_weights(name):
            transforms = weights.transforms()
            if repr(transforms) not in seen:
                seen.add(repr(transforms))
                yield str(weights), transforms, preprocess_of(weights)


def test_every_preset_of_the_zoo_is_reproduced_to_the_bit(photographs):
    presets = list(zoo_presets())
    assert len(presets) >= 20
    assert {transforms.interpolation.value for _, transforms, _ in presets} == {"bilinear", "bicubic"}
    for index, (_, transforms, parameters) in enumerate(presets):
        image = photographs[index % 20]
        assert_same_bits(ours(image, parameters), transforms(image).numpy())


SIZES = """
640x427 427x640 256x256 224x224 232x232 257x255 255x257 500x333 333x500 225x224 599x601 900x90 97x731 31x17
17x31 3x60 60x3 1x1 1x7 7x1 2x3
""".split()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", SIZES)
def test_an_image_of_any_size_gives_the_bits_of_torchvision(photographs, size, interpolation):
    width, height = map(int, size.split("x"))
    for resize, crop in ((256, 224), (37, 32)):
        preset = ImageClassification(
            crop_size=crop, resize_size=resize, interpolation=InterpolationMode(interpolation)
        )
        image = photographs[(width + height) % 20].resize((width, height))
        parameters = preprocess(resize, crop, crop, interpolation)
        assert_same_bits(ours(image, parameters), preset(image).numpy())


@pytest.mark.parametrize("crop", ["96x160", "160x96", "33x64", "64x33", "65x65", "64x64", "200x10", "1x1"])
@pytest.mark.parametrize("size", ["100x80", "80x100", "64x64", "65x63", "300x40", "11x5"])
def test_crops_of_any_shape_are_padded_and_centred_as_torchvision_does(photographs, size, crop):
    width, height = map(int, size.split("x"))
    crop_height, crop_width = map(int, crop.split("x"))
    image = photographs[(width + crop_height) % 20].resize((width, height))
    for resize in (64, 41, 5):  # mostly smaller than the crop, so that zeros are padded
        parameters = preprocess(resize, crop_height, crop_width, "bicubic")
        assert_same_bits(ours(image, parameters), by_torchvision(image, parameters))


def test_padding_is_black_before_the_normalization(photograph):
    pixels = resize_and_crop(photograph, preprocess(10, 21, 31))
    assert pixels.shape == (21, 31, 3)
    assert not pixels[:5].any()
    assert not pixels[-6:].any()
    assert pixels[5:15, 8:23].any(axis=-1).mean() > 0.5


def test_an_image_that_already_fits_keeps_its_pixels(photograph):
    assert np.array_equal(resize_and_crop(photograph, preprocess(64, 64, 96)), np.asarray(photograph))


@pytest.mark.parametrize("mean", [MEAN, (0.5, 0.5, 0.5), (0.48235, 0.45882, 0.40784)])
@pytest.mark.parametrize("std", [STD, (0.5, 0.5, 0.5), (1 / 255, 1 / 255, 1 / 255), (0.1, 0.3, 0.7)])
def test_all_256_values_are_normalized_to_the_bits_of_torchvision(mean, std):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([ramp, ramp.T, ramp[::-1]], axis=-1))
    parameters = preprocess(16, 16, 16, mean=mean, std=std)
    assert_same_bits(ours(image, parameters), by_torchvision(image, parameters))


def test_a_batch_is_normalized_as_its_images_are(photographs):
    parameters = preprocess(40, 32, 48)
    pixels = np.stack([resize_and_crop(image, parameters) for image in photographs[:5]])
    batch = normalize(pixels, parameters)
    assert batch.shape == (5, 3, 32, 48)
    assert batch.flags.c_contiguous
    for image, tensor in zip(photographs, batch, strict=False):
        assert_same_bits(tensor, by_torchvision(image, parameters))


def encoded(image: Image.Image, format_: str, **options) -> bytes:
    with io.BytesIO() as file:
        image.save(file, format_, **options)
        return file.getvalue()


@pytest.mark.parametrize(
    ("mode", "format_", "options"),
    [
        ("RGB", "JPEG", {}),
        ("RGB", "JPEG", {"progressive": True}),
        ("RGB", "JPEG", {"subsampling": 0, "quality": 60}),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "PNG", {}),
        ("L", "PNG", {}),
        ("LA", "PNG", {}),
        ("P", "PNG", {}),
        ("P", "PNG", {"transparency": 3}),
        ("1", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("RGB", "GIF", {}),
        ("RGB", "WEBP", {}),
        ("RGBA", "WEBP", {"lossless": True}),
        ("RGB", "TIFF", {}),
        ("CMYK", "TIFF", {}),
        ("RGB", "BMP", {}),
        ("RGB", "JPEG2000", {}),
        ("RGB", "PPM", {}),
        ("L", "PPM", {}),
        ("RGB", "TGA", {}),
    ],
)
def test_files_are_decoded_as_image_folder_decodes_them(photograph, tmp_path, mode, format_, options):
    path = tmp_path / "image"
    path.write_bytes(encoded(photograph.convert(mode), format_, **options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # palette transparency
        expected = pil_loader(str(path))
    image = decode(path.read_bytes())
    assert (image.mode, image.size) == ("RGB", (96, 64))
    assert np.array_equal(np.asarray(image), np.asarray(expected))


def test_gray_is_repeated_over_the_three_channels(photograph):
    gray = photograph.convert("L")
    pixels = np.asarray(decode(encoded(gray, "PNG")))
    assert np.array_equal(pixels, np.repeat(np.asarray(gray)[..., None], 3, axis=-1))


def test_alpha_is_dropped_and_not_blended(photograph):
    transparent = photograph.copy()
    transparent.putalpha(0)
    assert np.array_equal(np.asarray(decode(encoded(transparent, "PNG"))), np.asarray(photograph))


def test_a_palette_gives_the_colours_it_holds(photograph):
    palette = photograph.quantize(200)
    assert len(palette.getcolors()) > 100
    expected = np.asarray(palette.getpalette()).reshape(-1, 3)[np.asarray(palette)]
    assert np.array_equal(np.asarray(decode(encoded(palette, "PNG"))), expected)


def test_cmyk_jpeg_is_not_inverted(photograph):
    pixels = np.asarray(decode(encoded(photograph.convert("CMYK"), "JPEG", quality=95)))
    difference = np.abs(pixels.astype(int) - np.asarray(photograph)).mean()
    assert difference < 5
    assert np.abs(255 - pixels.astype(int) - np.asarray(photograph)).mean() > 30


def test_a_progressive_jpeg_is_that_of_the_baseline(photograph):
    baseline, progressive = (encoded(photograph, "JPEG", progressive=p) for p in (False, True))
    assert b"\xff\xc2" in progressive  # the start-of-frame marker of progressive DCT
    assert b"\xff\xc2" not in baseline
    assert np.array_equal(np.asarray(decode(progressive)), np.asarray(decode(baseline)))


SIXTEEN_BITS = np.random.default_rng(0).integers(0, 2**16, (24, 32)).astype(np.uint16)


@pytest.mark.parametrize(
    ("format_", "dtype", "options"),
    [("PNG", "<u2", {}), ("TIFF", "<u2", {}), ("TIFF", ">u2", {}), ("JPEG2000", "<u2", {})],
    ids=["png", "little-endian tiff", "big-endian tiff", "jpeg 2000"],
)
def test_16_bit_gray_keeps_its_high_byte(format_, dtype, options):
    data = encoded(Image.fromarray(SIXTEEN_BITS.astype(dtype)), format_, **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode.startswith("I;16")
    expected = np.repeat((SIXTEEN_BITS >> 8).astype(np.uint8)[..., None], 3, axis=-1)
    assert np.array_equal(np.asarray(decode(data)), expected)


@pytest.mark.parametrize("format_", ["GIF", "TIFF", "PNG", "WEBP"])
def test_the_first_of_several_frames_is_used(photographs, format_):
    frames = [photograph.resize((40, 30)) for photograph in photographs[:3]]
    options = {"lossless": True} if format_ == "WEBP" else {}
    data = encoded(frames[0], format_, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
        first = np.asarray(image.convert("RGB"))
    pixels = np.asarray(decode(data))
    assert np.array_equal(pixels, first)
    closeness = [np.abs(pixels.astype(int) - np.asarray(frame)).mean() for frame in frames]
    assert closeness[0] < min(closeness[1:]) / 2


UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],  # mirrored left to right
    3: lambda stored: stored[::-1, ::-1],  # turned by 180 degrees
    4: lambda stored: stored[::-1],  # mirrored top to bottom
    5: lambda stored: stored.swapaxes(0, 1),  # its first row is the left side, its first column the top
    6: lambda stored: np.rot90(stored, -1),  # to be turned by 90 degrees clockwise
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),  # the first row is the right side, ... the bottom
    8: lambda stored: np.rot90(stored, 1),  # to be turned by 90 degrees counterclockwise
}


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(photograph, orientation, format_):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if format_ == "WEBP" else {}
    stored = np.asarray(decode(encoded(photograph, format_, **options)))
    assert stored.shape == (64, 96, 3)
    upright = np.asarray(decode(encoded(photograph, format_, exif=exif, **options)))
    assert np.array_equal(upright, UPRIGHT[orientation](stored))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_exif_orientation_is_applied_whatever_the_pixel_mode(photograph, mode):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    format_ = "JPEG" if mode == "CMYK" else "PNG"
    image = photograph.convert(mode)
    stored = np.asarray(decode(encoded(image, format_)))
    assert np.array_equal(np.asarray(decode(encoded(image, format_, exif=exif))), UPRIGHT[6](stored))


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_exif_orientation_is_applied_to_16_bit_gray(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(Image.fromarray(SIXTEEN_BITS), "PNG", exif=exif)
    expected = UPRIGHT[orientation]((SIXTEEN_BITS >> 8).astype(np.uint8))
    pixels = np.asarray(decode(data))
    assert pixels.shape[:2] == expected.shape
    assert np.array_equal(pixels[..., 0], expected)


JUNK_EXIF = b"Exif\0\0this is no TIFF header"


def test_damaged_exif_does_not_make_a_jpeg_unreadable(photograph):
    damaged, plain = encoded(photograph, "JPEG", exif=JUNK_EXIF), encoded(photograph, "JPEG")
    assert np.array_equal(np.asarray(decode(damaged)), np.asarray(decode(plain)))


@pytest.mark.parametrize("format_", ["PNG", "WEBP"])
def test_damaged_exif_does_not_make_other_images_unreadable(photograph, format_):
    damaged, plain = encoded(photograph, format_, exif=JUNK_EXIF), encoded(photograph, format_)
    assert np.array_equal(np.asarray(decode(damaged)), np.asarray(decode(plain)))


@pytest.mark.parametrize("orientation", [0, 9, 6000])
def test_an_unknown_orientation_leaves_the_image_as_it_is(photograph, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    assert decode(encoded(photograph, "JPEG", exif=exif)).size == (96, 64)


def huge_png() -> bytes:
    """A well-formed PNG of a few bytes that declares 900 million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("read", [decode, check_header])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file|not an image format"),
        (b"\0" * 4096, "not an image format"),
        (b"label,file\n3,three.jpg\n", "not an image format"),
        ("ein Bild, größer als".encode("utf-16"), "not an image format"),
        (b"\xff\xd8", "not an image format"),
        (b"<html><body>404 Not Found</body></html>", "not an image format"),
        (huge_png(), "DecompressionBombError.*900000000 pixels"),
    ],
    ids=["empty", "zeros", "csv", "utf-16", "two bytes", "html", "bomb"],
)
def test_what_is_no_image_is_refused_with_a_reason(read, data, reason):
    with pytest.raises(UnreadableImageError, match=reason):
        read(data)


def test_an_empty_file_is_called_empty():
    with pytest.raises(UnreadableImageError, match="empty file"):
        check_header(b"")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "GIF", "TIFF", "BMP"])
def test_a_truncated_image_is_refused_and_not_filled_with_gray(photograph, format_, share):
    data = encoded(photograph, format_)
    with pytest.raises(UnreadableImageError, match=r"truncated|broken|not an image format"):
        decode(data[: int(len(data) * share)])


def test_a_truncated_jpeg_passes_the_header_check_and_fails_to_decode(photograph):
    data = encoded(photograph, "JPEG")
    check_header(data[: len(data) // 2])
    with pytest.raises(UnreadableImageError, match=r"truncated \(\d+ bytes not processed\)"):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_an_8_bit_range_are_refused_by_mode(mode):
    data = encoded(Image.new(mode, (8, 6), 3), "TIFF")
    check_header(data)
    with pytest.raises(UnreadableImageError, match=f"pixel mode '{mode}' has no defined 8-bit range"):
        decode(data)


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "JPEG2000"])
def test_damaged_bytes_raise_nothing_but_unreadable_image_error(photograph, monkeypatch, format_):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)  # a damaged size must not cost much memory
    data = encoded(photograph.resize((32, 24)), format_)
    chance = random.Random(0)
    reasons = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(80):
            damaged = bytearray(data)
            for _ in range(chance.randint(1, 8)):
                damaged[chance.randrange(min(len(data), chance.choice([64, 10**6])))] = chance.randrange(256)
            try:
                assert decode(bytes(damaged)).mode == "RGB"
            except UnreadableImageError as error:
                reasons.append(str(error))
    assert reasons
    assert all(reasons)
