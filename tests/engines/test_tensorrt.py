"""TensorRT-RTX engines, built without a GPU: what is built, what is refused, and what is called verified."""

from __future__ import annotations

import json
import logging
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.options import UNTUNED

import export_zoo
from export_zoo.base.cuda import has_cuda_device
from export_zoo.base.errors import (
    BadInputError,
    EnvironmentFailureError,
    TargetRefusalError,
    TargetUnavailableError,
)
from export_zoo.engines.bundle.opening import why_not_run
from export_zoo.engines.bundle.reader import read_manifest
from export_zoo.engines.precision.registry import PRECISIONS
from export_zoo.engines.targets.options import BuildOptions
from export_zoo.engines.targets.registry import TARGETS, choose
from export_zoo.engines.targets.tensorrt import build
from export_zoo.engines.targets.tensorrt.build import build_engine
from export_zoo.engines.targets.tensorrt.engine import TensorRTEngine

pytestmark = pytest.mark.skipif(
    bool(TARGETS["tensorrt-rtx"].unavailable), reason="tensorrt-rtx is not installed"
)


def _graph(path: Path, *nodes: onnx.NodeProto, **constants: np.ndarray) -> Path:
    graph = helper.make_graph(
        list(nodes),
        "main",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.fixture
def relu(tmp_path) -> Path:
    return _graph(tmp_path / "relu.onnx", helper.make_node("Relu", ["input"], ["logits"], name="relu"))


def _build(graph: Path, **other):
    out = graph.with_suffix(".plan")
    return build_engine(graph, out, target="tensorrt-rtx", batch=(1, 2, 4), **other), out


# -- the builder -----------------------------------------------------------------------------------


def test_an_engine_is_built_and_steps_are_told(relu):
    steps: list[tuple[int, int]] = []
    built, out = _build(relu, steps=lambda done, total: steps.append((done, total)))
    assert out.stat().st_size > 1000
    assert built.version.startswith("1.")
    assert built.compute_capabilities == ["8.0", "8.6", "8.9", "12.0"]
    assert [done for done, _ in steps] == list(range(1, len(steps) + 1))
    assert steps
    assert all(done <= total for done, total in steps)


def test_relative_paths_are_those_of_the_caller(relu, monkeypatch):
    monkeypatch.chdir(relu.parent)
    _, out = _build(Path(relu.name))
    assert out.stat().st_size > 1000


def test_what_the_parser_refuses_is_named_with_its_module(tmp_path):
    node = helper.make_node("SequenceEmpty", [], ["sequence"], name="odd_one")
    node.metadata_props.add(key="module", value="features.3.odd")
    last = helper.make_node("SequenceLength", ["sequence"], ["logits"], name="length")
    graph = _graph(tmp_path / "odd.onnx", node, last)
    with pytest.raises(TargetRefusalError) as raised:
        _build(graph)
    assert "SequenceEmpty 'odd_one' (module features.3.odd)" in raised.value.message
    assert "odd.onnx" in raised.value.message
    assert not graph.with_suffix(".plan").exists()


def test_a_file_that_is_no_graph_is_refused(tmp_path):
    (tmp_path / "no.onnx").write_bytes(b"not a graph")
    with pytest.raises(TargetRefusalError, match=r"cannot build no.onnx"):
        _build(tmp_path / "no.onnx")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (
            f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})",
            "killed, most likely because memory ran out",
        ),
        (f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})", r"crashed \(SIGSEGV\)"),
        ("import sys; sys.exit('no libnvinfer here')", r"crashed \(exit code 1\): no libnvinfer here"),
    ],
)
def test_a_builder_that_crashes_is_an_error_message(relu, monkeypatch, code, says):
    monkeypatch.setattr(build, "WORKER", (sys.executable, "-c", code))
    with pytest.raises(EnvironmentFailureError, match=says):
        _build(relu)
    assert not relu.with_suffix(".plan").exists()


def test_warnings_of_engines_that_will_misbehave_are_errors(relu, monkeypatch):
    events = [
        {"event": "log", "severity": "WARNING", "text": "Profile kMAX values are not self-consistent."},
        {"event": "done", "version": "11.0", "compute_capabilities": []},
    ]
    lines = "".join(json.dumps(event) + "\n" for event in events)
    monkeypatch.setattr(build, "WORKER", (sys.executable, "-c", f"print({lines!r}, end='')"))
    relu.with_suffix(".plan").write_bytes(b"an engine that will misbehave")
    with pytest.raises(TargetRefusalError, match="not self-consistent"):
        _build(relu)
    assert not relu.with_suffix(".plan").exists()


