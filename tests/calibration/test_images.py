"""Image folders: what a scan finds and refuses, disjoint splits, streams of batches, folder labels."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export_zoo.base.errors import BadInputError
from export_zoo.calibration.images import (
    MAX_SELECT,
    MIN_CALIBRATE,
    MIN_SELECT,
    MIN_VERIFY,
    ImageFile,
    ImageFolder,
    ImageStream,
    overlap,
    scan,
    shuffled,
    split,
)
from export_zoo.calibration.preprocess import Preprocess, read_pixels
from export_zoo.calibration.synthetic import synthetic_images
from export_zoo.exporter.stages.labels import folder_labels

PREPROCESS = Preprocess(
    resize_size=12,
    crop_height=8,
    crop_width=10,
    interpolation="bilinear",
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    source="test",
)


def draw(path: Path, seed: int, size: tuple[int, int] = (16, 12)) -> Path:
    """Write an image that only this seed gives."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def draw_folder(root: Path, count: int) -> Path:
    for index in range(count):
        draw(root / f"{index:03}.png", index)
    return root


def made_up(count: int) -> ImageFolder:
    """A folder of that many images, as a scan describes it; nothing is on disk."""
    names = [f"{index}.png" for index in range(count)]
    images = [ImageFile(Path(n), n, hashlib.sha256(n.encode()).hexdigest(), None) for n in names]
    return ImageFolder(Path("photos"), tuple(images), (), (), ())


def names(images) -> list[str]:
    return [image.name for image in images]


# --- scan


def test_images_are_found_at_any_depth_and_sorted_by_name(tmp_path):
    for seed, name in enumerate(["top.png", "b/2.png", "b/1.jpg", "a/deep/er/3.bmp"]):
        draw(tmp_path / name, seed)
    found = scan(tmp_path, option="--calib")
    assert found.root == tmp_path
    assert names(found.images) == ["a/deep/er/3.bmp", "b/1.jpg", "b/2.png", "top.png"]
    assert [image.folder for image in found.images] == ["a", "b", "b", None]
    for image in found.images:
        assert image.path == tmp_path / image.name
        assert image.sha256 == hashlib.sha256(image.path.read_bytes()).hexdigest()
    assert (found.unreadable, found.duplicates, found.ignored) == ((), (), ())


def test_hidden_files_and_folders_are_passed_over(tmp_path):
    draw(tmp_path / "seen.png", 0)
    draw(tmp_path / ".hidden.png", 1)
    draw(tmp_path / ".thumbnails" / "2.png", 2)
    draw(tmp_path / "a" / ".cache" / "b" / "3.png", 3)
    (tmp_path / "a" / "._4.jpg").write_bytes(b"resource fork")
    (tmp_path / ".DS_Store").write_bytes(b"finder")
    found = scan(tmp_path, option="--calib")
    assert names(found.images) == ["seen.png"]
    assert (found.unreadable, found.ignored) == ((), ())


def test_a_folder_below_a_hidden_one_can_be_scanned(tmp_path):
    draw_folder(tmp_path / ".data" / "photos", 2)
    assert len(scan(tmp_path / ".data" / "photos", option="--calib").images) == 2


def test_files_with_the_same_bytes_are_kept_once(tmp_path):
    draw(tmp_path / "b.png", 0)
    draw(tmp_path / "c.png", 1)
    for copy in ("a.png", "z/other name.PNG"):
        (tmp_path / copy).parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "b.png", tmp_path / copy)
    found = scan(tmp_path, option="--calib")
    assert names(found.images) == ["a.png", "c.png"]
    assert found.duplicates == ("b.png", "z/other name.PNG")


def test_other_files_are_listed_as_ignored(tmp_path):
    draw(tmp_path / "cats" / "1.png", 0)
    (tmp_path / "labels.csv").write_text("1.png,cat\n")
    (tmp_path / "cats" / "README").write_text("cats")
    found = scan(tmp_path, option="--calib")
    assert names(found.images) == ["cats/1.png"]
    assert found.ignored == ("cats/README", "labels.csv")


