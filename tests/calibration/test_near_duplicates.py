"""Images that look alike are found; different ones are not, however simple."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from export_zoo.calibration.near_duplicates import alike, fingerprints
from export_zoo.calibration.preprocess import Preprocess
from export_zoo.calibration.synthetic import synthetic_images

PREPROCESS = Preprocess(
    resize_size=96,
    crop_height=96,
    crop_width=96,
    interpolation="bilinear",
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    source="test",
)


@pytest.fixture(scope="module")
def pictures(photos) -> np.ndarray:
    """80 photographs, uint8 [80, 96, 128, 3]."""
    files = sorted(photos.rglob("*.jpg"))
    return np.stack([np.asarray(Image.open(file).convert("RGB").resize((128, 96))) for file in files])


def compressed(image: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=30)
    return np.asarray(Image.open(file))


CHANGES = {
    "compressed": lambda x: np.stack([compressed(image) for image in x]),
    "darker": lambda x: (x * 0.7 + 10).astype(np.uint8),
    "noisy": lambda x: np.clip(x + np.random.default_rng(0).normal(0, 4, x.shape), 0, 255).astype(np.uint8),
    "smaller": lambda x: np.stack(
        [np.asarray(Image.fromarray(i).resize((64, 48)).resize((128, 96))) for i in x]
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_looks_like_its_original(change, pictures):
    images = np.concatenate([pictures[:30], CHANGES[change](pictures[:30])])
    found = alike(fingerprints(images))
    right = sum(found.get(index + 30) == index for index in range(30))
    assert right >= 26
    assert len(found) == right


def test_different_images_do_not_look_alike(pictures):
    import digits as recipe

    assert alike(fingerprints(pictures)) == {}
    assert len(alike(fingerprints(recipe.digits()[0]))) <= 1, "of 1,797 digits"
    assert alike(fingerprints(synthetic_images(64, PREPROCESS, 0))) == {}


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (8, 8), (9, 300)])
def test_any_size_has_a_fingerprint_and_images_of_one_colour_are_alike(size):
    pixels = np.random.default_rng(0).integers(0, 256, (3, *size, 3), dtype=np.uint8)
    found = fingerprints(pixels)
    assert found.shape == (3, 1 + min(size[0], 8) * min(size[1], 8))
    assert np.isfinite(found).all()
    black_and_white = np.stack([np.full((*size, 3), value, np.uint8) for value in (0, 255)])
    assert alike(fingerprints(black_and_white)) == {1: 0}
    assert size == (1, 1) or alike(fingerprints(np.concatenate([pixels[:1], black_and_white]))) == {2: 1}


def test_calibrating_on_copies_is_warned_of_with_an_example(cli, digits, tmp_path):
    folder = tmp_path / "images"
    for index, file in enumerate(sorted(digits.images.rglob("*.png"))[:120]):
        folder.joinpath(str(index // 40)).mkdir(parents=True, exist_ok=True)
        image = Image.open(file)
        image.save(folder / str(index // 40) / f"{index}.png")
        if index % 2:
            image.resize((40, 40)).save(folder / str(index // 40) / f"{index}-again.png")
    given = [*digits.arguments(), "--calib", folder, "--out", tmp_path / "r.json"]
    done = cli("calibrate", *given)
    assert done.code == 0, done.err
    (warning,) = [text for text in done.json["warnings"] if "look like another" in text]
    assert "again.png" in warning
    plain = cli("calibrate", *digits.arguments(), "--calib", digits.images, "--out", tmp_path / "r.json")
    assert not any("look like" in text for text in plain.json["warnings"])