def test_tensorrts_log_goes_through_ours(relu, caplog):
    with caplog.at_level(logging.DEBUG, logger="export_zoo.tensorrt"):
        _build(relu)
    assert any(record.name == "export_zoo.tensorrt" for record in caplog.records)


@pytest.mark.parametrize(
    "options",
    [
        BuildOptions(workspace_mb=64),
        BuildOptions(refittable=True),
        BuildOptions(strip_weights=True),
        BuildOptions(compute_capabilities=("8.6", "12.0")),
    ],
)
def test_build_options_are_taken(relu, options):
    _, out = _build(relu, options=options)
    assert out.stat().st_size > 1000


def test_timing_cache_is_kept_beside_the_engine_and_taken_again(relu, monkeypatch):
    """With TensorRT-RTX's builder, which has the same calls and times nothing: `tensorrt` cannot be had everywhere."""
    from export_zoo.engines.targets.tensorrt import worker

    monkeypatch.setitem(worker.MODULES, "tensorrt", "tensorrt_rtx")
    request = {
        "graph": str(relu),
        "out": str(relu.with_suffix(".plan")),
        "target": "tensorrt",
        "batch": [1, 2, 4],
        "sizes": None,
        "workspace_mb": None,
        "refittable": False,
        "strip_weights": False,
        "hardware_compatible": False,
        "version_compatible": False,
        "compute_capabilities": [],
        "timing_cache": None,
    }
    assert worker._build(request, lambda event: None)["event"] == "done"
    kept = relu.with_suffix(".timing")
    assert kept.stat().st_size > 0
    again = worker._build({**request, "timing_cache": str(kept)}, lambda event: None)
    assert again["event"] == "done"


def test_timing_cache_that_is_not_there_is_a_usage_error(cli, tmp_path):
    arguments = ["resnet18", "--weights", "none", "--target", "tensorrt-rtx", "--out", tmp_path / "out"]
    done = cli(*arguments, "--timing-cache", tmp_path / "no.timing")
    assert done.code == 2
    assert "no.timing: no such file" in done.json["error"]["message"]


def test_a_full_disk_is_said_to_be_one(relu, tmp_path):
    (tmp_path / "relu.plan").symlink_to("/dev/full")
    with pytest.raises(EnvironmentFailureError, match=r"relu\.plan: No space left on device") as raised:
        _build(relu)
    assert "EXPORT_ZOO_CACHE" in raised.value.hint


def test_what_the_builder_refuses_is_named_with_its_module(tmp_path):
    """TensorRT-RTX has no FP32 matrix product for compute capability 7.5."""
    weight = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    node = helper.make_node("MatMul", ["input", "weight"], ["logits"], name="node_product")
    node.metadata_props.add(key="module", value="head.fc")
    graph = _graph(tmp_path / "old.onnx", node, weight=weight)
    with pytest.raises(TargetRefusalError, match=r"MatMul 'node_product' \(module head\.fc\)"):
        _build(graph, options=BuildOptions(compute_capabilities=("7.5",)))


def test_compute_capabilities_count_once():
    given = BuildOptions(compute_capabilities=("8.9", "12.1", "8.9"))
    assert TARGETS["tensorrt-rtx"].own_options(given).compute_capabilities == ("8.9", "12.1")


# -- the main job ----------------------------------------------------------------------------------


ALL = ["--precision", "fp32", "--precision", "fp16", "--precision", "int8"]
BOTH = ["--target", "onnxruntime", "--target", "tensorrt-rtx"]


@pytest.fixture(scope="module")
def bundle(digits, tmp_path_factory) -> Path:
    from export_zoo.exporter.cli.app import main

    out = tmp_path_factory.mktemp("tensorrt") / "bundle"
    given = [
        *digits.arguments(),
        *ALL,
        *BOTH,
        "--calib",
        digits.images,
        "--steps",
        "none",
        "--method",
        "minmax",
    ]
    assert main([*map(str, [*given, "--out", out])]) == 0
    return out


