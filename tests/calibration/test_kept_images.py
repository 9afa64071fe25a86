"""A stream that keeps its images decodes them once, and gives what a stream that does not keep them gives."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from export_zoo.calibration import images, kept_images
from export_zoo.calibration.preprocess import Preprocess

P = Preprocess(
    source="test",
    resize_size=16,
    crop_height=16,
    crop_width=16,
    interpolation="bilinear",
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(20):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(tmp_path / f"{index:02}.png")
    damaged = tmp_path / "05.png"
    damaged.write_bytes(damaged.read_bytes()[:600])
    return tmp_path


@pytest.mark.parametrize("most", [kept_images.MOST, 1000])
def test_every_pass_gives_the_same_images_and_few_are_decoded_once(most, folder, monkeypatch):
    monkeypatch.setattr(kept_images, "MOST", most)
    files = images.scan(folder, option="--calib").images
    plain = images.ImageStream(files, P, 8, folder)
    want = plain.all()
    stream = kept_images.KeptStream(files, P, 8, folder)
    reads = []
    load = images.ImageStream._load
    monkeypatch.setattr(
        images.ImageStream, "_load", lambda self, file: reads.append(file) or load(self, file)
    )
    assert np.array_equal(stream.first(11), want[:11])
    for _ in range(2):
        assert np.array_equal(stream.all(), want)
        assert [image.name for image in stream.images] == [image.name for image in plain.images]
        assert [image.name for image in stream.unreadable] == ["05.png"]
    assert np.array_equal(stream.first(100), want)
    assert (len(reads) == len(files)) is (most > 1000)
