"""--aim: layers are left float until an accuracy is reached, the cheap ones first; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.options import UNTUNED

from export_zoo.base.errors import UsageError
from export_zoo.engines.bundle.manifest import Aim, AimStep
from export_zoo.engines.bundle.reader import read_manifest
from export_zoo.exporter import option_values
from export_zoo.exporter.options import ExportOptions
from export_zoo.exporter.stages.aim import _blocks


@pytest.fixture(scope="module")
def spoilt(digits, tmp_path_factory) -> Path:
    """Weights of resnet18 in which two convolutions have channels that differ by a factor of 2000.

    Two channels between layer2.0.conv1 and conv2, and one of layer4.1, are scaled up there and down again behind: the
    same function, whose 8 bits keep little of the other channels.
    """
    state = load_file(digits.weights["resnet18"])
    for block, channels in (("layer2.0", [0, 5]), ("layer4.1", [3])):
        for channel in channels:
            for name in (f"{block}.bn1.weight", f"{block}.bn1.bias"):
                state[name][channel] *= 2000
            state[f"{block}.conv2.weight"][:, channel] /= 2000
    path = tmp_path_factory.mktemp("spoilt") / "resnet18.safetensors"
    save_file(state, path)
    return path


@pytest.fixture
def arguments(digits, spoilt) -> list[str]:
    given = [
        "resnet18",
        "--weights",
        spoilt,
        "--num-classes",
        "10",
        "--input-size",
        "32",
        "--resize-size",
        "32",
    ]
    given += [
        "--calib",
        digits.images,
        "--verify-images",
        "224",
        "--precision",
        "int8",
        *UNTUNED,
        "--batch",
        "8",
    ]
    return [str(one) for one in given]


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt-rtx"])
def test_the_layers_that_spoil_the_engine_are_left_float(arguments, cli, tmp_path, target):
    missed = cli(*arguments, "--target", target, "--out", tmp_path / "missed")
    assert missed.json["engines"][0]["gate"]["eager_metrics"]["sqnr"] < 25
    done = cli(*arguments, "--target", target, "--aim", "sqnr=30", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    (engine,) = done.json["engines"]
    aim = engine["aim"]
    assert engine["gate"]["eager_metrics"]["sqnr"] >= 30
    assert aim["reached"]
    assert {"layer2.0.conv2", "layer4.1.conv2"} <= set(aim["modules"])
    assert len(aim["layers"]) <= 6, "of 21"
    assert aim["added_bytes"] > 0
    assert (aim["added_ms"] is not None) == (target != "tensorrt-rtx"), "timed where it runs"
    assert [step["layers"] for step in aim["tried"]] == sorted(step["layers"] for step in aim["tried"])
    assert "sqnr on the select images: " in done.out
    if target != "tensorrt-rtx":
        assert aim["ms"] > 0
        assert aim["fp32_ms"] > 0
    for module in aim["modules"]:
        assert f"--keep-float {module}" in done.err
    manifest = read_manifest(tmp_path / "out")
    assert {name.replace("[", "") for name in aim["layers"]} <= set(
        manifest.artifacts.engines[0].kept_float(manifest.recipe)
    )


def test_the_limits_of_the_gate_hold_with_the_aim(arguments, cli, tmp_path):
    """INT8 has this cosine without any layer in float, but not the SQNR that its gate asks for."""
    given = ["--aim", "cosine=0.5", "--target", "onnxruntime", "--out", tmp_path / "out"]
    free = ("--tolerance", "sqnr=-100", "--tolerance", "top1=0", "--tolerance", "accuracy_drop=1")
    alone = cli(*arguments, *given, *free)
    assert alone.json["engines"][0]["aim"]["layers"] == []
    done = cli(*arguments, *given, "--tolerance", "sqnr=25")
    assert done.code == 0, done.err
    (engine,) = done.json["engines"]
    assert engine["aim"]["layers"] != []
    assert engine["gate"]["eager_metrics"]["sqnr"] >= 25


def test_the_curve_has_what_no_cheaper_step_surpasses():
    steps = [
        AimStep(layers=n, added_ms=ms, value=v)
        for n, ms, v in ((0, 0, 20), (3, 2, 25), (4, 1, 30), (9, 3, 40))
    ]
    aim = Aim.model_construct(metric="sqnr", value=30, ms=5.0, fp32_ms=5.5, added_ms=1.0, tried=steps)
    assert [step.layers for step in aim.curve] == [0, 4, 9]
    assert [aim.ms_with(step) for step in aim.curve] == [5, 6, 8]
    assert aim.slower_than_fp32
    drop = aim.model_copy(update={"metric": "accuracy_drop", "fp32_ms": 7.0})
    assert [step.layers for step in drop.curve] == [0]
    assert not drop.slower_than_fp32


def test_blocks_are_the_deepest_modules_with_two_layers_each():
    modules = {name: name for name in ("stem", "a.0.conv1", "a.0.conv2", "a.1.conv1", "a.1.conv2", "fc")}
    assert _blocks(modules) == [["stem"], ["a.0.conv1", "a.0.conv2", "a.1.conv1", "a.1.conv2"], ["fc"]]
    more = {f"a.{i}.conv{j}": f"a.{i}.conv{j}" for i in range(3) for j in range(3)}
    assert _blocks(more) == [[f"a.{i}.conv{j}" for j in range(3)] for i in range(3)]


def test_modules_of_fp16_engines_are_left_float(digits, cli, tmp_path):
    arguments = [
        *digits.arguments(),
        "--calib",
        digits.images,
        "--precision",
        "fp16",
        "--target",
        "tensorrt-rtx",
    ]
    plain = cli(*arguments, "--out", tmp_path / "plain")
    before = plain.json["engines"][0]["gate"]["eager_metrics"]["sqnr"]
    done = cli(*arguments, "--aim", f"sqnr={before + 4:.1f}", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    (engine,) = done.json["engines"]
    assert engine["gate"]["eager_metrics"]["sqnr"] >= before + 4
    assert 0 < len(engine["aim"]["modules"]) < 60
    graph = onnx.load(tmp_path / "out" / engine["graph"]["path"]).graph
    nodes = {node.name: node for node in graph.node}
    halves = {v.name for v in graph.initializer if v.data_type == onnx.TensorProto.FLOAT16}
    for name in engine["aim"]["layers"]:
        assert not halves & set(nodes[name].input)
    kept = [word for module in engine["aim"]["modules"] for word in ("--keep-float-fp16", module)]
    assert " ".join(kept) in done.err
    again = cli(*arguments, *kept, "--out", tmp_path / "again")
    assert again.json["engines"][0]["graph"]["sha256"] == engine["graph"]["sha256"]
    assert again.json["recipe"]["keep_float_fp16"] == engine["aim"]["modules"]


def test_what_fp16_keeps_has_to_be_there(digits, cli, tmp_path):
    arguments = [*digits.arguments(), "--target", "tensorrt-rtx", "--out", tmp_path / "out"]
    done = cli(*arguments, "--precision", "fp16", "--keep-float-fp16", "layer9")
    assert done.code == 2
    assert "--keep-float-fp16 'layer9': no node and no module has this name" in done.err
    assert "such as conv1, " in done.err
    done = cli(*arguments, "--precision", "fp32", "--keep-float-fp16", "layer1")
    assert done.code == 0
    assert "--keep-float-fp16 has no effect without --precision fp16" in done.err


def test_an_aim_that_is_met_anyway_changes_nothing(digits, cli, tmp_path):
    arguments = [*digits.arguments(), "--calib", digits.images, "--precision", "int8", *UNTUNED]
    done = cli(*arguments, "--aim", "sqnr=15", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert done.json["engines"][0]["aim"]["layers"] == []
    plain = cli(*arguments, "--out", tmp_path / "plain")
    files = [found.json["engines"][0]["file"]["sha256"] for found in (done, plain)]
    assert files[0] == files[1]


def test_an_aim_that_cannot_be_reached_ends_with_3_and_the_nearest(digits, cli, tmp_path):
    arguments = [*digits.arguments(), "--calib", digits.images, "--precision", "int8", *UNTUNED]
    done = cli(*arguments, "--aim", "sqnr=100", "--out", tmp_path / "out")
    assert done.code == 3
    assert "--aim sqnr=100: not reached by onnxruntime-int8 on the select images; nearest: " in done.err
    assert "--aim sqnr=100: sqnr is " in done.err
    assert "then ask for less with --aim" in done.err
    manifest = json.loads((tmp_path / "out.failed" / "manifest.json").read_text())
    aim = manifest["artifacts"]["engines"][0]["aim"]
    assert not aim["reached"]
    assert len(aim["layers"]) == 20, "all but one"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--aim", "top1=0.999"], "select images cannot tell it from a perfect engine: 3000 are needed"),
        (["--aim", "nearest=0.9"], "outputs of classification have no nearest"),
        (["--aim", "top1=1"], "no number of images can show it"),
        (["--aim", "sqnr"], "is not METRIC=VALUE"),
        (["--aim", "sqnr="], "'' is not a finite number"),
        (["--aim", "speed=2"], "unknown metric 'speed'"),
        (["--aim", "top1=1.5"], "not between 0 and 1"),
        (["--aim", "sqnr=nan"], "not a finite number"),
        (["--aim", "sqnr=20", "--aim-seconds", "0"], "must be over 0"),
    ],
)
def test_an_aim_that_makes_no_sense_is_refused(digits, cli, given, says):
    done = cli(*digits.arguments(), "--calib", digits.images, "--precision", "int8", *given)
    assert done.code == 2
    assert says in done.err


def test_an_aim_needs_int8_images_and_trained_weights(digits, cli):
    with pytest.raises(UsageError, match="--aim has no effect on fp32"):
        ExportOptions("resnet18", precisions=("fp32",), aim="sqnr=30")
    with pytest.raises(UsageError, match="--aim needs images to choose layers on"):
        ExportOptions("resnet18", precisions=("int8",), ranges="ranges.json", aim="sqnr=30")
    done = cli(
        "resnet18", "--weights", "none", "--calib", digits.images, "--precision", "int8", "--aim", "sqnr=9"
    )
    assert done.code == 2
    assert "random weights have no accuracy" in done.err


def test_how_many_images_an_aim_needs():
    assert option_values.Aim.parse("top1=0.99").images == 300
    assert option_values.Aim.parse("accuracy_drop=0.005").images == 600
    assert option_values.Aim.parse("sqnr=30").images == 1


def test_the_spoilt_network_is_the_same_function(digits, spoilt):
    from torchvision.models import resnet18

    networks = []
    for path in (digits.weights["resnet18"], spoilt):
        network = resnet18(num_classes=10).eval()
        network.load_state_dict(load_file(path))
        networks.append(network)
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = (network(image) for network in networks)
    assert torch.allclose(first, second, rtol=1e-3, atol=1e-3)