def test_engines_that_were_not_run_are_graph_verified_and_no_more(bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    found = {engine["name"]: engine for engine in manifest["artifacts"]["engines"]}
    assert len(found) == 6
    for name, engine in found.items():
        ran = "engine" if name.startswith("onnxruntime") else "precision graph"
        assert engine["gate"]["ran"] == ran, name
        assert engine["state"] == ("verified" if ran == "engine" else "graph verified"), name
        assert (engine["latency"] is None) == (ran != "engine"), "what did not run was not timed"
        assert (engine["graph"] is None) == (ran == "engine")
    assert "tensorrt-rtx" in found["tensorrt-rtx-int8"]["built_by"]
    assert found["tensorrt-rtx-int8"]["gate"]["metrics"]["sqnr"] > 30


def test_verify_runs_the_graphs_again_and_promotes_nothing(bundle, cli):
    done = cli("verify", bundle)
    assert done.code == 0, done.err
    assert "tensorrt-rtx-int8: graph verified" in done.out
    attestation = json.loads(Path(done.json["attestation"]).read_text())
    assert attestation["states"]["tensorrt-rtx-int8"] == "graph verified"


def test_load_takes_an_engine_that_runs_here(bundle):
    assert export_zoo.load(bundle).name.startswith("onnxruntime")
    with pytest.raises(TargetUnavailableError, match="tensorrt-rtx-int8"):
        export_zoo.load(bundle, engine="tensorrt-rtx-int8")


def test_an_engine_that_was_not_run_does_not_satisfy_require_verified(digits, cli, tmp_path):
    arguments = [
        *digits.arguments(),
        "--target",
        "tensorrt-rtx",
        "--verify",
        digits.images,
        "--require",
        "verified",
    ]
    done = cli(*arguments, "--out", tmp_path / "out")
    assert done.code == 6, done.err
    assert [(e["name"], e["state"]) for e in done.json["engines"]] == [
        ("tensorrt-rtx-fp32", "graph verified")
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", ["scale", "swap"])
def test_gate_catches_faults_in_the_tensorrt_graph(digits, cli, own_cache, tmp_path, monkeypatch, fault):
    from export_zoo.exporter.stages.tuning import int8_parts

    real = int8_parts.quantize

    def faulty(graph, ranges, out, **options):
        files = real(graph, ranges, out, **options)
        model = onnx.load(out)
        for tensor in model.graph.initializer:
            array = numpy_helper.to_array(tensor).copy()
            if fault == "scale" and tensor.name == "node_linear_weight_scale_half":
                array[3] *= 8
            elif fault == "swap" and tensor.name == "node_linear_weight_quantized":
                array[[3, 5]] = array[[5, 3]]
            else:
                continue
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
            break
        else:
            raise AssertionError([t.name for t in model.graph.initializer])
        onnx.save(model, out)
        return files

    monkeypatch.setattr(int8_parts, "quantize", faulty)
    arguments = [
        *digits.arguments(),
        "--precision",
        "int8",
        "--calib",
        digits.images,
        "--target",
        "tensorrt-rtx",
        *UNTUNED,
    ]
    done = cli(*arguments, "--out", tmp_path / "out")
    assert done.code == 3, done.err
    assert "tensorrt-rtx-int8" in done.json["error"]["message"]
    assert done.json["engines"][0]["state"] == "built"


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["--workspace", "0"], "--workspace"),
        (["--workspace", "1048577"], "--workspace"),
        (["--compute-capability", "89"], "--compute-capability"),
        (["--compute-capability", "08.9"], "--compute-capability"),
        (["--compute-capability", "CURRENT"], "--compute-capability"),
        (["--compute-capability", "٨.٩"], "--compute-capability"),
        (["--hardware-compatible"], "--hardware-compatible"),
        (["--version-compatible"], "--version-compatible"),
        (["--timing-cache", __file__], "--timing-cache"),
        (["--refittable", "--target", "onnxruntime"], "--refittable"),
    ],
)
def test_build_options_that_a_target_does_not_have_are_usage_errors(given, names, cli, tmp_path):
    target = [] if "--target" in given else ["--target", "tensorrt-rtx"]
    done = cli("resnet18", "--weights", "none", *target, *given, "--out", tmp_path / "out")
    assert done.code == 2
    assert names in done.json["error"]["message"]
    assert done.json["stages"] == []