@pytest.mark.parametrize("suffix", [".JPG", ".Jpeg", ".jfif", ".png", ".webp", ".gif", ".tif", ".bmp"])
def test_images_are_recognised_by_suffix_in_any_case(tmp_path, suffix):
    draw(tmp_path / f"image{suffix}", 0)
    assert names(scan(tmp_path, option="--calib").images) == [f"image{suffix}"]


def test_a_png_that_is_named_jpg_is_an_image(tmp_path):
    draw(tmp_path / "1.png", 0).rename(tmp_path / "1.jpg")
    assert names(scan(tmp_path, option="--calib").images) == ["1.jpg"]


def test_class_folders_may_be_symbolic_links(tmp_path):
    draw_folder(tmp_path / "elsewhere", 3)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "cats").symlink_to(tmp_path / "elsewhere")
    assert len(scan(tmp_path / "set", option="--calib").images) == 3


def test_linked_images_and_a_linked_root_are_followed(tmp_path):
    draw_folder(tmp_path / "elsewhere", 2)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "1.png").symlink_to(tmp_path / "elsewhere" / "000.png")
    (tmp_path / "link").symlink_to(tmp_path / "set")
    assert names(scan(tmp_path / "link", option="--calib").images) == ["1.png"]


def test_a_folder_that_links_to_its_parent_is_scanned_once(tmp_path):
    draw_folder(tmp_path / "a", 2)
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    found = scan(tmp_path, option="--calib")
    assert names(found.images) == ["a/000.png", "a/001.png"]
    assert found.duplicates == ()


def test_a_link_to_nothing_is_an_unreadable_image(tmp_path):
    draw_folder(tmp_path, 12)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (unreadable,) = scan(tmp_path, option="--calib").unreadable
    assert unreadable.name == "gone.png"
    assert "FileNotFoundError: No such file" in unreadable.reason


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may list any folder")
def test_a_folder_that_may_not_be_listed_is_named_with_its_option(tmp_path):
    draw_folder(tmp_path / "open", 3)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    with pytest.raises(BadInputError) as caught:
        scan(tmp_path, option="--calib")
    closed.chmod(0o700)
    assert f"--calib {closed}: cannot be listed: Permission denied" in caught.value.message


def refusal(root: Path, option: str = "--calib") -> BadInputError:
    with pytest.raises(BadInputError) as caught:
        scan(root, option=option)
    assert caught.value.exit_code == 5
    assert caught.value.hint
    assert str(root) in caught.value.message
    return caught.value


@pytest.mark.parametrize("option", ["--calib", "--verify"])
def test_a_missing_folder_is_named_with_its_option(tmp_path, option):
    assert f"{option} {tmp_path / 'gone'}: no such folder" in refusal(tmp_path / "gone", option).message


def test_a_file_instead_of_a_folder_is_named(tmp_path):
    path = draw(tmp_path / "image.png", 0)
    assert f"--calib {path}: not a folder" in refusal(path).message


def test_an_empty_folder_is_refused(tmp_path):
    assert f"--calib {tmp_path}: no images (found nothing)" in refusal(tmp_path).message


