"""`export-zoo calibrate`: ranges alone, in shards that merge to the same bytes, and their reuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.options import TUNED_LITTLE, UNTUNED

from export_zoo.calibration.images import scan, split
from export_zoo.calibration.ranges import Ranges


@pytest.fixture
def arguments(digits) -> list:
    return [*digits.arguments(), "--calib", digits.images]


def calibrated(cli, arguments, out: Path, *more) -> Path:
    done = cli("calibrate", *arguments, *more, "--out", out)
    assert done.code == 0, done.err
    return out


def test_ranges_are_reused_for_the_same_engine(cli, arguments, tmp_path):
    path = calibrated(cli, arguments, tmp_path / "digits.json")
    export = [*arguments, "--precision", "int8", *TUNED_LITTLE]
    plain = cli(*export, "--out", tmp_path / "plain")
    reused = cli(*export, "--ranges", path, "--out", tmp_path / "reused")
    assert (plain.code, reused.code) == (0, 0), reused.err
    assert f"--ranges {path}: 32 tensors over 512 images" in reused.err
    first, second = (done.json["engines"][0]["file"]["sha256"] for done in (plain, reused))
    assert first == second
    assert plain.json["recipe"]["calibration"] == reused.json["recipe"]["calibration"]


def test_shards_merge_to_the_bytes_of_the_whole(cli, arguments, tmp_path):
    whole = calibrated(cli, arguments, tmp_path / "whole.json")
    shards = [calibrated(cli, arguments, tmp_path / f"{i}.json", "--shard", f"{i}/3") for i in (1, 2, 3)]
    counts = [len(Ranges.read(path).image_sha256) for path in shards]
    assert sum(counts) == 512
    assert max(counts) - min(counts) <= 1
    done = cli("calibrate", "--merge", *reversed(shards), "--out", tmp_path / "merged.json")
    assert done.code == 0, done.err
    assert "512 images" in done.out
    assert (tmp_path / "merged.json").read_bytes() == whole.read_bytes()


def test_without_calib_ranges_are_enough_to_build_and_verify_elsewhere(cli, digits, arguments, tmp_path):
    path = calibrated(cli, arguments, tmp_path / "digits.json")
    used = set(Ranges.read(path).image_sha256)
    for image in scan(digits.images, option="--calib").images:
        if image.sha256 not in used:
            (tmp_path / "verify" / str(image.folder)).mkdir(parents=True, exist_ok=True)
            shutil.copy(image.path, tmp_path / "verify" / str(image.folder))
    export = [*digits.arguments(), "--precision", "int8", "--ranges", path]
    done = cli(*export, "--verify", tmp_path / "verify", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert done.json["engines"][0]["state"] == "verified"
    assert done.json["engines"][0]["tuning"] is None
    assert done.json["recipe"]["calibration"]["method"] == "minmax"
    assert any("no images to select on" in warning for warning in done.json["warnings"])
    chosen = cli(
        *export,
        "--verify",
        tmp_path / "verify",
        "--out",
        tmp_path / "o",
        "--method",
        "mse",
        "--steps",
        "none",
    )
    assert chosen.json["recipe"]["calibration"]["method"] == "mse"
    assert not any("select on" in warning for warning in chosen.json["warnings"])
    assert not done.json["recipe"]["calibration"]["synthetic"]
    assert done.json["recipe"]["calibration"]["images"] == 512
    overlapping = cli(*export, "--verify", digits.images, "--verify-images", "800", "--out", tmp_path / "bad")
    assert overlapping.code == 3, "images that were calibrated on prove nothing"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--seed", "1"], "images are not in the calibration set (--calib"),
        (["--calib-images", "100"], "images are not in the calibration set (--calib"),
        (["--input-size", "64"], "another graph"),
        (["--resize-size", "40"], "another preprocessing"),
    ],
)
def test_ranges_of_something_else_are_refused(cli, digits, tmp_path, change, says):
    arguments = [*digits.arguments("squeezenet1_1"), "--calib", digits.images]
    path = calibrated(cli, arguments, tmp_path / "digits.json")
    export = [*arguments, "--precision", "int8", "--ranges", path, "--out", tmp_path / "out"]
    done = cli(*export, *change)
    assert done.code == 5, done.err
    assert says in done.json["error"]["message"]
    assert str(path) in done.json["error"]["message"]
    assert not (tmp_path / "out").exists()


def test_a_shard_alone_is_warned_of_and_one_of_too_few_images_refused(cli, arguments, tmp_path):
    quarter = calibrated(cli, arguments, tmp_path / "1.json", "--shard", "1/4")
    export = [*arguments, "--precision", "int8", *UNTUNED]
    done = cli(*export, "--ranges", quarter, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert any("128 of the 512 calibration images" in warning for warning in done.json["warnings"])
    few = calibrated(cli, arguments, tmp_path / "few.json", "--shard", "1/50")
    refused = cli(*export, "--ranges", few, "--out", tmp_path / "few")
    assert refused.code == 5
    assert "at least 16" in refused.json["error"]["message"]
    assert "--merge" in refused.json["error"]["hint"]
    again = cli("calibrate", *arguments, "--shard", "1/50", "--out", tmp_path / "again.json")
    assert not any("images only" in warning for warning in again.json["warnings"])
    other = calibrated(cli, arguments, tmp_path / "other.json", "--shard", "2/50")
    merged = cli("calibrate", "--merge", few, other, "--out", tmp_path / "merged.json")
    assert any("22 images only" in warning for warning in merged.json["warnings"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(image_sha256=[]), "no images"),
        (lambda d: d["image_sha256"].append(d["image_sha256"][0]), "one of them twice"),
        (lambda d: d["tensors"].pop("relu"), "no range of tensor 'relu'"),
        (lambda d: d["tensors"]["relu"].update(histogram=""), "no histogram of tensor 'relu'"),
        (lambda d: d["tensors"]["relu"].update(histogram="!"), "tensors.relu"),
        (lambda d: d["tensors"]["relu"].update(min=1e9), "tensors.relu"),
        (lambda d: d.pop("versions"), "versions: Field required"),
    ],
)
def test_a_file_edited_by_hand_is_refused_by_name(cli, arguments, tmp_path, change, says):
    path = calibrated(cli, arguments, tmp_path / "r.json")
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    done = cli(*arguments, "--precision", "int8", "--ranges", path, "--out", tmp_path / "out")
    assert done.code == 5, done.err
    assert str(path) in done.json["error"]["message"]
    assert says in done.json["error"]["message"]
    assert "pydantic" not in done.err


def test_a_file_that_is_none_is_refused_before_any_work(cli, arguments, tmp_path):
    (tmp_path / "no.json").write_text("{}")
    for name in ("no.json", "absent.json"):
        done = cli(*arguments, "--precision", "int8", "--ranges", tmp_path / name, "--out", tmp_path / "out")
        assert done.code == 5
        assert name in done.json["error"]["message"]
        assert done.json["stages"] == []


def test_the_same_preprocessing_under_another_name_belongs(cli, arguments, tmp_path):
    """`source` is for people: of a file with another name, say."""
    parts = [calibrated(cli, arguments, tmp_path / f"{i}.json", "--shard", f"{i}/2") for i in (1, 2)]
    document = json.loads(parts[1].read_text())
    document["preprocess"]["source"] = "p.yaml"
    parts[1].write_text(json.dumps(document))
    done = cli("calibrate", "--merge", *reversed(parts), "--out", tmp_path / "merged.json")
    assert done.code == 0, done.err
    export = [*arguments, "--precision", "int8", *UNTUNED]
    done = cli(*export, "--ranges", tmp_path / "merged.json", "--out", tmp_path / "out")
    assert done.code == 0, done.err


def test_shards_that_do_not_belong_together_are_refused(cli, arguments, tmp_path):
    first = calibrated(cli, arguments, tmp_path / "1.json", "--shard", "1/2")
    done = cli("calibrate", "--merge", first, first, "--out", tmp_path / "merged.json")
    assert done.code == 5
    assert "images are in both" in done.json["error"]["message"]
    assert not (tmp_path / "merged.json").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["calibrate", "resnet18"], "--calib"),
        (["calibrate", "--calib", "."], "one MODEL"),
        (["calibrate", "resnet18", "--calib", ".", "--shard", "3/2"], "--shard 3/2"),
        (["calibrate", "resnet18", "--calib", ".", "--shard", "half"], "--shard half"),
        (["calibrate", "--merge", "a.json", "--out", "b.json"], "two ranges files"),
        (["calibrate", "--merge", "a.json", "b.json"], "--out"),
        (["calibrate", "--merge", "a.json", "b.json", "--out", "."], "--out ."),
        (
            ["calibrate", "--merge", "a.json", "b.json", "--out", "c.json", "--keep-float", "x"],
            "--keep-float",
        ),
        (["calibrate", "--merge", "a.json", "b.json", "--out", "c.json", "--shard", "1/2"], "--shard"),
        (["resnet18", "--weights", "none", "--ranges", "a.json"], "--ranges"),
    ],
)
def test_wrong_uses_are_usage_errors(cli, given, says):
    done = cli(*given)
    assert done.code == 2
    assert says in done.json["error"]["message"]


def test_more_shards_than_images_are_refused(cli, arguments, tmp_path):
    done = cli("calibrate", *arguments, "--shard", "600/600", "--out", tmp_path / "r.json")
    assert done.code == 2
    assert "only 512 images" in done.json["error"]["message"]


def test_keeping_all_in_float_leaves_nothing_to_calibrate(cli, arguments, tmp_path):
    done = cli("calibrate", *arguments, "--keep-float", "*", "--out", tmp_path / "r.json")
    assert done.code == 2
    assert "leaves nothing to quantize" in done.json["error"]["message"]
    assert not (tmp_path / "r.json").exists()


def test_out_that_cannot_be_written_is_told_before_any_work(cli, arguments, tmp_path):
    for out in (tmp_path, tmp_path / "absent" / "r.json"):
        done = cli("calibrate", *arguments, "--out", out)
        assert done.code == 2
        assert str(out) in done.json["error"]["message"]
        assert done.json["stages"] == []


def test_a_dead_layer_is_warned_of_until_it_is_kept_float(cli, digits, arguments, tmp_path):
    state = load_file(digits.weights["resnet18"])
    state["layer1.0.bn1.weight"][:], state["layer1.0.bn1.bias"][:] = 0, -1
    save_file(state, tmp_path / "dead.safetensors")
    given = [*arguments, "--weights", tmp_path / "dead.safetensors"]
    lenient = ["--precision", "int8", "--tolerance", "accuracy_drop=1", *UNTUNED]
    for command in (["calibrate", *given], [*given, *lenient]):
        warned = cli(*command, "--out", tmp_path / f"warned {command[0]}")
        assert warned.code == 0, warned.json["error"]
        (told,) = (text for text in warned.json["warnings"] if "are 0 on all calibration images" in text)
        assert "the first at layer1.0.relu: INT8 gives them a scale of 1" in told
        assert told.endswith("--keep-float layer1.0")
    assert [engine["state"] for engine in warned.json["engines"]] == ["verified"]
    kept = ["--keep-float", "layer1.0"]
    path = calibrated(cli, given, tmp_path / "r.json", *kept)
    export = [*given, "--precision", "int8", "--tolerance", "accuracy_drop=1", *kept]
    done = cli(*export, *UNTUNED, "--out", tmp_path / "kept")
    assert done.code == 0, done.err
    reused = cli(*export, *UNTUNED, "--ranges", path, "--out", tmp_path / "reused")
    assert reused.json["engines"][0]["file"]["sha256"] == done.json["engines"][0]["file"]["sha256"]
    other = cli(
        *export[:-2], "--steps", "none", "--method", "mse", "--ranges", path, "--out", tmp_path / "other"
    )
    assert other.code == 5
    assert "the same --keep-float" in other.json["error"]["hint"]


def test_the_document_tells_what_was_written(cli, arguments, tmp_path):
    path = tmp_path / "digits.json"
    done = cli("calibrate", *arguments, "--out", path)
    assert (done.json["ranges"], done.json["images"], done.json["tensors"]) == (str(path), 512, 32)
    assert json.loads(path.read_text())["schema_version"] == 1


def test_shards_on_one_machine_give_the_bytes_of_the_whole(cli, arguments, tmp_path):
    whole = calibrated(cli, arguments, tmp_path / "whole.json")
    done = cli("calibrate", *arguments, "--shards", "7", "--out", tmp_path / "shards.json")
    assert done.code == 0, done.err
    assert "512 images in 7 shards" in done.err
    assert (tmp_path / "shards.json").read_bytes() == whole.read_bytes()


def test_unreadable_images_count_among_all_shards(cli, digits, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index, image in enumerate(scan(digits.images, option="--calib").images[:110]):
        data = image.path.read_bytes()
        (folder / f"{index}.png").write_bytes(data[: len(data) // 2] if index < 5 else data)
    used = split(scan(folder, option="--calib"), calibrate=512, verify=32, seed=0)["calibrate"]
    arguments = [*digits.arguments(), "--calib", folder]
    told = {}
    shards = str(len(used))  # one that cannot be read is a shard
    for count in ("1", shards):
        done = cli("calibrate", *arguments, "--shards", count, "--out", tmp_path / f"{count}.json")
        assert done.code == 0, done.err
        told[count] = done.json["warnings"]
    assert (tmp_path / f"{shards}.json").read_bytes() == (tmp_path / "1.json").read_bytes()
    assert told[shards] == told["1"]
    assert any("cannot be read" in text for text in told["1"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--shards", "0"], "--shards 0: not a number of shards"),
        (["--shards", "600"], "--shards 600: there are only 512 images"),
        (["--shard", "1/2", "--shards", "2"], "--shard excludes --shards and --on"),
        (["--shard", "1/2", "--on", "ray"], "--shard excludes --shards and --on"),
        (["--on", "slurm"], "--on slurm: unknown"),
    ],
)
def test_wrong_shards_are_refused(cli, arguments, tmp_path, change, says):
    done = cli("calibrate", *arguments, *change, "--out", tmp_path / "x.json")
    assert done.code == 2, done.err
    assert says in done.json["error"]["message"]
