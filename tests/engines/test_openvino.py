"""OpenVINO as a target: its engines are verified, and what it cannot do is said."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support.emulated import emulated_cpu
from support.options import PREPROCESS_FILE, UNTUNED

import export_zoo
from export_zoo.base import graph_io
from export_zoo.base.errors import BadInputError, TargetRefusalError, TargetUnavailableError, UsageError
from export_zoo.base.machine import usable_cores
from export_zoo.engines.bundle.opening import opening_of
from export_zoo.engines.bundle.reader import held_out, read_manifest
from export_zoo.engines.emulation import arm64
from export_zoo.engines.emulation.verify import verify_on
from export_zoo.engines.precision.int8.saturation.pairs import saturating_layers
from export_zoo.engines.targets import registry
from export_zoo.engines.targets.openvino import target as openvino_target
from export_zoo.engines.targets.openvino.engine import OpenVinoEngine
from export_zoo.engines.targets.openvino.graph_check import check_graph
from export_zoo.engines.targets.registry import TARGETS
from export_zoo.exporter.cli.app import main

OPENVINO = TARGETS["openvino"]


@pytest.fixture(scope="module", params=["resnet18", "mobilenet_v2", "squeezenet1_1"])
def bundle(request, digits, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("openvino") / request.param
    arguments = [*digits.arguments(request.param), "--calib", digits.images, *UNTUNED, "--target", "openvino"]
    arguments += ["--precision", "fp32", "--precision", "fp16", "--precision", "int8", "--batch", "1:4:8"]
    assert main([*map(str, arguments), "--out", str(out), "--quiet"]) == 0
    return out


def test_all_precisions_are_verified(bundle):
    engines = {engine.name: engine for engine in read_manifest(bundle).artifacts.engines}
    assert [engine.state for engine in engines.values()] == ["verified"] * 3
    sqnr = {name: engine.gate.eager_metrics["sqnr"] for name, engine in engines.items()}
    assert sqnr["openvino-fp32"] > 100, "no bfloat16"
    assert sqnr["openvino-fp16"] > 50
    assert sqnr["openvino-int8"] > 20
    assert all(engine.latency is not None for engine in engines.values())
    assert engines["openvino-fp32"].file == read_manifest(bundle).recipe.graph, "stored once"


def test_sums_of_its_int8_engine_cannot_saturate(bundle):
    manifest = read_manifest(bundle)
    engine = next(e for e in manifest.artifacts.engines if e.precision == "int8")
    assert engine.saturating_cpu_session == {}
    assert saturating_layers(graph_io.load(bundle / engine.file.path).graph, by_pixel=True) == []


@pytest.mark.parametrize(("threads", "streams"), [(1, 1), (1, 2)])
def test_a_loaded_engine_is_shared_by_threads(bundle, threads, streams):
    manifest = read_manifest(bundle)
    engine = export_zoo.load(bundle, engine="openvino-int8", threads=threads, streams=streams)
    batch = np.random.default_rng(0).standard_normal((4, 3, 32, 32), dtype=np.float32)
    wanted, found = engine.run(batch), dict[int, np.ndarray]()

    def run(index: int) -> None:
        for _ in range(5):
            found[index] = engine.run(batch)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(wanted, found[index]) for index in range(4))
    first = wanted.copy()
    engine.run(np.zeros_like(batch))
    assert np.array_equal(wanted, first), "outputs are copies"
    assert held_out(bundle, manifest).pixels.shape[1:3] == (32, 32)


def test_threads_that_cannot_be_are_refused(bundle):
    with pytest.raises(UsageError, match="threads=-1: must be 0 to 1024"):
        export_zoo.load(bundle, engine="openvino-fp32", threads=-1)


def test_each_layer_has_its_time(bundle):
    manifest = read_manifest(bundle)
    batch = np.random.default_rng(0).standard_normal((8, 3, 32, 32), dtype=np.float32)
    for engine in manifest.artifacts.engines:
        opening = opening_of(bundle, engine)
        times = OPENVINO.node_times(opening, batch)
        nodes = graph_io.load(opening.file).graph
        layers = {node.name for node in nodes if node.op_type in ("Conv", "Gemm")}
        assert layers <= times.keys(), engine.name
        assert all(times[layer] > 0 for layer in layers)
        assert len(times.keys() - {node.name for node in nodes}) < 6, "OpenVINO's own conversions"


def test_a_bundle_of_both_cpu_targets_is_loaded_by_speed(digits, tmp_path):
    arguments = [*digits.arguments(), "--calib", digits.images, *UNTUNED, "--precision", "int8"]
    arguments += ["--precision", "fp32", "--precision", "fp16"]
    arguments += ["--target", "onnxruntime", "--target", "openvino", "--out", tmp_path / "out", "--quiet"]
    assert main([*map(str, arguments)]) == 0
    engines = read_manifest(tmp_path / "out").artifacts.engines
    files = {engine.name: engine.file for engine in engines}
    for precision in ("fp32", "fp16"):
        assert files[f"onnxruntime-{precision}"] == files[f"openvino-{precision}"], "stored once"
    assert len({file.path for file in files.values()}) == 4
    fastest = max(engines, key=lambda e: e.latency.speedup)
    loaded = export_zoo.load(tmp_path / "out")
    assert loaded.name == fastest.name
    assert "fastest verified engine" in loaded.why


TWICE = """
from torch import nn