def test_a_folder_without_images_says_what_it_holds_and_what_is_recognised(tmp_path):
    for name in ("a.txt", "b.npy", "c/d.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    error = refusal(tmp_path)
    assert "no images (found 1 .npy files, 1 .pdf files, 1 .txt files)" in error.message
    assert ".jpg" in error.hint


def test_one_unreadable_file_in_ten_is_tolerated_and_named(tmp_path):
    draw_folder(tmp_path, 9)
    (tmp_path / "bad.jpg").write_text("<html>404</html>")
    found = scan(tmp_path, option="--calib")
    assert len(found.images) == 9
    assert [(u.name, u.reason) for u in found.unreadable] == [
        ("bad.jpg", "not an image format that Pillow knows")
    ]


def test_more_unreadable_files_are_refused_by_name_and_reason(tmp_path):
    draw_folder(tmp_path, 8)
    (tmp_path / "bad.jpg").write_text("<html>404</html>")
    message = refusal(tmp_path).message
    assert "1 of 9 image files cannot be read" in message
    assert "bad.jpg (not an image format that Pillow knows)" in message


def test_the_refusal_of_unreadable_files_names_the_option(tmp_path):
    draw_folder(tmp_path, 3)
    (tmp_path / "empty.png").touch()
    assert f"--verify {tmp_path}" in refusal(tmp_path, "--verify").message


def test_five_unreadable_files_are_shown_and_the_rest_counted(tmp_path):
    for index in range(8):
        (tmp_path / f"{index}.png").touch()
    message = refusal(tmp_path).message
    assert "8 of 8 image files" in message
    assert message.count("(empty file)") == 5
    assert message.endswith("and 3 more")


def test_unreadable_files_are_no_duplicates_of_each_other(tmp_path):
    draw_folder(tmp_path, 20)
    for name in ("x.png", "y.png"):
        (tmp_path / name).touch()
    found = scan(tmp_path, option="--calib")
    assert [u.name for u in found.unreadable] == ["x.png", "y.png"]
    assert found.duplicates == ()


def test_progress_counts_every_candidate(tmp_path):
    draw_folder(tmp_path, 11)
    shutil.copy(tmp_path / "000.png", tmp_path / "copy.png")
    (tmp_path / "bad.png").touch()
    (tmp_path / "notes.txt").touch()
    steps: list[int] = []
    scan(tmp_path, option="--calib", progress=steps.append)
    assert sum(steps) == 13


# --- split and overlap


@pytest.mark.parametrize("count", [56, 57, 63, 64, 80, 127, 128, 200, 1000, 2100])
@pytest.mark.parametrize("with_verify", [True, False])
def test_splits_are_disjoint_and_keep_their_sizes(count, with_verify):
    folder = made_up(count)
    splits = split(folder, calibrate=512, verify=300, seed=0, with_verify=with_verify)
    held = [image.sha256 for images in splits.values() for image in images]
    assert set(splits) == {"calibrate", "select", "verify", "spare"}
    assert len(held) == len(set(held)) <= count
    assert set(held) <= {image.sha256 for image in folder.images}
    assert MIN_CALIBRATE <= len(splits["calibrate"]) <= 512
    assert MIN_SELECT <= len(splits["select"]) <= MAX_SELECT
    if with_verify:
        assert MIN_VERIFY <= len(splits["verify"]) <= 300
    else:
        assert splits["verify"] == ()


def test_a_quarter_verifies_and_an_eighth_selects():
    splits = split(made_up(400), calibrate=512, verify=1000, seed=0)
    assert {name: len(images) for name, images in splits.items()} == {
        "verify": 100,
        "select": 50,
        "calibrate": 240,
        "spare": 10,
    }


def test_limits_leave_images_unused():
    splits = split(made_up(4000), calibrate=64, verify=40, seed=0)
    assert [len(splits[name]) for name in ("calibrate", "select", "verify")] == [64, MAX_SELECT, 40]


def test_the_minimum_is_enough_and_gives_every_set_its_own():
    splits = split(made_up(MIN_CALIBRATE + MIN_SELECT + MIN_VERIFY), calibrate=512, verify=300, seed=3)
    assert [len(splits[name]) for name in ("calibrate", "select", "verify")] == [16, 8, 32]


@pytest.mark.parametrize(("with_verify", "needed"), [(True, 56), (False, 24)])
def test_too_few_images_are_refused_with_counts(with_verify, needed):
    with pytest.raises(BadInputError) as caught:
        split(made_up(needed - 1), calibrate=512, verify=300, seed=0, with_verify=with_verify)
    assert f"photos: {needed - 1} different images, at least {needed} are needed" in caught.value.message
    assert "16 to calibrate, 8 to select" in caught.value.message
    assert ("--verify DIR" in caught.value.hint) == with_verify
    split(made_up(needed), calibrate=512, verify=300, seed=0, with_verify=with_verify)


def test_the_split_does_not_depend_on_names_or_location(tmp_path):
    first = draw_folder(tmp_path / "first", 60)
    second = tmp_path / "moved" / "second"
    for index, path in enumerate(sorted(first.iterdir())):
        target = second / f"class-{index % 7}" / f"{(index * 37) % 60}-renamed.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    options = {"calibrate": 512, "verify": 300, "seed": 5}
    splits = [split(scan(root, option="--calib"), **options) for root in (first, second, first)]
    hashes = [{name: [i.sha256 for i in images] for name, images in s.items()} for s in splits]
    assert hashes[0] == hashes[1] == hashes[2]
    assert [i.name for i in splits[0]["verify"]] != [i.name for i in splits[1]["verify"]]


def test_another_seed_gives_another_split():
    one, other = (split(made_up(200), calibrate=512, verify=300, seed=seed) for seed in (0, 1))
    assert set(one["verify"]) != set(other["verify"])
    assert set(one["calibrate"]) != set(other["calibrate"])


def test_more_images_do_not_reorder_those_that_were_there():
    few, many = made_up(50).images, made_up(90).images
    kept = [image for image in shuffled(many, 7) if image in set(few)]
    assert kept == shuffled(few, 7)
    assert kept != list(few)


def test_overlap_pairs_the_names_of_equal_bytes(tmp_path):
    draw_folder(tmp_path / "a", 5)
    draw(tmp_path / "b" / "new.png", 100)
    shutil.copy(tmp_path / "a" / "003.png", tmp_path / "b" / "leaked.png")
    shutil.copy(tmp_path / "a" / "001.png", tmp_path / "b" / "also.png")
    first, second = (scan(tmp_path / name, option="--calib").images for name in "ab")
    assert overlap(first, second) == [("001.png", "also.png"), ("003.png", "leaked.png")]
    assert overlap(first, [image for image in second if image.name == "new.png"]) == []
    assert overlap([], second) == []


def test_splits_of_one_folder_do_not_overlap():
    splits = split(made_up(300), calibrate=512, verify=300, seed=0)
    assert overlap(splits["calibrate"], splits["verify"]) == []
    assert overlap(splits["select"], splits["verify"]) == []
    assert overlap(splits["calibrate"], splits["select"]) == []


# --- ImageStream


@pytest.fixture
def files(tmp_path) -> tuple[ImageFile, ...]:
    """23 images, each of another size, in no order of names."""
    for index in range(23):
        draw(tmp_path / f"{index:03}.png", index, size=(9 + index, 40 - index))
    return tuple(shuffled(scan(tmp_path, option="--calib").images, 0))


def scanned_again(files) -> list[ImageFile]:
    """The files with the hashes of their bytes now."""
    return [replace(file, sha256=hashlib.sha256(file.path.read_bytes()).hexdigest()) for file in files]


def stream_of(files, batch_size: int) -> ImageStream:
    return ImageStream(scanned_again(files), PREPROCESS, batch_size, files[0].path.parent)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 22, 23, 24, 500])