def test_compute_capabilities_reach_the_builder(cli, tmp_path):
    arguments = ["resnet18", "--weights", "none", "--input-size", "64", "--target", "tensorrt-rtx"]
    done = cli(*arguments, "--compute-capability", "9.9", "--out", tmp_path / "out")
    assert done.code == 2
    assert "--compute-capability 9.9: unknown" in done.json["error"]["message"]
    assert "7.5, 8.0" in done.json["error"]["hint"]
    assert done.json["stages"] == [], "before any work"
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(has_cuda_device(), reason="there is a GPU here")
def test_the_gpu_that_is_here_cannot_be_built_for_where_there_is_none(cli, tmp_path):
    arguments = ["resnet18", "--weights", "none", "--input-size", "64", "--target", "tensorrt-rtx"]
    done = cli(*arguments, "--compute-capability", "current", "--out", tmp_path / "out")
    assert done.code == 4
    assert "--compute-capability current: there is no CUDA device here" in done.json["error"]["message"]
    assert done.json["stages"] == []


@pytest.mark.skipif(has_cuda_device(), reason="there is a GPU here")
@pytest.mark.parametrize("option", ["--refittable", "--strip-weights"])
def test_what_rtx_does_on_a_gpu_only_is_refused_without_one(option, cli, tmp_path):
    done = cli("resnet18", "--weights", "none", "--target", "tensorrt-rtx", option, "--out", tmp_path / "out")
    assert done.code == 4
    assert option in done.json["error"]["message"]


# -- targets ---------------------------------------------------------------------------------------


def test_auto_is_both_cpu_targets_and_rtx_where_there_is_no_gpu(monkeypatch):
    from export_zoo.engines.targets import registry

    monkeypatch.setattr(registry, "AUTOMATIC", tuple(TARGETS))
    names = [t.name for t in choose(("auto",))]
    gpu = "tensorrt" if not TARGETS["tensorrt"].unavailable else "tensorrt-rtx"
    assert names == ["onnxruntime", "openvino", gpu]


@pytest.mark.skipif(has_cuda_device(), reason="there is a GPU here")
def test_tensorrt_without_the_package_says_what_to_install():
    with pytest.raises(TargetUnavailableError, match=r"pip install 'export-zoo\[tensorrt\]'"):
        choose(("tensorrt",))


# -- on a GPU ----------------------------------------------------------------------------------------