class Twice(nn.Module):
    def __init__(self, num_classes=4):
        super().__init__()
        self.conv = nn.Conv2d(3, num_classes, 3, 2, 1)

    def forward(self, x):
        y = self.conv(x).mean((2, 3))
        return {"logits": y, "scores": y}
"""


def test_outputs_that_are_one_tensor_keep_their_names(cli, tmp_path):
    (tmp_path / "preprocess.json").write_text(json.dumps(PREPROCESS_FILE))
    (tmp_path / "twice.py").write_text(TWICE)
    arguments = [
        f"{tmp_path}/twice.py:Twice",
        "--preprocess",
        tmp_path / "preprocess.json",
        "--target",
        "openvino",
    ]
    done = cli(*arguments, "--precision", "fp16", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert export_zoo.load(tmp_path / "out").name == "openvino-fp16"


DETERMINANT = """
import torch
from torch import nn

class Determinant(nn.Module):
    def __init__(self, num_classes=4):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 9, 3, 2, 1), nn.Linear(2, num_classes)

    def forward(self, x):
        y = self.conv(x).mean((2, 3)).reshape(-1, 3, 3)
        return self.fc(torch.stack([torch.linalg.det(y), y.sum((1, 2))], 1))
"""


def test_a_graph_that_it_does_not_take_is_refused_by_node(cli, tmp_path):
    (tmp_path / "preprocess.json").write_text(json.dumps(PREPROCESS_FILE))
    (tmp_path / "det.py").write_text(DETERMINANT)
    arguments = [f"{tmp_path}/det.py:Determinant", "--preprocess", tmp_path / "preprocess.json"]
    done = cli(*arguments, "--target", "onnxruntime", "--target", "openvino", "--out", tmp_path / "out")
    assert done.code == 6
    assert "does not take the graph: it has no Det, which node" in done.err
    assert [engine["name"] for engine in done.json["engines"]] == ["onnxruntime-fp32"]
    assert [refused["name"] for refused in done.json["refused"]] == ["openvino-fp32"]


def test_a_file_that_is_no_graph_is_said(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"nothing")
    with pytest.raises(BadInputError, match="cannot load it"):
        OpenVinoEngine(tmp_path / "a.onnx")
    with pytest.raises(TargetRefusalError, match="does not take the graph"):
        check_graph(tmp_path / "a.onnx")


def test_a_broken_installation_is_no_defect_and_others_engines_run(bundle, monkeypatch, tmp_path, cli):
    if bundle.name != "resnet18":
        pytest.skip("one network is enough")
    for name in [name for name in sys.modules if name.startswith("export_zoo.engines.targets.openvino.")]:
        if not name.endswith((".target", ".placement")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "openvino", None)  # as if its library were missing
    with pytest.raises(TargetUnavailableError, match="is installed, but cannot be imported") as raised:
        export_zoo.load(bundle)
    assert "install it again" in raised.value.hint
    copy = shutil.copytree(bundle, tmp_path / "copy")
    document = json.loads((copy / "manifest.json").read_text())
    fp32 = document["artifacts"]["engines"][0]
    other = {**fp32, "name": "onnxruntime-fp32", "target": "onnxruntime", "saturating_cpu_session": None}
    document["artifacts"]["engines"].append(other)
    (copy / "manifest.json").write_text(json.dumps(document))
    loaded = export_zoo.load(copy)
    assert loaded.name == "onnxruntime-fp32"
    assert "left out: openvino" in loaded.why
    assert loaded.why.count("left out: openvino") == 1  # the reason once, for all of its engines
    done = cli("verify", copy, "--no-latency")
    assert done.code == 4
    assert [*done.json["engines"]] == ["onnxruntime-fp32"]


def test_int8_is_left_out_on_other_cpus_than_x86(bundle, monkeypatch, cli, tmp_path):
    """Emulated, OpenVINO's INT8 was 30 dB worse on ARM64, and gave empty outputs."""
    if bundle.name != "resnet18":
        pytest.skip("one network is enough")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    loaded = export_zoo.load(bundle)
    assert loaded.name in ("openvino-fp32", "openvino-fp16")
    assert "openvino-int8 was left out: OpenVINO's INT8 is wrong on aarch64" in loaded.why
    with pytest.raises(
        TargetUnavailableError, match="openvino-int8 cannot run here: OpenVINO's INT8 is wrong"
    ):
        export_zoo.load(bundle, engine="openvino-int8")
    copy = shutil.copytree(bundle, tmp_path / "copy")
    done = cli("verify", copy, "--no-latency")
    assert done.code == 0, done.err
    ran = {name: gate["ran"] for name, gate in done.json["engines"].items()}
    assert ran == {"openvino-fp32": "engine", "openvino-fp16": "engine", "openvino-int8": "precision graph"}