def test_batches_hold_all_images_in_the_order_given(files, batch_size):
    stream = stream_of(files, batch_size)
    batches = list(stream)
    expected = np.stack([read_pixels(f.path.read_bytes(), PREPROCESS)[0] for f in files])
    whole, rest = divmod(23, batch_size)
    assert [len(batch) for batch in batches] == [batch_size] * whole + [rest] * bool(rest)
    assert all(batch.dtype == np.uint8 and batch.shape[1:] == (8, 10, 3) for batch in batches)
    assert np.array_equal(np.concatenate(batches), expected)
    assert stream.images == list(files)
    assert stream.unreadable == []


def test_images_lists_what_was_yielded_so_far(files):
    stream = stream_of(files, 5)
    for count, _ in enumerate(stream, start=1):
        assert stream.images == list(files[: 5 * count])


def truncate(file: ImageFile) -> None:
    """Cut the file: its header stays right, its pixels do not."""
    data = file.path.read_bytes()
    file.path.write_bytes(data[: len(data) // 2])


def test_an_unreadable_image_is_named_and_the_batches_stay_full(files):
    truncate(files[3])
    truncate(files[9])
    stream = stream_of(files, 7)
    assert [len(batch) for batch in stream] == [7, 7, 7]
    assert [u.name for u in stream.unreadable] == [files[3].name, files[9].name]
    assert "truncated" in stream.unreadable[0].reason
    assert stream.images == [f for index, f in enumerate(files) if index not in (3, 9)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda path: path.unlink(), "can no longer be read: No such file or directory"),
        (lambda path: draw(path, 99), "has changed while it was used"),
    ],
)
def test_an_image_that_changes_after_the_scan_is_an_error(files, change, says):
    """Results are cached under the hashes of the scan: what others give must not be kept for them."""
    stream = stream_of(files, 7)
    change(files[9].path)
    with pytest.raises(BadInputError) as caught:
        list(stream)
    assert caught.value.message == f"{files[9].path}: {says}"
    assert "run the command again" in caught.value.hint


