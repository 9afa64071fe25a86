"""Inputs other than 8-bit RGB: gray, alpha, many bands, 16 bits; and image folders as people have them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.options import UNTUNED
from support.paths import ROOT

import export_zoo
from export_zoo.base.errors import BadInputError
from export_zoo.engines.bundle.reader import held_out, read_manifest
from export_zoo.exporter.models import zoo
from export_zoo.exporter.options import ExportOptions

NETWORKS = ROOT / "tests" / "own_networks.py"
SMALL = ("--batch", "1:2:3", "--target", "onnxruntime", *UNTUNED)
INT8 = ("--precision", "fp32", "--precision", "int8")
PREPROCESS = {"resize_size": 36, "crop_height": 32, "crop_width": 32, "interpolation": "bilinear"}


def described(path: Path, channels: int, **more) -> Path:
    path.write_text(json.dumps({**PREPROCESS, "mean": [0.4] * channels, "std": [0.25] * channels, **more}))
    return path


@pytest.fixture(scope="module")
def arrays(photos) -> list[np.ndarray]:
    """60 photographs of 40x48 pixels, uint8 [40, 48, 3]."""
    files = sorted(photos.rglob("*.jpg"))[:60]
    return [np.asarray(Image.open(file).convert("RGB").resize((48, 40))) for file in files]


def write(folder: Path, arrays: list[np.ndarray], kind: str) -> Path:
    """The photographs as files of another kind."""
    folder.mkdir()
    for index, pixels in enumerate(arrays):
        wide = pixels.astype(np.uint16)
        path = folder / f"{index:02}"
        if kind == "gray":
            Image.fromarray(pixels).save(path.with_suffix(".png"))
        elif kind == "alpha":
            Image.fromarray(np.dstack([pixels, pixels[..., 0]])).save(path.with_suffix(".png"))
        elif kind == "12 bits":
            Image.fromarray(wide[..., 0] * 16).save(path.with_suffix(".png"))
        elif kind == "bands":  # five bands of reflectances
            import tifffile

            bands = np.stack([wide[..., i % 3] * (20 + i) for i in range(5)])
            planar = index % 2
            tifffile.imwrite(
                path.with_suffix(".tif"),
                bands if planar else np.moveaxis(bands, 0, -1),
                photometric="minisblack",
                planarconfig="separate" if planar else "contig",
                compression="zlib" if index % 3 else None,
            )
        elif kind == "16 bits":
            import imagecodecs

            path.with_suffix(".png").write_bytes(imagecodecs.png_encode(wide * 257))
    return folder


CASES = {
    "gray": (1, {"mode": "L", "crop_mode": "squash"}),
    "alpha": (4, {"mode": "RGBA"}),
    "bands": (5, {"mode": "bands", "scale": 10000}),
    "16 bits": (3, {"scale": 65535}),
    "12 bits": (1, {"mode": "L", "scale": 4095}),
}


@pytest.mark.parametrize("kind", CASES)
def test_inputs_of_any_channels_and_depth_end_verified(cli, arrays, tmp_path, kind):
    channels, more = CASES[kind]
    folder = write(tmp_path / "images", arrays, kind)
    done = cli(
        *(f"{NETWORKS}:Headed", *SMALL, *INT8, "--calib", folder, "--model-arg", "kind=quantities"),
        *("--model-arg", f"channels={channels}", "--task", "regression"),
        *("--preprocess", described(tmp_path / "p.json", channels, **more), "--out", tmp_path / "b.bundle"),
    )
    assert done.code == 0, done.json["error"]
    assert {engine["state"] for engine in done.json["engines"]} == {"verified"}
    assert not [text for text in done.json["warnings"] if "nearly black" in text]
    manifest = read_manifest(tmp_path / "b.bundle")
    assert manifest.recipe.input.shape == ["batch", channels, 32, 32]
    held = held_out(tmp_path / "b.bundle", manifest)
    assert held.pixels.dtype == (np.float32 if "scale" in more else np.uint8)
    engine = export_zoo.load(tmp_path / "b.bundle")
    inputs = engine.preprocess(sorted(folder.iterdir())[:2])
    assert inputs.shape == (2, channels, 32, 32)
    assert 0.1 < inputs.std() < 2, "values are on the scale that mean and std are for"
    assert inputs.mean() > -1.2, "and not nearly black"
    assert engine.run(inputs).shape == (2, 4)
    assert cli("verify", tmp_path / "b.bundle", "--no-latency").code == 0
    shown = cli("inspect", tmp_path / "b.bundle").out
    assert f"{more.get('mode', 'RGB')}, resize 36" in shown
    assert f"/{more.get('scale', 255):g}, mean" in shown


def test_values_of_bands_are_those_of_the_file_resized_as_floats(arrays, tmp_path):
    from export_zoo.calibration.preprocess import Preprocess, normalize, read_pixels

    folder = write(tmp_path / "images", arrays[:2], "bands")
    exact = Preprocess(
        **{**PREPROCESS, "resize_size": 40, "crop_height": 40, "crop_width": 48},
        **{"mode": "bands", "scale": 10000, "mean": (0.1,) * 5, "std": (0.5,) * 5, "source": "test"},
    )
    for index, file in enumerate(sorted(folder.iterdir())):
        pixels, _ = read_pixels(file.read_bytes(), exact)
        want = np.stack([arrays[index][..., i % 3].astype(np.float32) * (20 + i) for i in range(5)], -1)
        np.testing.assert_array_equal(pixels, want)
        found = normalize(pixels[None], exact)[0, 3]
        np.testing.assert_allclose(found, (want[..., 3] / 10000 - 0.1) / 0.5, rtol=1e-5, atol=1e-6)
        half, _ = read_pixels(file.read_bytes(), exact.at_size(20, 24))
        band = np.asarray(Image.fromarray(want[..., 2]).resize((24, 20), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(half[..., 2], band)


def test_twelve_bits_in_sixteen_are_warned_of(cli, arrays, tmp_path):
    folder = write(tmp_path / "images", arrays, "12 bits")
    done = cli(
        *(f"{NETWORKS}:Headed", *SMALL, "--verify", folder, "--preprocess"),
        *(described(tmp_path / "p.json", 3), "--out", tmp_path / "b.bundle"),
    )
    (told,) = (text for text in done.json["warnings"] if "16-bit" in text)
    assert "the largest value of its 16-bit images is 4080, as of 12 bits" in told
    assert "give `scale: 4095`" in told


def test_another_number_of_bands_is_named(cli, arrays, tmp_path):
    folder = write(tmp_path / "images", arrays, "bands")
    done = cli(
        *(f"{NETWORKS}:Headed", *SMALL, "--verify", folder, "--model-arg", "channels=4", "--preprocess"),
        *(described(tmp_path / "p.json", 4, mode="bands", scale=10000), "--out", tmp_path / "b.bundle"),
    )
    assert done.code == 5
    assert "of uint16, not of 4 band(s)" in done.json["error"]["message"]


def test_a_tiff_of_bands_is_no_8_bit_image(cli, arrays, tmp_path):
    folder = write(tmp_path / "images", arrays, "bands")
    done = cli(
        *(f"{NETWORKS}:Headed", *SMALL, "--verify", folder, "--preprocess"),
        *(described(tmp_path / "p.json", 3), "--out", tmp_path / "b.bundle"),
    )
    assert done.code == 5
    assert "`mode: bands` in a --preprocess file reads it" in done.json["error"]["message"]


@pytest.mark.parametrize(
    ("channels", "more", "hint"),
    [
        (1, {}, "mean has 3 and std 3 values"),
        (3, {"mode": "L"}, "mean has 3 and std 3 values, mode L has 1"),
        (3, {"scale": 0}, "scale"),
        (3, {"crop_mode": "border"}, "crop_mode"),
    ],
)
def test_a_preprocessing_that_contradicts_itself_names_the_key(tmp_path, channels, more, hint):
    path = described(tmp_path / "p.json", 3, **more)
    if channels == 1:
        document = json.loads(path.read_text())
        path.write_text(json.dumps({**document, "mode": "RGBA"}))
    with pytest.raises(BadInputError, match=hint):
        zoo.resolve(ExportOptions(f"{NETWORKS}:Headed", preprocess=path))


def test_a_network_for_other_channels_is_answered_with_the_mode(tmp_path):
    with pytest.raises(BadInputError) as error:
        zoo.resolve(ExportOptions(f"{NETWORKS}:Gray", preprocess=described(tmp_path / "p.json", 3)))
    assert "`mode: L` (gray)" in error.value.hint
    with pytest.raises(BadInputError, match="torchvision's resnet18 takes 3"):
        zoo.resolve(
            ExportOptions("resnet18", weights="none", preprocess=described(tmp_path / "p.json", 1, mode="L"))
        )


def test_timms_networks_take_the_channels_of_the_preprocessing(tmp_path):
    pytest.importorskip("timm")
    gray = described(tmp_path / "p.json", 1, mode="L")
    spec = zoo.resolve(ExportOptions("timm/resnet10t", weights="none", preprocess=gray))
    module, _ = zoo.build(spec)
    assert next(module.parameters()).shape[1] == 1
    with pytest.raises(BadInputError, match="in_chans=4, and the preprocessing has 3 channels"):
        zoo.resolve(ExportOptions("timm/resnet10t", weights="none", model_args=(("in_chans", "4"),)))


def test_what_is_left_out_of_a_folder_is_told_by_kind(cli, arrays, tmp_path):
    folder = write(tmp_path / "images", arrays, "gray")
    for name in ("a.csv", "b.csv", "README", ".hidden"):
        (folder / name).write_text("no image")
    (folder / "copy.png").write_bytes((folder / "00.png").read_bytes())
    done = cli(
        *(f"{NETWORKS}:Headed", *SMALL, "--verify", folder, "--preprocess"),
        *(described(tmp_path / "p.json", 3), "--out", tmp_path / "b.bundle"),
    )
    assert done.code == 0, done.json["error"]
    assert "left out: 1 duplicates, 2 .csv files, 1 files without a suffix" in done.err


def test_heic_is_read_by_pillow_heif(cli, arrays, tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    folder = tmp_path / "images"
    folder.mkdir()
    for index, pixels in enumerate(arrays[:40]):
        Image.fromarray(pixels).resize((96, 80)).save(
            folder / f"{index:02}.{'heic' if index % 2 else 'avif'}"
        )
    done = cli(
        *(f"{NETWORKS}:Headed", *SMALL, "--verify", folder, "--preprocess"),
        *(described(tmp_path / "p.json", 3), "--out", tmp_path / "b.bundle"),
    )
    assert done.code == 0, done.json["error"]
    assert read_manifest(tmp_path / "b.bundle").artifacts.held_out.count == 40


def test_bands_are_turned_upright_and_may_be_pages_and_gray_becomes_rgb(arrays, tmp_path):
    tifffile, imagecodecs = pytest.importorskip("tifffile"), pytest.importorskip("imagecodecs")
    from export_zoo.calibration.decode import decode_bands

    wide = arrays[0].astype(np.uint16) * 257
    turned = {3: np.rot90(wide, 2), 6: np.rot90(wide, 1), 8: np.rot90(wide, -1)}  # as stored
    for orientation, stored in turned.items():
        path = tmp_path / f"{orientation}.tif"
        extra = [(274, "H", 1, orientation, True)]
        tifffile.imwrite(path, np.ascontiguousarray(stored), photometric="rgb", extratags=extra)
        np.testing.assert_array_equal(decode_bands(path.read_bytes(), 3), wide)
    with tifffile.TiffWriter(tmp_path / "pages.tif") as pages:
        for band in range(3):
            pages.write(wide[..., band], contiguous=False, metadata=None)
    np.testing.assert_array_equal(decode_bands((tmp_path / "pages.tif").read_bytes(), 3), wide)
    gray = imagecodecs.png_encode(np.ascontiguousarray(wide[..., 1]))
    np.testing.assert_array_equal(decode_bands(gray, 3, gray=True), np.repeat(wide[..., 1:2], 3, axis=2))


@pytest.mark.parametrize(("kind", "scale"), [("gray", 65535), ("16 bits", 1e6)])
def test_a_scale_far_above_the_values_is_warned_of(cli, arrays, tmp_path, kind, scale):
    folder = write(tmp_path / "images", arrays, kind)
    done = cli(
        *(f"{NETWORKS}:Headed", *SMALL, "--verify", folder, "--preprocess"),
        *(described(tmp_path / "p.json", 3, scale=scale), "--out", tmp_path / "b.bundle"),
    )
    assert [text for text in done.json["warnings"] if "nearly black; give the value that counts as 1" in text]


def test_one_corrupt_image_among_just_enough_is_named_and_ends_nothing(cli, arrays, tmp_path):
    folder = write(tmp_path / "images", arrays[:32], "gray")
    broken = folder / "05.png"
    broken.write_bytes(broken.read_bytes()[:700])
    given = (f"{NETWORKS}:Headed", *SMALL, "--verify", folder, "--preprocess")
    done = cli(*given, described(tmp_path / "p.json", 3), "--out", tmp_path / "b.bundle")
    assert done.code == 0, done.json["error"]
    assert [text for text in done.json["warnings"] if "05.png cannot be read" in text]
    assert read_manifest(tmp_path / "b.bundle").artifacts.held_out.count == 31


def test_a_network_that_amplifies_rounding_is_no_defect_of_ours(cli, tmp_path):
    done = cli(
        *(f"{NETWORKS}:Jittery", *SMALL, "--preprocess", described(tmp_path / "p.json", 3)),
        *("--out", tmp_path / "b.bundle"),
    )
    assert done.code == 5
    assert "amplifies rounding" in done.json["error"]["hint"]


@pytest.mark.parametrize("given", ["--calib", "--verify"])
def test_a_spare_image_takes_the_place_of_one_that_cannot_be_decoded(cli, arrays, tmp_path, given):
    folder = write(tmp_path / "images", arrays, "gray")
    options = ExportOptions("x", calib=folder) if given == "--calib" else ExportOptions("x", verify=folder)
    from export_zoo.calibration import images

    shuffled = images.shuffled(images.scan(folder, option=given).images, options.seed)
    broken = shuffled[0].path  # the first of the verify images
    # The hash decides the split: a file with the same header and hash cannot be made, so that one is cut
    # until it is among the first.
    data = broken.read_bytes()
    for end in range(len(data) // 2, len(data) // 4, -1):
        broken.write_bytes(data[:end])
        found = images.shuffled(images.scan(folder, option=given).images, options.seed)
        if broken in [file.path for file in found[:32]]:
            break
    done = cli(
        *(f"{NETWORKS}:Headed", *SMALL, given, folder, "--verify-images", "32", "--preprocess"),
        *(described(tmp_path / "p.json", 3), "--out", tmp_path / "b.bundle"),
    )
    assert done.code == 0, done.json["error"]
    assert read_manifest(tmp_path / "b.bundle").artifacts.held_out.count == 32
    assert [text for text in done.json["warnings"] if f"{broken.name} cannot be read" in text]


def test_what_libraries_and_the_network_warn_of_is_told_once(cli, tmp_path):
    done = cli(
        *(f"{NETWORKS}:Warns", *SMALL, "--preprocess", described(tmp_path / "p.json", 3)),
        *("--out", tmp_path / "b.bundle"),
    )
    assert done.code == 0, done.json["error"]
    assert [text for text in done.json["warnings"] if "odd size" in text] == [
        "own_networks.py: the image has an odd size"
    ]
    assert not [text for text in done.json["warnings"] if "later version" in text]


def test_a_failed_fp32_gate_names_the_module(cli, photos, tmp_path):
    done = cli(
        *(f"{NETWORKS}:Amplified", *SMALL, "--verify", photos, "--preprocess"),
        *(described(tmp_path / "p.json", 3), "--out", tmp_path / "b.bundle"),
    )
    assert done.code == 3
    assert "first seen in the output of module squash" in done.json["error"]["message"]
