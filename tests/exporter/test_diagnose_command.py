"""`export-zoo diagnose`: its table, its JSON, and what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
from support.options import UNTUNED


def test_the_table_names_the_worst_layers_and_json_has_all(digits_bundle, cli):
    done = cli("diagnose", digits_bundle, "--images", "8")
    assert done.code == 0, done.err
    found = done.json["diagnosis"]
    assert (found["engine"], found["images"], len(found["layers"])) == ("onnxruntime-int8", 8, 21)
    modules = {layer["name"]: layer["module"] for layer in found["layers"]}
    worst = [modules[name] for name in found["worst"]]
    assert [line.split()[0] for line in done.out.splitlines()[1:11]] == worst[:10]
    assert f"--keep-float {worst[0]}" in done.out
    assert f"onnxruntime-int8: {found['sqnr']:.1f} dB on 8 images (limit 10)" in done.out
    assert cli("diagnose", digits_bundle, "--images", "8", "--quiet").out == ""


def test_a_failed_bundle_can_be_diagnosed(digits_bundle, cli, tmp_path):
    bundle = shutil.copytree(digits_bundle, tmp_path / "out.failed")
    document = json.loads((bundle / "manifest.json").read_text())
    document["status"] = "failed"
    (bundle / "manifest.json").write_text(json.dumps(document))
    assert cli("diagnose", bundle, "--images", "4").code == 0


def test_fewer_images_are_used_where_time_or_images_are_short(digits_bundle, cli):
    done = cli("diagnose", digits_bundle, "--seconds", "0")
    assert (done.code, done.json["diagnosis"]["images"]) == (0, 4)
    assert "warning: 4 images are used" in done.err
    held = json.loads((digits_bundle / "manifest.json").read_text())["artifacts"]["held_out"]["count"]
    done = cli("diagnose", digits_bundle, "--images", "5000", "--engine", "onnxruntime-int8")
    assert done.json["diagnosis"]["images"] == held
    assert f"warning: {held} images are used" in done.err


def test_random_weights_are_refused(digits_bundle, cli, tmp_path):
    bundle = shutil.copytree(digits_bundle, tmp_path / "bundle")
    document = json.loads((bundle / "manifest.json").read_text())
    document["recipe"]["source"]["weights"]["random"] = True
    (bundle / "manifest.json").write_text(json.dumps(document))
    done = cli("diagnose", bundle)
    assert done.code == 2
    assert "has random weights" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--engine", "onnxruntime-fp32"], 5, "rounds nothing"),
        (["--engine", "none"], 5, "no engine 'none'"),
        (["--images", "3"], 2, "3 is not in the range"),
    ],
)
def test_what_cannot_be_diagnosed_is_said(digits_bundle, cli, arguments, code, says):
    done = cli("diagnose", digits_bundle, *arguments)
    assert done.code == code
    assert says in done.err


def test_a_damaged_bundle_is_said(digits_bundle, cli, tmp_path):
    bundle = shutil.copytree(digits_bundle, tmp_path / "bundle")
    next((bundle / "files").glob("*int8*.onnx")).write_bytes(b"spoilt")
    done = cli("diagnose", bundle)
    assert done.code == 5
    assert "checksum mismatch" in done.err


def test_a_model_is_exported_first(digits, cli, tmp_path):
    arguments = [*digits.arguments(), "--calib", digits.images, "--precision", "int8", *UNTUNED]
    arguments += ["--tolerance", "sqnr=90", "--out", tmp_path / "out"]
    done = cli("diagnose", *arguments, "--images", "4")
    assert done.code == 0, done.err
    assert "parity gate failed" in done.err
    assert [stage["name"] for stage in done.json["stages"]].count("diagnose") == 1
    assert done.json["diagnosis"]["bundle"] == str(tmp_path / "out.failed")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["resnet18"], 5, "resnet18: there is no such bundle"),
        (["resnet18", "--precision", "fp32"], 2, "fp32: rounds nothing"),
        (
            ["resnet18", "--precision", "int8", "--weights", "none", "--calib", "{images}"],
            2,
            "random weights",
        ),
        (["{bundle}", "--precision", "int8"], 2, "--precision: no effect on"),
    ],
)
def test_a_model_needs_what_can_be_diagnosed(digits, digits_bundle, cli, arguments, code, says):
    places = {"images": digits.images, "bundle": digits_bundle}
    done = cli("diagnose", *(argument.format(**places) for argument in arguments))
    assert done.code == code
    assert says in done.err