def test_too_many_unreadable_images_are_refused_by_name(files):
    for index in (2, 10, 20):
        truncate(files[index])
    stream = stream_of(files, 4)
    with pytest.raises(BadInputError) as caught:
        list(stream)
    assert "3 of 21 image files cannot be read" in caught.value.message, "of those that were read"
    assert all(files[index].name in caught.value.message for index in (2, 10, 20))
    assert str(files[0].path.parent) in caught.value.message
    assert stream.images == [f for index, f in enumerate(files[:20]) if index not in (2, 10)]


def test_a_stream_of_only_unreadable_images_is_refused_at_once(files):
    for file in files:
        file.path.write_bytes(b"")
    with pytest.raises(BadInputError, match="cannot be read"):
        next(iter(stream_of(files, 4)))


def test_a_stream_can_be_iterated_again(files):
    truncate(files[0])
    stream = stream_of(files, 6)
    first = list(stream)
    images, unreadable = list(stream.images), list(stream.unreadable)
    next(iter(stream))  # given up after a batch
    second = list(stream)
    assert np.array_equal(np.concatenate(first), np.concatenate(second))
    assert (stream.images, stream.unreadable) == (images, unreadable)
    assert len(unreadable) == 1


def test_a_stream_of_nothing_has_no_batches(tmp_path):
    assert list(ImageStream([], PREPROCESS, 4, tmp_path)) == []


@pytest.mark.parametrize("batch_size", [3, 23, 64])
def test_all_images_at_once_are_those_of_the_batches(files, batch_size):
    truncate(files[5])
    stream = stream_of(files, batch_size)
    everything = stream.all()
    assert np.array_equal(everything, np.concatenate(list(stream_of(files, 4))))
    assert everything.shape == (22, 8, 10, 3)
    assert len(stream.images) == 22
    assert [u.name for u in stream.unreadable] == [files[5].name]


def test_all_images_of_nothing_are_an_error(tmp_path):
    with pytest.raises(BadInputError, match="no image could be decoded") as caught:
        ImageStream([], PREPROCESS, 4, tmp_path).all()
    assert str(tmp_path) in caught.value.message


class Counted(tuple):
    """Files that count how many of them were handed out to be decoded."""

    drawn = 0

    def __iter__(self):
        for item in super().__iter__():
            self.drawn += 1
            yield item


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_no_more_than_three_batches_are_decoded_ahead(files, batch_size):
    counted = Counted(files)
    used, ahead = 0, []
    for batch in ImageStream(counted, PREPROCESS, batch_size, files[0].path.parent):
        ahead.append(counted.drawn - used)
        used += len(batch)
    assert used == counted.drawn == 23
    assert max(ahead) <= 3 * batch_size
    assert max(ahead) > batch_size, "nothing is decoded while the caller computes"


def test_unreadable_images_do_not_widen_the_window(files):
    truncate(files[0])
    truncate(files[1])
    counted = Counted(scanned_again(files))
    next(iter(ImageStream(counted, PREPROCESS, 4, files[0].path.parent)))
    assert counted.drawn <= 2 + 3 * 4


def test_giving_up_a_stream_draws_no_more_images_and_ends_its_threads(files):
    counted, threads = Counted(files), set(threading.enumerate())
    batches = iter(ImageStream(counted, PREPROCESS, 2, files[0].path.parent))
    next(batches)
    assert set(threading.enumerate()) - threads
    batches.close()
    assert counted.drawn <= 6
    assert not set(threading.enumerate()) - threads


