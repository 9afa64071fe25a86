"""The main job, end to end, on networks trained on digits; and the faults that the gate must catch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.options import PREPROCESS_FILE, TUNED_LITTLE, UNTUNED
from support.paths import ROOT

import export_zoo
from export_zoo.engines.targets.registry import TARGETS


def test_fp32_fp16_and_int8_are_verified_against_eager(digits, cli, tmp_path):
    out = tmp_path / "out"
    precisions = ["--precision", "fp32", "--precision", "fp16", "--precision", "int8"]
    done = cli(*digits.arguments(), *precisions, *digits.tuned_once(), "--out", out)
    assert done.code == 0, done.err
    found = {e["name"]: e for e in done.json["engines"]}
    assert list(found) == ["onnxruntime-fp32", "onnxruntime-fp16", "onnxruntime-int8"]
    assert all(e["state"] == "verified" for e in found.values())
    assert found["onnxruntime-fp32"]["gate"]["metrics"]["sqnr"] > 100
    assert found["onnxruntime-int8"]["gate"]["metrics"]["sqnr"] > 25
    assert found["onnxruntime-int8"]["gate"]["batches"] == [1, 8, 17, 32]
    assert (
        found["onnxruntime-int8"]["file"]["size_bytes"]
        < 0.3 * found["onnxruntime-fp32"]["file"]["size_bytes"]
    )


def test_second_run_is_cached_and_makes_the_same_graphs(digits, cli, tmp_path, monkeypatch):
    arguments = [*digits.arguments("squeezenet1_1"), "--precision", "int8", "--calib", digits.images]
    arguments += ["--calib-images", "64", *TUNED_LITTLE]
    first = cli(*arguments, "--out", tmp_path / "a")
    second = cli(*arguments, "--out", tmp_path / "b")
    fresh = cli(*arguments, "--out", tmp_path / "c", "--no-cache")
    assert (first.code, second.code, fresh.code) == (0, 0, 0)
    heavy = {"export", "simplify", "reference", "calibrate", "bench", "verify"}
    assert {s["name"] for s in second.json["stages"] if s["cached"]} >= heavy
    assert not any(s["cached"] for s in fresh.json["stages"])
    assert first.json["recipe"] == second.json["recipe"] == fresh.json["recipe"]
    assert first.json["engines"][0]["file"] == fresh.json["engines"][0]["file"]
    monkeypatch.setattr(type(TARGETS["onnxruntime"]), "version", "another")
    third = cli(*arguments, "--out", tmp_path / "d")
    anew = {s["name"] for s in third.json["stages"] if not s["cached"]}
    assert {"verify", "bench"} <= anew, "an engine of another version was never compared"


def test_a_second_target_that_runs_the_same_file_is_verified_and_timed_itself(cli, tmp_path, monkeypatch):
    from export_zoo.engines.targets.onnxruntime.target import OnnxRuntime

    opened = []

    class Other(OnnxRuntime):
        name = "other"

        def open(self, opening):
            opened.append(opening.file)
            return super().open(opening)

    monkeypatch.setitem(TARGETS, "other", Other())
    arguments = "resnet18 --weights none --num-classes 10 --input-size 32 --resize-size 32".split()
    done = cli(*arguments, "--target", "onnxruntime", "--target", "other", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert [e["name"] for e in done.json["engines"]] == ["onnxruntime-fp32", "other-fp32"]
    assert len(opened) == 2, "once to verify, once to time"
    assert done.json["engines"][0]["latency"] != done.json["engines"][1]["latency"]


def test_python_api_runs_without_a_command_line(digits, digits_bundle, tmp_path):
    from export_zoo import ExportOptions, export

    options = ExportOptions(
        model="resnet18",
        weights=str(digits.weights["resnet18"]),
        num_classes=10,
        input_size=(32, 32),
        resize_size=32,
        verify=digits.images,
        out=tmp_path / "api",
    )
    result = export(options)
    assert result.bundle == tmp_path / "api"
    assert result.engines[0].state == "verified"
    engine = export_zoo.load(result.bundle)
    image = next(digits.images.rglob("7/*.png"))
    assert engine.run(engine.preprocess([image])).argmax() == 7


@pytest.fixture
def gate_case(digits, own_cache, tmp_path):
    """A tiny pipeline up to the gate: `run(fault)` applies a fault to the INT8 graph and exports again."""
    from export_zoo.exporter.stages.tuning import int8_parts

    def run(cli, monkeypatch, fault):
        real = int8_parts.quantize

        def faulty(graph, ranges, out, **options):
            files = real(graph, ranges, out, **options)
            if out.name == "engine.onnx":  # not a candidate of the tuning
                fault(out)
            return files

        monkeypatch.setattr(int8_parts, "quantize", faulty)
        out = tmp_path / "out"
        arguments = [*digits.arguments(), "--precision", "int8", "--calib", digits.images]
        return cli(*arguments, *UNTUNED, "--out", out), out

    return run


def _edit(path: Path, change) -> None:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    for index, tensor in enumerate(model.graph.initializer):
        array = change(tensor.name, numpy_helper.to_array(tensor).copy())
        if array is not None:
            model.graph.initializer[index].CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, path)


def _failed(done, out: Path) -> dict:
    assert done.code == 3, done.err
    assert done.json["error"]["kind"] == "parity"
    assert not out.exists(), "a bundle was published although the gate failed"
    kept = out.with_name(out.name + ".failed")
    assert str(kept) in done.json["error"]["hint"]
    manifest = json.loads((kept / "manifest.json").read_text())
    assert manifest["status"] == "failed"
    assert manifest["artifacts"]["engines"][0]["state"] == "built"
    return manifest


def test_gate_catches_a_corrupt_scale(gate_case, cli, monkeypatch):
    scales = []

    def corrupt(name, array):
        if name.endswith("_scale") and array.ndim == 0:
            scales.append(name)
            return array / 16 if len(scales) == 5 else None
        return None

    done, out = gate_case(cli, monkeypatch, lambda path: _edit(path, corrupt))
    _failed(done, out)
    hint = done.json["error"]["hint"]
    assert "try more --calib images" in hint
    assert "the worst layers of onnxruntime-int8 are layer3.0.conv2, " in hint
    assert (
        "about 1 of its 21 layers in float would mend it (as 128 verify images say): --keep-float layer3.0.conv2;"
        in hint
    )


def test_gate_catches_two_swapped_classes(gate_case, cli, monkeypatch):
    def swap(name, array):
        if array.shape[:1] == (10,):  # the head's weight, its scales, its bias
            array[[3, 8]] = array[[8, 3]]
            return array
        return None

    done, out = gate_case(cli, monkeypatch, lambda path: _edit(path, swap))
    manifest = _failed(done, out)
    assert any("misplaced" in text for text in manifest["artifacts"]["engines"][0]["gate"]["failures"])


def test_gate_catches_a_baked_batch(gate_case, cli, monkeypatch):
    import onnx

    def bake(path):
        model = onnx.load(path)
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8
        onnx.save(model, path)

    done, out = gate_case(cli, monkeypatch, bake)
    assert done.code != 0
    assert not out.exists()


def test_gate_refuses_a_constant_reference(digits, cli, own_cache, tmp_path, monkeypatch):
    from export_zoo.exporter.graph import reference

    def constant(model, pixels, preprocess, progress=None):
        return (np.tile(np.arange(10, dtype=np.float32), (len(pixels), 1)),)

    monkeypatch.setattr(reference, "eager_outputs", constant)
    shutil.rmtree(own_cache / "reference", ignore_errors=True)
    done = cli(*digits.arguments(), "--verify", digits.images, "--out", tmp_path / "out")
    assert done.code == 3, done.err
    assert "hardly vary" in done.err
    assert not (tmp_path / "out").exists()


def test_gate_refuses_overlapping_splits(digits, cli, own_cache, tmp_path, monkeypatch):
    from export_zoo.calibration import images

    real = images.split

    def overlapping(folder, **options):
        splits = real(folder, **options)
        splits["calibrate"] = (*splits["calibrate"], splits["verify"][0])
        return splits

    monkeypatch.setattr(images, "split", overlapping)
    arguments = [*digits.arguments(), "--precision", "int8", "--calib", digits.images]
    done = cli(*arguments, "--calib-images", "32", "--out", tmp_path / "out")
    assert done.code == 3, done.err
    assert "verify images are also in the calibration set" in done.err


RANDOM = "resnet18 --weights none --input-size 64 --resize-size 72 --precision int8".split()


def test_random_weights_are_marked_everywhere_and_gated_against_the_unfused_graph(cli, photos, tmp_path):
    done = cli(*RANDOM, "--calib", photos, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert done.json["recipe"]["source"]["weights"]["random"] is True
    assert any("random weights" in warning for warning in done.json["warnings"])
    assert "random weights" in done.out
    gate = done.json["engines"][0]["gate"]
    assert gate["reference"] == "unfused precision graph"
    assert gate["metrics"]["sqnr"] > gate["eager_metrics"]["sqnr"]


def test_gate_catches_a_fault_with_random_weights_too(cli, photos, own_cache, tmp_path, monkeypatch):
    from export_zoo.engines.targets.onnxruntime import engine

    real = engine.OnnxRuntimeEngine

    class Broken(real):
        """A runtime whose fused kernels are wrong: the precision graph itself is right."""

        def __init__(self, path, *, fused=True, **options):
            super().__init__(path, fused=fused, **options)
            self.wrong = fused and path.name == "engine.onnx"

        def run_all(self, batch):
            (logits,) = super().run_all(batch)
            return (logits[:, ::-1].copy() if self.wrong else logits,)

    monkeypatch.setattr(engine, "OnnxRuntimeEngine", Broken)
    done = cli(*RANDOM, "--calib", photos, "--out", tmp_path / "out")
    assert done.code == 3, done.err


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
def test_every_method_reaches_a_verified_engine_with_ranges_of_its_own(method, digits, cli, tmp_path):
    arguments = [*digits.arguments(), "--precision", "int8", "--calib", digits.images]
    arguments += ["--steps", "none"]
    done = cli(*arguments, "--method", method, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert done.json["recipe"]["calibration"]["method"] == method
    assert done.json["engines"][0]["gate"]["metrics"]["sqnr"] > 30
    plain = cli(*arguments, "--method", "minmax", "--out", tmp_path / "plain")
    assert next(s for s in plain.json["stages"] if s["name"] == "calibrate")["cached"], (
        "collected once for all"
    )
    assert plain.json["engines"][0]["file"]["sha256"] != done.json["engines"][0]["file"]["sha256"]


def _rescaled(weights: Path, path: Path) -> Path:
    """resnet18 with powers of two moved across the ReLU of each block: the same function to the bit."""
    from safetensors.torch import load_file, save_file

    state = load_file(weights)
    rng = np.random.default_rng(0)
    for block in (f"layer{layer}.{index}" for layer in range(1, 5) for index in range(2)):
        scales = torch.from_numpy(np.exp2(rng.integers(-5, 6, len(state[f"{block}.bn1.weight"])))).float()
        state[f"{block}.bn1.weight"] *= scales
        state[f"{block}.bn1.bias"] *= scales
        state[f"{block}.conv2.weight"] /= scales.reshape(1, -1, 1, 1)
    save_file(state, path)
    return path


def test_int8_of_a_rescaled_network_is_as_good_as_before(digits, cli, tmp_path):
    """For both targets in each run: they share the equalized graphs and their ranges."""
    targets = [name for name in ("onnxruntime", "tensorrt-rtx") if not TARGETS[name].unavailable]
    twin = _rescaled(digits.weights["resnet18"], tmp_path / "twin.safetensors")
    common = ["--precision", "int8", "--calib", digits.images, "--calib-images", "128"]
    common += [word for name in targets for word in ("--target", name)]
    steps = ["--steps", "equalize,bias", "--method", "minmax"]
    model, option, _, *rest = digits.arguments()
    plain = cli(
        model, option, digits.weights["resnet18"], *rest, *common, *steps, "--out", tmp_path / "plain"
    )
    saved = cli(model, option, twin, *rest, *common, *steps, "--out", tmp_path / "saved")
    lost = cli(model, option, twin, *rest, *common, *UNTUNED, "--out", tmp_path / "lost")
    assert (plain.code, saved.code, lost.code) == (0, 0, 3), saved.err
    engines = [done.json["engines"] for done in (plain, saved, lost)]
    assert [[e["name"] for e in found] for found in engines] == [[f"{name}-int8" for name in targets]] * 3
    for before, after, without in zip(*engines, strict=True):
        assert after["gate"]["metrics"]["sqnr"] > before["gate"]["metrics"]["sqnr"] - 1
        assert without["gate"]["metrics"]["sqnr"] < 5
        assert without["state"] == "built"
        step, *_ = after["tuning"]["steps"]
        assert (step["name"], step["chosen"] != "off") == ("equalize", True)
        assert step["sqnr"][step["chosen"]] > step["sqnr"]["off"] + 30
        assert f"{after['name']} equalized" in saved.err


def test_what_was_tried_stands_in_the_manifest_and_the_best_is_taken(digits, cli, tmp_path):
    arguments = [*digits.arguments("mobilenet_v2"), "--precision", "int8", *digits.tuned_once()]
    arguments += ["--effort", "high"]
    done = cli(*arguments, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    tuning = done.json["engines"][0]["tuning"]
    names = ["method", "equalize", "round", "bias", "method", "relu6", "float"]
    assert [step["name"] for step in tuning["steps"]][:7] == names
    first, equalize, rounded, bias, method, relu6, in_float = tuning["steps"][:7]
    assert len(tuning["steps"]) == (7 if in_float["chosen"] == "off" else 8), "the method once more"
    assert tuning["images"] >= 64
    assert all(set(step["sqnr"]) == {"off", "on"} for step in (relu6, rounded, bias))
    assert set(first["sqnr"]) == {"minmax", "percentile", "entropy", "mse"}
    near = {name for name, sqnr in first["sqnr"].items() if sqnr >= max(first["sqnr"].values()) - 3}
    assert {name for name in method["sqnr"] if " on " not in name} == near | {first["chosen"]}
    assert {"mse on 1", "mse on 16"} <= set(method["sqnr"])
    assert set(in_float["sqnr"]) == {"off", "first 2 layers"}
    wanted = {"equalize": 2, "relu6": 2, "round": -1, "bias": 0, "method": 3, "float": 1}  # standard errors
    for step in tuning["steps"][:7]:
        default = "minmax" if step is first else first["chosen"] if step is method else "off"
        others = {name: sqnr for name, sqnr in step["sqnr"].items() if name != default}
        assert step["best"] == max(others, key=others.get)
        assert step["images"] == tuning["images"], "of all select images"
        assert step["gain"] == pytest.approx(others[step["best"]] - step["sqnr"][default], abs=1e-6)
        assert 0 < step["standard_error"] < 5
        least = 0.5 if step is in_float else 0.0  # dB
        enough = step["gain"] - least >= wanted[step["name"]] * step["standard_error"]
        assert step["chosen"] == (step["best"] if enough else default)
    assert first["sqnr"][first["chosen"]] == equalize["sqnr"]["off"], "each step starts where the last ended"
    assert equalize["sqnr"][equalize["chosen"]] == rounded["sqnr"]["off"]
    assert rounded["sqnr"][rounded["chosen"]] == bias["sqnr"]["off"]
    assert bias["sqnr"][bias["chosen"]] == method["sqnr"][first["chosen"]]
    assert method["sqnr"][method["chosen"]] == relu6["sqnr"]["off"]
    assert relu6["sqnr"][relu6["chosen"]] == in_float["sqnr"]["off"]
    again = cli(*arguments, "--out", tmp_path / "out")
    assert next(s for s in again.json["stages"] if s["name"] == "tune")["cached"]
    quick = cli(*arguments, "--effort", "default", "--out", tmp_path / "quick").json["engines"][0]
    tried = {step["name"]: set(step["sqnr"]) for step in quick["tuning"]["steps"]}
    through = next(step for step in quick["tuning"]["steps"] if step["name"] == "relu6")
    more = {"equalize"} if through["chosen"] == "off" else set()
    assert tried.keys() == {"method", "round", "bias", "relu6", "float"} | more, (
        "equalization is that through ReLU6"
    )
    assert tried["method"] <= set(first["sqnr"])
    reached = [max(found["steps"][-1]["sqnr"].values()) for found in (quick["tuning"], tuning)]
    chance = 3 * max(step["standard_error"] for step in tuning["steps"])
    assert reached[0] > reached[1] - chance, "dB, on the same select images"


def test_the_first_layers_stay_float_if_that_gains(digits, cli, own_cache, tmp_path, monkeypatch):
    import onnx

    from export_zoo.engines.bundle import reader
    from export_zoo.exporter.stages.tuning import tune as tuning

    monkeypatch.setitem(tuning.WANTED, "float", (0, -100))  # take it, whatever it brings
    arguments = [*digits.arguments("mobilenet_v2"), "--precision", "int8", "--calib", digits.images]
    done = cli(*arguments, "--steps", "float", "--target", "onnxruntime", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    steps = done.json["engines"][0]["tuning"]["steps"]
    assert [step["name"] for step in steps] == ["method", "float", "method"]
    assert steps[1]["chosen"] == "first 2 layers"
    assert "first 2 layers float" in done.err
    assert len(steps[1]["names"]) == 2
    engine = reader.read_manifest(tmp_path / "out").artifacts.engines[0]
    graph = onnx.load(tmp_path / "out" / engine.file.path).graph
    float_layers = {
        n.name
        for n in graph.node
        if n.op_type == "Conv" and n.input[1] in {t.name for t in graph.initializer}
    }
    assert float_layers == set(steps[1]["names"])


@pytest.mark.parametrize(
    ("target", "step", "concerned"),
    [
        ("tensorrt-rtx", "float", {"node_linear"}),
        ("onnxruntime", "float", None),
        ("onnxruntime", "method", {"input"}),
        ("onnxruntime", "round", set()),
    ],
)
def test_what_a_step_chooses_is_in_the_engine(
    target, step, concerned, digits, cli, own_cache, tmp_path, monkeypatch
):
    if why := TARGETS[target].unavailable:
        pytest.skip(why)
    from export_zoo.engines.bundle import reader
    from export_zoo.exporter.stages.tuning import candidates, input_statistics
    from export_zoo.exporter.stages.tuning import tune as tuning

    monkeypatch.setitem(tuning.WANTED, step, (0, -100))  # take it, whatever it brings
    monkeypatch.setattr(candidates, "worth_clipping", lambda *_: ["input", "relu"])
    if step == "method":
        monkeypatch.setattr(tuning, "METHODS", ("minmax",))
    monkeypatch.setattr(
        input_statistics, "LARGEST", 600
    )  # layers with more inputs take half a minute to round
    arguments = [*digits.arguments(), "--precision", "int8", "--calib", digits.images, "--target", target]
    steps = ["--steps", "none" if step == "method" else step, "--effort", "high"]
    done = cli(*arguments, *steps, "--out", tmp_path / "with")
    without = cli(*arguments, *UNTUNED, "--out", tmp_path / "without")
    assert (done.code, without.code) == (0, 0), done.err
    found = [s for s in done.json["engines"][0]["tuning"]["steps"] if s["name"] == step]
    if concerned is None:
        assert found == [], "float layers on the CPU would cost speed"
        return
    assert found[0]["chosen"] in ("on", "last layer", "mse on 1")
    assert set(found[0]["names"]) == concerned

    def constants(out: Path) -> dict:
        import onnx
        from onnx import numpy_helper

        engine = reader.read_manifest(out).artifacts.engines[0]
        model = onnx.load(out / (engine.graph or engine.file).path)
        return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}

    first, second = constants(tmp_path / "with"), constants(tmp_path / "without")
    if step == "float":
        assert not any(name.startswith("node_linear_weight") for name in first)
        assert any(name.startswith("node_linear_weight") for name in second)
    elif step == "method":
        different = {name for name in first if not np.array_equal(first[name], second[name])}
        assert "input_scale" in different
        assert not any(name.startswith("relu") for name in different)
    else:
        name = "node_linear_weight_quantized"
        assert 0 < np.count_nonzero(first[name] != second[name]) < first[name].size / 2
        assert np.abs(first[name].astype(int) - second[name]).max() <= 2


def test_random_weights_are_not_tuned(cli, photos, tmp_path):
    done = cli(*RANDOM, "--calib", photos, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert done.json["engines"][0]["tuning"] is None
    assert "tune" not in [stage["name"] for stage in done.json["stages"]]


def test_few_images_to_calibrate_on_are_warned_of(digits, cli, tmp_path):
    arguments = [
        *digits.arguments(),
        "--precision",
        "int8",
        "--calib",
        digits.images,
        "--out",
        tmp_path / "out",
    ]
    done = cli(*arguments, *UNTUNED, "--calib-images", "20")
    assert any("20 images" in warning and "300 to 1,000" in warning for warning in done.json["warnings"])
    enough = cli(*arguments, *UNTUNED)
    assert enough.code == 0, enough.err
    assert not any("300 to 1,000" in warning for warning in enough.json["warnings"])


def test_synthetic_images_are_used_and_named_where_no_folder_is_given(digits, cli, tmp_path):
    done = cli(*digits.arguments(), "--precision", "fp16", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "synthetic" in done.err
    assert any("synthetic" in warning for warning in done.json["warnings"])


def test_two_runs_side_by_side_on_one_cache_are_both_right(photos, tmp_path):
    import os
    import subprocess
    import sys

    environment = {**os.environ, "EXPORT_ZOO_CACHE": str(tmp_path / "cache")}
    (tmp_path / "preprocess.json").write_text(json.dumps(PREPROCESS_FILE))
    command = [
        sys.executable,
        "-m",
        "export_zoo",
        f"{ROOT}/tests/own_networks.py:padded",
        "--weights",
        "none",
    ]
    command += [
        "--preprocess",
        str(tmp_path / "preprocess.json"),
        "--precision",
        "int8",
        "--calib",
        str(photos),
    ]
    runs = [
        subprocess.Popen([*command, "--out", str(tmp_path / name)], env=environment, stderr=subprocess.PIPE)
        for name in "ab"
    ]
    errors = [run.communicate()[1].decode() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], errors
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in "ab"]
    assert manifests[0]["recipe"] == manifests[1]["recipe"]
    assert not list((tmp_path / "cache" / "work").iterdir())


@pytest.mark.parametrize("cache", ["fresh", "none"])
def test_graphs_above_the_size_limit_keep_their_weights_beside_them(
    cache, digits, cli, tmp_path, monkeypatch
):
    """As above 2 GiB, where protobuf ends: with the limit lowered, every step goes through external data.

    The cache hard-links the weights' file, which onnx_ir refuses to read where it thinks that it was not meant to.
    """
    from export_zoo.base import graph_io

    limit = 500_000
    monkeypatch.setattr(graph_io, "EXTERNAL_DATA_THRESHOLD", limit)
    out = tmp_path / "out"
    arguments = [*digits.arguments("squeezenet1_1"), "--precision", "fp32", "--precision", "int8"]
    arguments += ["--calib", digits.images, "--calib-images", "64"]
    monkeypatch.setenv("EXPORT_ZOO_CACHE", str(tmp_path / "cache"))
    # Each step of the tuning once.
    done = cli(*arguments, "--out", out, *(["--no-cache", *TUNED_LITTLE] if cache == "none" else []))
    assert done.code == 0, done.err
    weights = {f["path"] for e in done.json["engines"] for f in e["external_data"]}
    assert len(weights) == 2
    assert all((out / path).stat().st_size > limit for path in weights)
    assert "skipped: weights over 2 GiB" in done.json["recipe"]["simplified"]
    assert "2.9 MB" in done.out, "the size of an engine is that of its graph and its weights"
    moved = out.rename(tmp_path / "elsewhere")
    assert cli("verify", moved).code == 0
    image = next(digits.images.rglob("4/*.png"))
    engine = export_zoo.load(moved)
    assert engine.run(engine.preprocess([image])).argmax() == 4
    (moved / next(iter(weights))).write_bytes(b"damaged")
    assert cli("verify", moved).code == 5