gpu = pytest.mark.skipif(not has_cuda_device(), reason="there is no CUDA device here")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_engines_are_verified_and_timed_on_a_gpu(target, precision, digits, cli, tmp_path):
    if why := TARGETS[target].unavailable:
        pytest.skip(why)
    arguments = [*digits.arguments(), "--target", target, "--precision", precision, "--calib", digits.images]
    done = cli(*arguments, "--batch", "1:8:64", "--require", "verified", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    (engine,) = done.json["engines"]
    assert (engine["state"], engine["gate"]["ran"]) == ("verified", "engine")
    assert engine["latency"] is not None
    loaded = export_zoo.load(tmp_path / "out")
    image = next(digits.images.rglob("4/*.png"))
    assert loaded.run(loaded.preprocess([image])).argmax() == 4


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_a_plan_without_weights_gets_them_from_its_graph_on_a_gpu(target, digits, cli, tmp_path):
    if why := TARGETS[target].unavailable:
        pytest.skip(why)
    arguments = [*digits.arguments(), "--target", target, "--precision", "fp16", "--strip-weights"]
    done = cli(*arguments, "--calib", digits.images, "--require", "verified", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    (engine,) = done.json["engines"]
    assert engine["file"]["size_bytes"] < engine["graph"]["size_bytes"] / 2
    loaded = export_zoo.load(tmp_path / "out")
    assert loaded.run(loaded.preprocess([next(digits.images.rglob("4/*.png"))])).argmax() == 4


@pytest.mark.gpu
@gpu
def test_cuda_graphs_change_no_logit_and_layers_are_told_on_a_gpu(digits, cli, tmp_path):
    given = [*digits.arguments(), "--precision", "fp16", "--calib", digits.images, "--target", "tensorrt-rtx"]
    assert cli(*given, "--compute-capability", "current", "--out", tmp_path / "out").code == 0
    (described,) = read_manifest(tmp_path / "out").artifacts.engines
    path = tmp_path / "out" / described.file.path
    batch = np.random.default_rng(0).normal(size=(8, 3, 32, 32)).astype(np.float32)
    plain, captured = (TensorRTEngine(path, target="tensorrt-rtx", cuda_graphs=on) for on in (False, True))
    expected = plain.run(batch)
    for _ in range(50):  # a shape is captured once its kernels are specialized
        np.testing.assert_array_equal(captured.run(batch), expected)
    plain.start(8)
    plain.wait()
    assert json.loads(plain.layers())["Layers"]


@pytest.mark.gpu
@gpu
def test_a_bundle_built_elsewhere_is_promoted_by_verify_on_a_gpu(bundle, digits, cli, tmp_path):
    """Built with a default of several compute capabilities; skipped where this GPU has another."""
    import shutil

    copy = shutil.copytree(bundle, tmp_path / "bundle")
    document = json.loads((copy / "manifest.json").read_text())
    for engine in document["artifacts"]["engines"]:
        if engine["plan"]:
            engine["state"] = "graph verified"
    (copy / "manifest.json").write_text(json.dumps(document))
    engine = next(e for e in read_manifest(copy).artifacts.engines if e.name == "tensorrt-rtx-int8")
    if why := why_not_run(engine):
        pytest.skip(why)
    done = cli("verify", copy)
    assert done.code == 0, done.err
    assert "tensorrt-rtx-int8: verified" in done.out
    loaded = export_zoo.load(copy, engine="tensorrt-rtx-int8", runtime_cache=tmp_path / "kernels")
    assert loaded.state == "verified"
    loaded.run(loaded.preprocess([next(digits.images.rglob("4/*.png"))]))
    assert (tmp_path / "kernels").stat().st_size > 0


def test_runtime_caches_calls_are_those_of_this_tensorrt_rtx():
    """No engine can be had without a GPU, its classes can: a renamed call shows here, not on the first GPU."""
    trt = pytest.importorskip("tensorrt_rtx")
    assert hasattr(trt.ICudaEngine, "create_runtime_config")
    assert hasattr(trt.IRuntimeConfig, "create_runtime_cache")
    assert hasattr(trt.IRuntimeConfig, "set_runtime_cache")
    assert {"serialize", "deserialize"} <= set(dir(trt.IRuntimeCache))
    assert {"refit_from_file"} <= set(dir(trt.OnnxParserRefitter))
    assert {"refit_cuda_engine"} <= set(dir(trt.Refitter))
    assert hasattr(trt.Runtime, "engine_host_code_allowed")


@pytest.mark.skipif(has_cuda_device(), reason="there is a GPU here")
def test_without_a_gpu_the_runtime_says_so(bundle):
    plan = next((bundle / "files").glob("*-tensorrt-rtx-int8.*.plan"))
    with pytest.raises(EnvironmentFailureError, match="CUDA"):
        TensorRTEngine(plan, target="tensorrt-rtx")


@pytest.mark.parametrize("host_code", [False, True])
def test_host_code_of_a_plan_is_allowed_only_where_it_has_to_be(tmp_path, monkeypatch, host_code):
    """A version-compatible plan cannot be loaded without; up to loading, with a TensorRT that refuses it."""
    from export_zoo.engines.targets.tensorrt import engine as tensorrt_engine

    allowed = []

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, logger):
            pass

        def deserialize_cuda_engine(self, data):
            allowed.append(self.engine_host_code_allowed)

    trt = SimpleNamespace(ILogger=type("ILogger", (), {}), Runtime=Runtime, __version__="11.1.0")
    success = SimpleNamespace(cudaSuccess=0)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(
        tensorrt_engine, "_cuda", lambda: SimpleNamespace(cudaFree=lambda _: (0,), cudaError_t=success)
    )
    (tmp_path / "net.plan").write_bytes(b"plan")
    with pytest.raises(TargetUnavailableError, match="cannot load it"):
        TensorRTEngine(tmp_path / "net.plan", target="tensorrt", host_code=host_code)
    assert allowed == [host_code]


def test_an_engine_that_only_an_attestation_calls_verified_is_chosen(bundle, tmp_path, monkeypatch):
    """As on a GPU machine that verified a bundle built without one; up to the missing driver."""
    import shutil

    from export_zoo.engines.bundle import selection
    from export_zoo.engines.targets.tensorrt import engine, target
    from export_zoo.engines.verification import verify

    def is_here(capability: str) -> None:  # there is no GPU to ask
        for module in (target, selection):
            monkeypatch.setattr(module, "device_capability", lambda: capability)

    copy = shutil.copytree(bundle, tmp_path / "bundle")
    attestation, path = verify.verify(copy)
    assert path is not None
    gates = {
        name: gate.model_copy(update={"ran": "engine"}) if name == "tensorrt-rtx-fp16" else gate
        for name, gate in attestation.engines.items()
    }
    fast = next(iter(attestation.latencies.values())).model_copy(update={"speedup": 99.0})
    timed = {**attestation.latencies, "tensorrt-rtx-fp16": fast}
    changed = {"engines": gates, "latencies": timed, "compute_capability": "8.9"}
    attested = attestation.model_copy(update=changed)
    path.write_text(attested.model_dump_json())
    opened = []
    is_here("8.9")

    def opening(plan, **_):
        opened.append(plan)
        return SimpleNamespace(output_names=["logits"])

    monkeypatch.setattr(engine, "TensorRTEngine", opening)
    loaded = export_zoo.load(copy)
    assert (loaded.name, loaded.state) == ("tensorrt-rtx-fp16", "verified")
    assert "-tensorrt-rtx-fp16." in opened[0].name
    is_here("12.0")
    assert export_zoo.load(copy).name.startswith("onnxruntime"), "another GPU than that which attested"


def test_an_old_driver_is_told_before_an_engine_is_loaded(bundle, monkeypatch):
    from export_zoo.base import cuda
    from export_zoo.engines.bundle import selection
    from export_zoo.engines.targets.tensorrt import target

    class Old:
        def cuDriverGetVersion(self, pointer):  # noqa: N802 (the driver's name)
            pointer._obj.value = 12040
            return 0

    monkeypatch.setattr(cuda, "_driver", Old)
    for module in (target, selection):
        monkeypatch.setattr(module, "device_capability", lambda: "8.9")
    with pytest.raises(TargetUnavailableError, match=r"supports CUDA 12\.4, 13\.0 is needed"):
        export_zoo.load(bundle, engine="tensorrt-rtx-fp16")
    assert export_zoo.load(bundle).name.startswith("onnxruntime")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"state": "verified"}, "is called verified, its gate makes it graph verified"),
        ({"plan": None}, "plan"),
        ({"graph": None}, "graph"),
        ({"target": 1}, "target"),
        ({"name": "onnxruntime-int8"}, "onnxruntime-int8 is not"),
        ({"name": "onnxruntime-int8", "target": "onnxruntime", "plan": None, "graph": None}, "there twice"),
    ],
)
def test_a_manifest_that_calls_an_engine_what_it_is_not_is_refused(bundle, tmp_path, change, says):
    import shutil

    copy = shutil.copytree(bundle, tmp_path / "bundle")
    document = json.loads((copy / "manifest.json").read_text())
    next(e for e in document["artifacts"]["engines"] if e["name"] == "tensorrt-rtx-int8").update(change)
    (copy / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(BadInputError, match=says):
        read_manifest(copy)


def test_an_engine_that_is_there_twice_is_refused(bundle, tmp_path):
    import shutil

    copy = shutil.copytree(bundle, tmp_path / "bundle")
    document = json.loads((copy / "manifest.json").read_text())
    document["artifacts"]["engines"].append(document["artifacts"]["engines"][0])
    (copy / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(BadInputError, match="there twice"):
        read_manifest(copy)


@pytest.mark.skipif(has_cuda_device(), reason="there is a GPU here")
def test_load_says_why_an_engine_cannot_run_here(bundle):
    with pytest.raises(TargetUnavailableError, match="there is no CUDA device here"):
        export_zoo.load(bundle, engine="tensorrt-rtx-fp16")


@pytest.mark.parametrize(
    ("change", "capability", "says"),
    [
        ({}, "8.9", ""),
        ({}, "9.0", "built for compute capability 8.0, 8.6, 8.9, 12.0, this GPU has 9.0"),
        ({"version": "1.2.3"}, "8.9", "built by tensorrt-rtx 1.2.3, this is"),
        ({"version": "1.2.3", "version_compatible": True}, "8.9", ""),
        ({"hardware_compatible": True}, "9.0", ""),
    ],
)
def test_plans_of_other_gpus_and_versions_are_told_before_they_are_loaded(
    bundle, monkeypatch, change, capability, says
):
    from export_zoo.engines.targets.tensorrt import target

    monkeypatch.setattr(target, "device_capability", lambda: capability)  # there is no GPU to ask
    engine = next(e for e in read_manifest(bundle).artifacts.engines if e.name == "tensorrt-rtx-int8")
    plan = engine.plan.model_copy(update=change)
    found = TARGETS[engine.target].why_not_run(PRECISIONS[engine.precision], plan)
    assert found.startswith(says) if says else found == ""