class Watched(ImageStream):
    """A stream that knows which of its decoded images are still in memory."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.alive: list[weakref.ref] = []
        self.loaded = threading.Condition()

    def _load(self, file):
        pixels = super()._load(file)
        with self.loaded:
            self.alive.append(weakref.ref(pixels))
            self.loaded.notify_all()
        return pixels


def test_no_more_than_three_batches_are_in_memory_while_the_caller_computes(files):
    counted = Counted(files)
    stream = Watched(counted, PREPROCESS, 4, files[0].path.parent)
    most = 0
    for batch in stream:
        with stream.loaded:
            assert stream.loaded.wait_for(lambda: len(stream.alive) == counted.drawn, timeout=60)
        most = max(most, len(batch) + sum(image() is not None for image in stream.alive))
    assert most <= 3 * 4 + 1


def test_images_of_batches_that_were_used_are_freed(files):
    stream = Watched(files, PREPROCESS, 2, files[0].path.parent)
    for _ in stream:
        assert sum(image() is not None for image in stream.alive) <= 4 * 2
    assert len(stream.alive) == 23


# --- synthetic images


def test_synthetic_images_are_those_of_their_seed():
    first, again, other = (synthetic_images(6, PREPROCESS.at_size(32, 40), seed) for seed in (1, 1, 2))
    assert first.shape == (6, 32, 40, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.array_equal(synthetic_images(3, PREPROCESS.at_size(32, 40), 1), first[:3])


@pytest.mark.parametrize("size", [(32, 32), (31, 47), (64, 9), (2, 2)])
def test_synthetic_images_differ_in_pixels_colour_and_contrast(size):
    images = synthetic_images(8, PREPROCESS.at_size(*size), seed=0).astype(float)
    assert images.shape == (8, *size, 3)
    assert len({image.tobytes() for image in images}) == 8
    means, contrasts = images.mean(axis=(1, 2)), images.std(axis=(1, 2, 3))
    assert np.ptp(means, axis=0).min() > 20, "the images have one colour"
    assert contrasts.min() > 5, "an image is flat"
    assert contrasts.max() > 1.3 * contrasts.min()


def test_synthetic_images_have_the_spectrum_of_photographs_and_not_of_noise():
    gray = synthetic_images(16, PREPROCESS.at_size(64, 64), seed=0).mean(axis=-1)
    power = (np.abs(np.fft.fft2(gray - gray.mean(axis=(1, 2), keepdims=True))) ** 2).mean(axis=0)
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(64), np.fft.fftfreq(64)))
    low = power[(radius > 0) & (radius < 0.06)].mean()
    high = power[(radius > 0.24) & (radius < 0.5)].mean()
    assert low > 10 * high


# --- labels from folders


def labelled(*folders: str | None) -> list[ImageFile]:
    names = [f"{folder}/{i}.png" if folder is not None else f"{i}.png" for i, folder in enumerate(folders)]
    return [
        ImageFile(Path("x.png"), name, str(i), folder)
        for i, (name, folder) in enumerate(zip(names, folders, strict=True))
    ]


def test_folders_named_by_class_are_labelled_by_name():
    images = labelled("dog", "cat", "dog")
    labels = folder_labels(images, ["ant", "cat", "dog"], 3)
    assert labels.of(images) == [2, 1, 2]
    assert "by name" in labels.explanation


def test_names_win_over_the_sorted_order():
    images = labelled("automobile", "airplane", "zebra")
    labels = folder_labels(images, ["zebra", "automobile", "airplane"], 3)
    assert labels.by_folder == {"zebra": 0, "automobile": 1, "airplane": 2}


def test_as_many_folders_as_classes_are_labelled_in_sorted_order():
    images = labelled("n01484850", "n01440764", "n01443537", "n01440764")
    labels = folder_labels(images, ["tench", "goldfish", "shark"], 3)
    assert labels.of(images) == [2, 0, 1, 0]
    assert "sorted" in labels.explanation


@pytest.mark.parametrize(
    ("folders", "categories", "labels", "explanation", "warning"),
    [
        # Splits are no classes, whatever their number.
        (("train/dog", "val/cat"), ["cat", "dog"], [1, 0], "by name below train, val", ""),
        (
            ("Train/dog", "TEST/cat", "train/cat"),
            [],
            [1, 0, 0],
            "2 class folders, sorted below TEST, Train",
            "",
        ),
        (("data/train/dog", "data/val/cat"), ["cat", "dog"], [1, 0], "by name", ""),
        (("train/a", "val/b"), ["cat", "dog"], None, "a, b are not among cat, dog", ""),
        # ... unless the network has such a class.
        (("train/1", "car/2"), ["car", "train"], [1, 0], "by name", ""),
        # A folder around all others.
        (("images/dog/1", "images/cat/2"), ["cat", "dog"], [1, 0], "by name below images", ""),
        # Case, separators and plurals.
        (("Cats", "Dogs"), ["dog", "cat"], [1, 0], "by similar name", "Cats = cat, Dogs = dog"),
        (
            ("train/Pick-Up_trucks",),
            ["pick up truck", "car"],
            [0],
            "by similar name",
            "Pick-Up_trucks = pick up truck",
        ),
        (("Foxes", "berries"), ["berry", "fox"], [1, 0], "by similar name", "Foxes = fox"),
        (("cat", "Cats"), ["cat", "dog"], None, "Cats is not among", ""),
        (("Cat", "dog"), ["cat", "CAT", "dog"], None, "Cat is not among", ""),
        # Known names and as many folders of other names: their order says nothing.
        (("Katze", "Hund"), ["dog", "cat"], None, "Hund, Katze are not among dog, cat", ""),
    ],
)
def test_known_names_decide_and_splits_are_no_classes(folders, categories, labels, explanation, warning):
    images = labelled(*folders)
    found = folder_labels(images, categories, len(categories) or 2)
    assert found.of(images) == labels
    assert explanation in found.explanation
    assert warning in found.warning
    assert bool(warning) == bool(found.warning)


def test_folders_named_by_number_are_class_indices():
    images = labelled("7", "0", "003")
    labels = folder_labels(images, [], 10)
    assert labels.of(images) == [7, 0, 3]
    assert "by index" in labels.explanation


def test_numbered_folders_whose_order_is_ambiguous_are_no_labels():
    ambiguous = folder_labels(labelled(*map(str, range(12))), [], 12)
    assert ambiguous.by_folder == {}
    assert "02" in ambiguous.explanation
    padded = folder_labels(labelled(*(f"{index:02}" for index in range(12))), [], 12)
    assert padded.by_folder["10"] == 10


@pytest.mark.parametrize(
    ("folders", "explanation"),
    [
        ((None, None), "no class folders"),
        (("cat", None), "outside of the class folders"),
        (("2024", "2025"), "2 folders do not name the network's 4 classes"),
        (("cat", "holiday"), "2 folders do not name"),
        (("1", "4"), "do not name"),
        (("-1",), "do not name"),
        (("crane",), "do not name"),
    ],
)
def test_folders_that_are_no_labels_are_explained(folders, explanation):
    images = labelled(*folders)
    labels = folder_labels(images, ["cat", "dog", "crane", "crane"], 4)
    assert labels.of(images) is None
    assert explanation in labels.explanation


def test_an_image_of_an_unknown_folder_leaves_no_labels():
    labels = folder_labels(labelled("cat", "dog"), ["cat", "dog", "eel"], 3)
    assert labels.of(labelled("cat", "dog")) == [0, 1]
    assert labels.of(labelled("cat", "fox")) is None
    assert labels.of(labelled("cat", None)) is None


def test_labels_of_a_scanned_folder_follow_its_images(tmp_path):
    for seed, name in enumerate(["dog/1.png", "cat/deep/2.png", "cat/3.png"]):
        draw(tmp_path / name, seed)
    found = scan(tmp_path, option="--verify").images
    labels = folder_labels(found, ["cat", "dog"], 2)
    assert Counter(labels.of(found)) == {0: 2, 1: 1}
    assert dict(zip(names(found), labels.of(found), strict=True))["cat/deep/2.png"] == 0