@pytest.mark.parametrize("name", ["cortex-a53", "neoverse-n1"])
def test_floats_are_verified_on_arm64(name, bundle):
    if bundle.name != "resnet18":
        pytest.skip("one network is enough")
    if "openvino" not in arm64.versions(root := arm64.default_root()):
        pytest.skip(f"there is no ARM64 root with OpenVINO in {root}")
    attestation, _ = verify_on(bundle, emulated_cpu(name), images=2)
    assert attestation.status == "ok"
    assert attestation.engines.keys() == {"openvino-fp32", "openvino-fp16"}
    assert attestation.warnings == []


def test_a_bundle_of_int8_alone_is_not_run_on_arm64(bundle, tmp_path, cli, monkeypatch):
    copy = shutil.copytree(bundle, tmp_path / "copy")
    document = json.loads((copy / "manifest.json").read_text())
    document["artifacts"]["engines"] = [
        e for e in document["artifacts"]["engines"] if e["precision"] == "int8"
    ]
    (copy / "manifest.json").write_text(json.dumps(document))
    monkeypatch.setattr("export_zoo.engines.emulation.cpus.launch", lambda *_: None)
    done = cli("verify", copy, "--cpu", "neoverse-n1")
    assert done.code == 4
    assert (
        "no engine of onnxruntime or openvino that runs there; OpenVINO's INT8 is wrong on aarch64"
        in done.err
    )
    done = cli("verify", copy, "--cpu", "neoverse-n1", "--cpu", "cortex-a53")
    assert done.code == 4
    assert (
        "every engine on neoverse-n1, every engine on cortex-a53 cannot be run: see the warning" in done.err
    )
    assert done.err.count("INT8 is wrong on aarch64: docs/cpu.md: export with --target onnxruntime") == 2


def test_engines_are_not_bound_to_cores(bundle):
    """Bound to cores, two engines of one thread each share the first one."""
    engine = OpenVinoEngine(bundle / read_manifest(bundle).recipe.graph.path, threads=1)
    wanted = {"ENABLE_CPU_PINNING": False, "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    assert {name: engine._compiled.get_property(name) for name in wanted} == wanted
    engine = OpenVinoEngine(bundle / read_manifest(bundle).recipe.graph.path, threads=1, streams=2)
    cores = min(2, usable_cores())  # OpenVINO starts no more streams than there are cores
    wanted |= {"INFERENCE_NUM_THREADS": cores, "NUM_STREAMS": cores}
    assert {name: engine._compiled.get_property(name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        (np.zeros((1, 3, 32, 32), np.float64), "input float64"),
        (np.zeros((1, 3, 31, 32), np.float32), "expected float32"),
        (np.zeros((0, 3, 32, 32), np.float32), "expected float32"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(bundle, batch, says):
    engine = OpenVinoEngine(bundle / read_manifest(bundle).recipe.graph.path, threads=1)
    with pytest.raises(BadInputError, match=says):
        engine.run_all(batch)


@pytest.mark.parametrize("version", ["absent", "2024.6.0"])
def test_an_absent_or_old_package_says_what_to_install(monkeypatch, cli, version):
    monkeypatch.setattr(type(OPENVINO), "version", version)
    done = cli("resnet18", "--weights", "none", "--target", "openvino")
    assert done.code == 4
    assert "pip install 'export-zoo[openvino]'" in done.err
    monkeypatch.setattr(registry, "AUTOMATIC", ("onnxruntime", "openvino"))
    assert [target.name for target in registry.choose(("auto",))] == ["onnxruntime"]
    assert openvino_target.OLDEST > (2024, 6)
    with pytest.raises(TargetUnavailableError):
        registry.choose(("openvino",))


def test_its_graph_has_standard_operators_only(bundle):
    manifest = read_manifest(bundle)
    engine = next(e for e in manifest.artifacts.engines if e.precision == "int8")
    nodes: list[ir.Node] = list(graph_io.load(bundle / engine.file.path).graph)
    assert {node.domain for node in nodes} == {""}


@pytest.mark.parametrize("cpu", ["haswell", "nehalem"])
def test_logits_on_another_cpu_are_those_here(bundle, cli, cpu):
    """haswell saturates; OpenVINO has no option against it, so the graph must not saturate."""
    emulated_cpu(cpu)
    if bundle.name != "mobilenet_v2":
        pytest.skip("one network is enough: depthwise convolutions, dense ones and a linear layer")
    done = cli("verify", bundle, "--cpu", cpu, "--images", "8")
    assert done.code == 0, done.err
    (found,) = done.json["emulated"]
    assert found["emulation"]["saturates"] == (cpu == "haswell")
    assert found["versions"]["openvino"]
    assert found["emulation"]["host"]["openvino-int8"]["max_difference"] < (1e-6 if cpu == "haswell" else 1)
