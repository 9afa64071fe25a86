"""Engines are compared on more verify images than a bundle has: the same figures, in shards and constant memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.options import UNTUNED

from export_zoo.calibration.images import scan, shuffled
from export_zoo.engines.bundle.reader import read_manifest
from export_zoo.engines.verification import verify
from export_zoo.exporter.stages import evaluate, network


@pytest.fixture(scope="module")
def folders(digits, tmp_path_factory) -> tuple[Path, Path]:
    """80 images to calibrate on, and 640 others to verify on, of which one cannot be read; with class folders."""
    root = tmp_path_factory.mktemp("many")
    for index, image in enumerate(scan(digits.images, option="--calib").images[:720]):
        folder = root / ("calib" if index % 9 == 0 else "verify") / str(image.folder)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(image.path, folder)
    damaged = sorted((root / "verify").rglob("*.png"))[7]
    damaged.write_bytes(damaged.read_bytes()[:200])
    return root / "calib", root / "verify"


def arguments(digits, folders, *more) -> list:
    calib, verify = folders
    given = [
        *digits.arguments("squeezenet1_1"),
        "--calib",
        calib,
        "--verify",
        verify,
        "--verify-images",
        "600",
    ]
    return [*given, "--precision", "fp32", "--precision", "int8", *UNTUNED, *more]


def test_figures_over_all_images_are_those_of_one_comparison(
    cli, digits, folders, own_cache, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluate, "SHARD", 100)
    many = cli(*arguments(digits, folders, "--out", tmp_path / "many"))
    assert many.code == 0, many.err
    assert any(f"2 engine(s) on {count} images in 6 shard(s)" in many.err for count in (599, 600))
    for module in (evaluate, network):
        monkeypatch.setattr(module, "MAX_HELD_OUT", 10_000)
    one = cli(*arguments(digits, folders, "--out", tmp_path / "one"))
    assert one.code == 0, one.err
    for found, wanted in zip(many.json["engines"], one.json["engines"], strict=True):
        figures, others = found["gate"]["metrics"], wanted["gate"]["metrics"]
        assert figures["images"] in (others["images"], others["images"] - 1), (
            "a spare replaces one that is damaged"
        )
        assert figures["accuracy"] == pytest.approx(others["accuracy"], abs=2e-3)
        assert figures["sqnr"] == pytest.approx(others["sqnr"], abs=0.1)
        assert figures["top1"] == pytest.approx(others["top1"], abs=2e-3)
        assert figures["misplaced"] == others["misplaced"] == 0
    manifest = read_manifest(tmp_path / "many")
    assert manifest.artifacts.held_out.count == 512
    gate, head = manifest.artifacts.engines[1].gate, manifest.recipe.output.head
    limits = [verify._tolerances(gate, head, images) for images in (512, 600)]
    assert ["accuracy_drop" in found for found in limits] == [False, True], "512 images need not meet it"
    again = cli("verify", tmp_path / "many", "--no-latency")
    assert again.code == 0, again.err


def test_a_limit_holds_over_all_images(cli, digits, folders, own_cache, tmp_path):
    calib, verify = folders
    wrong = shutil.copytree(verify, tmp_path / "wrong")
    folders_there = sorted(wrong.iterdir())
    for image in shuffled(scan(wrong, option="--verify").images, 0)[512:]:  # no bundle has these
        other = (folders_there.index(image.path.parent) + 1) % len(folders_there)
        image.path.rename(folders_there[other] / f"moved-{image.path.name}")
    codes = {}  # of folders whose further images have right and wrong labels
    for folder in (verify, wrong):
        given = arguments(
            digits, (calib, folder), "--tolerance", "fp32:accuracy=0.88", "--out", tmp_path / "x"
        )
        done = cli(*given)
        codes[folder.name] = (done.code, done.json.get("error"))
    assert codes["verify"] == (0, None)
    code, error = codes["wrong"]
    assert code == 3
    assert "onnxruntime-fp32: batch 8: accuracy is 0.8" in error["message"]


def test_finished_shards_are_not_repeated(cli, digits, folders, own_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "SHARD", 200)
    real, ran = evaluate._evaluate, []

    def work(places, order, threads, progress):
        ran.append(len(order.files))
        if len(ran) == 2:
            raise KeyboardInterrupt
        return real(places, order, threads, progress)

    monkeypatch.setattr(evaluate, "_evaluate", work)
    assert cli(*arguments(digits, folders, "--out", tmp_path / "x")).code == 130
    assert cli(*arguments(digits, folders, "--out", tmp_path / "x")).code == 0
    assert ran == [200] * 4, "the first is cached"
