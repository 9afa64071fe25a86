"""Matrices: what a file means, cells in processes of their own, what is kept, and what is told."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from support.paths import ROOT

from export_zoo.base.errors import EnvironmentFailureError, UsageError
from export_zoo.exporter.cli import matrix as matrix_command
from export_zoo.exporter.cli.app import main
from export_zoo.exporter.cli.export import read_arguments
from export_zoo.exporter.matrix import cell as matrix_cell
from export_zoo.exporter.matrix import machine, plan, process, report
from export_zoo.exporter.matrix import run as matrix_run
from export_zoo.exporter.matrix.expected_memory import expected_memory
from export_zoo.exporter.matrix.inputs import fingerprints
from export_zoo.exporter.matrix.results import CellResult, store, stored
from export_zoo.exporter.models.memory import UNKNOWN

needs_qemu = pytest.mark.skipif(
    not shutil.which("qemu-x86_64"), reason="qemu-x86_64 is not installed (qemu-user)"
)
NAMES = plan.Names(("resnet18", "resnet34", "squeezenet1_1", "vgg11"), ("fcn_resnet50", "lraspp"))
MINIMAL = "models: [resnet18]\nprecisions: [fp32]\ntargets: [onnxruntime]\n"
SMALL = """\
models: squeezenet1_1
precisions: fp32
targets: onnxruntime
options: {weights: none, input-size: 64, verify-images: 32, batch: "1:2:3"}
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def planned(tmp_path: Path, text: str, job: str | None = None) -> list[plan.Cell]:
    path = write(tmp_path / "m.yaml", text)
    return plan.cells(path, plan.read(path), NAMES, read_arguments, job)


# -- what a file means -----------------------------------------------------------------------------------------


def test_cells_are_models_by_targets_by_precisions(tmp_path):
    found = planned(
        tmp_path, 'models: ["resnet*", vgg11, resnet18]\nprecisions: [fp32, fp16]\ntargets: onnxruntime\n'
    )
    assert [cell.name for cell in found] == [
        f"{model}-onnxruntime-{precision}"
        for model in ("resnet18", "resnet34", "vgg11")
        for precision in ("fp32", "fp16")
    ]
    assert found[1].command() == ["export", "resnet18", "--precision=fp16", "--target=onnxruntime"]


def test_options_overrides_and_excludes_are_those_of_their_cells(tmp_path):
    found = planned(
        tmp_path,
        """\
models: [resnet18, vgg11]
precisions: [fp32, int8]
targets: [onnxruntime]
options: {weights: none, calib: imgs, no-cache: true, tolerance: [sqnr=1, top1=0.5]}
override:
  - {models: vgg*, options: {input-size: 96}}
  - {models: vgg11, precisions: int8, options: {weights: DEFAULT, input-size: 64}}
exclude:
  - {models: resnet18, precisions: [int8], reason: too old}
""",
    )
    arguments = {cell.name.removesuffix("-onnxruntime"): cell.arguments for cell in found}
    shared = ("--weights=none", "--calib=imgs", "--no-cache", "--tolerance=sqnr=1", "--tolerance=top1=0.5")
    assert arguments["resnet18-onnxruntime-fp32"] == shared
    assert arguments["vgg11-onnxruntime-fp32"] == (*shared, "--input-size=96")
    assert arguments["vgg11-onnxruntime-int8"] == ("--weights=DEFAULT", *shared[1:], "--input-size=64")
    assert [cell.excluded for cell in found] == ["", "too old", "", ""]


def test_text_with_colons_needs_no_quotes(tmp_path):
    """In YAML 1.1 `1:4:8` is 3848."""
    (cell,) = planned(tmp_path, MINIMAL + "options: {batch: 1:4:8}\n")
    assert cell.arguments == ("--batch=1:4:8",)


def test_two_networks_that_would_share_a_name_are_refused(tmp_path):
    text = MINIMAL.replace("[resnet18]", "['v1/net.py:build', 'v1-net.py:build']")
    with pytest.raises(UsageError, match=r"would both be called v1-net\.py-build-onnxruntime-fp32"):
        planned(tmp_path, text)


def test_a_job_is_a_part_of_the_matrix_with_options_of_its_own(tmp_path):
    text = """\
models: [resnet18, vgg11]
precisions: [fp32, fp16]
targets: [onnxruntime, tensorrt]
jobs:
  - {name: cpu, runs-on: [ubuntu-latest], targets: onnxruntime, models: resnet*}
  - {name: gpu, runs-on: [self-hosted, sm-89], targets: tensorrt, options: {require: verified}}
"""
    assert [cell.name for cell in planned(tmp_path, text, "cpu")] == [
        "resnet18-onnxruntime-fp32",
        "resnet18-onnxruntime-fp16",
    ]
    gpu = planned(tmp_path, text, "gpu")
    assert {cell.target for cell in gpu} == {"tensorrt"}
    assert len(gpu) == 4
    assert all("--require=verified" in cell.arguments for cell in gpu)
    assert len(planned(tmp_path, text, "*pu")) == 6
    with pytest.raises(UsageError, match=r"--job tpu: .*m\.yaml has no such job") as error:
        planned(tmp_path, text, "tpu")
    assert "cpu, gpu" in error.value.hint


def test_cpus_are_off_by_default_and_follow_the_cell_that_exports(tmp_path):
    text = MINIMAL.replace("fp32", "fp32, int8").replace("onnxruntime", "onnxruntime, tensorrt")
    text += (
        "options: {calib: imgs}\ncpu-images: 3\n"
        "exclude: [{cpus: haswell, precisions: fp32, reason: slow}]\n"
        "jobs:\n- {name: all, runs-on: [x]}\n- {name: cpus, runs-on: [x], cpus: [haswell, host, neoverse-n1]}\n"
    )
    assert {cell.cpu for cell in planned(tmp_path, text)} == {"host"}
    found = planned(tmp_path, text, "cpus")
    assert planned(tmp_path, text, "*") == found, "in the order of the cells that export"
    assert [cell.name.removeprefix("resnet18-") for cell in found] == [
        f"{engine}{cpu}"
        for engine in ("onnxruntime-fp32", "onnxruntime-int8", "tensorrt-fp32", "tensorrt-int8")
        for cpu in ("", "-haswell", "-neoverse-n1")
    ]
    haswell = found[4]
    assert haswell.command() == [
        "verify",
        "resnet18-onnxruntime-int8.bundle",
        "--cpu=haswell",
        "--images=3",
    ]
    assert [cell.name for cell in found if cell.excluded] == [
        "resnet18-onnxruntime-fp32-haswell",
        "resnet18-tensorrt-fp32-haswell",
    ]
    assert {(cell.target, cell.cpu) for cell in found if cell.skipped} == {
        ("tensorrt", "haswell"),
        ("tensorrt", "neoverse-n1"),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [", "not YAML"),
        ("", "the whole file"),
        ("models: [resnet18]", "precisions: Field required"),
        (MINIMAL + "timeout: 0", "timeout"),
        (MINIMAL + "memory: much", "memory"),
        (MINIMAL + "colour: red", "colour: Extra inputs"),
        (MINIMAL.replace("fp32", "fp8"), "precisions: unknown 'fp8'"),
        (MINIMAL.replace("onnxruntime", "coreml"), "targets: unknown 'coreml'"),
        (MINIMAL.replace("resnet18", "resnet19"), "'resnet19' matches no model"),
        (MINIMAL + "exclude: [{models: alexnet9, reason: x}]", "'alexnet9' matches no model"),
        (MINIMAL + "exclude: [{models: resnet18}]", "exclude.0.reason: Field required"),
        (MINIMAL + "exclude: [{precisions: int4, reason: x}]", "unknown 'int4'"),
        (MINIMAL + "exclude: [{reason: x, modles: y}]", "modles"),
        (MINIMAL + "options: {wieghts: none}", "No such option"),
        (MINIMAL + "options: {batch: many}", "--batch 'many'"),
        (MINIMAL + "options: {out: elsewhere}", "--out=elsewhere: the matrix sets this option itself"),
        (MINIMAL + "options: {precision: int8}", "--precision=int8: the matrix sets this option itself"),
        (MINIMAL.replace("fp32", "int8"), "--precision int8 needs --calib"),
        (
            MINIMAL + "jobs: [{name: a, runs-on: [x]}, {name: a, runs-on: [y]}]",
            "jobs: two jobs are called 'a'",
        ),
        (MINIMAL + "cpus: pentium", "cpus: unknown 'pentium'"),
        (
            MINIMAL + "jobs: [{name: a, runs-on: [x], cpus: [host, pentium]}]",
            "jobs: a: cpus: unknown 'pentium'",
        ),
        (MINIMAL + "exclude: [{cpus: pentium, reason: x}]", "exclude: cpus: unknown 'pentium'"),
        (MINIMAL + "jobs: [{name: a, runs-on: [x], cpus: haswell}]", "jobs: a: cpus: 'host' is missing"),
        (MINIMAL + "cpu-images: 1", "cpu-images"),
        (MINIMAL + "jobs: [{name: a}]", "jobs.0.runs-on: Field required"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name_and_the_key(tmp_path, text, message):
    with pytest.raises(UsageError) as error:
        planned(tmp_path, text)
    assert str(tmp_path / "m.yaml") in error.value.message
    assert message in error.value.message
    assert error.value.hint


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"none\.yaml: cannot be read"):
        plan.read(tmp_path / "none.yaml")


def test_the_matrix_of_ci_is_whole():
    given = plan.read(ROOT / "ci" / "matrix.yaml")
    from export_zoo.exporter.models.sources.torchvision_zoo import model_names

    every = {
        cell.name
        for cell in plan.cells(ROOT / "ci" / "matrix.yaml", given, plan.Names(model_names()), read_arguments)
    }
    in_jobs = [
        cell.name
        for job in given.jobs
        for cell in plan.cells(
            ROOT / "ci" / "matrix.yaml", given, plan.Names(model_names()), read_arguments, job.name
        )
    ]
    assert set(in_jobs) - every == {
        f"{model}-{target}-{precision}-haswell"
        for model in ("squeezenet1_1", "mobilenet_v3_small")
        for target in ("onnxruntime", "tensorrt-rtx")
        for precision in ("fp32", "fp16", "int8")
    }
    assert every <= set(in_jobs)
    assert {name.split("-")[0] for name in every} == set(model_names())


def test_segmentation_timm_and_the_users_own_are_named_beside_the_classifiers(tmp_path):
    found = planned(
        tmp_path,
        'models: ["*", "fcn*", timm/resnet18.a1_in1k, "nets/my net.py:build"]\n'
        "precisions: fp32\ntargets: onnxruntime\n"
        'override: [{models: "timm/*", options: {input-size: 64}}, '
        '{models: "nets/my net.py:build", options: {preprocess: p.yaml}}]\n',
    )
    assert [cell.model for cell in found] == [
        *NAMES.models,
        "fcn_resnet50",
        "timm/resnet18.a1_in1k",
        "nets/my net.py:build",
    ]
    assert [cell.name for cell in found[-2:]] == [
        "timm-resnet18.a1_in1k-onnxruntime-fp32",
        "nets-my-net.py-build-onnxruntime-fp32",
    ]
    assert found[-2].arguments == ("--input-size=64",)
    with pytest.raises(UsageError, match=r"'timm/res\*': globs match torchvision's models only"):
        planned(tmp_path, 'models: "timm/res*"\nprecisions: fp32\ntargets: onnxruntime\n')


# -- cells in processes of their own ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A real cell: its plan, its output directory, and its result."""
    directory = tmp_path_factory.mktemp("matrix")
    path = write(directory / "m.yaml", SMALL)
    (cell,) = plan.cells(path, plan.read(path), NAMES, read_arguments)
    (result,) = matrix_run.run([cell], directory / "out", seconds=300)
    return cell, directory / "out", result


def test_a_cell_is_exported_and_its_figures_are_kept(ran):
    cell, out, result = ran
    assert result.status == "ok", result.reason
    assert result.exit_code == 0
    assert result.engine["name"] == "onnxruntime-fp32"
    assert result.engine["state"] == "verified"
    assert result.figure("gate", "eager_metrics", "sqnr") > 60
    assert result.nodes > 20
    assert result.input_size == (64, 64)
    assert result.random
    assert 300 < result.peak_mib < 20_000
    assert result.seconds > 1
    assert result.versions["onnxruntime"] != "absent"
    assert (out / "bundles" / f"{cell.name}.bundle" / "manifest.json").exists()
    assert stored(out / "results") == {cell.name: result}


def test_a_second_run_takes_what_is_done_and_runs_what_is_not(ran, monkeypatch):
    cell, out, result = ran
    made, seen = [], []

    def run_cell(cell, bundle, _limits):
        made.append(cell.name)
        return dataclasses.replace(result, command=tuple(cell.command()), status="failed", reason="made anew")

    monkeypatch.setattr(matrix_cell, "run_cell", run_cell)
    done = lambda result, cached: seen.append((result.status, cached))  # noqa: E731
    assert matrix_run.run([cell], out, seconds=1, done=done) == [result]
    assert (made, seen) == ([], [("ok", True)])
    other = dataclasses.replace(cell, arguments=(*cell.arguments, "--seed=1"))
    matrix_run.run([other], out, seconds=1)
    assert len(made) == 1, "another command line"
    matrix_run.run([other], out, seconds=1)
    assert len(made) == 2, "it had failed"
    (out / "results" / f"{cell.name}.json").write_text("{")
    matrix_run.run([cell], out, seconds=1)
    assert len(made) == 3, "a damaged result"
    for status in ("ok", "failed"):
        store(out / "results", dataclasses.replace(result, status=status))
    store(out / "results", result)
    matrix_run.run([cell], out, seconds=1, again=True)
    assert len(made) == 4
    store(out / "results", dataclasses.replace(result, versions={}))
    matrix_run.run([cell], out, seconds=1)
    assert len(made) == 5, "of other libraries"
    excluded = dataclasses.replace(cell, excluded="why not")
    assert matrix_run.run([excluded], out, seconds=1)[0].reason == "why not"
    assert len(made) == 5
    store(out / "results", result)


def test_a_cell_is_run_again_when_its_files_changed(ran, tmp_path, monkeypatch):
    cell, out, result = ran
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(b"1")
    (tmp_path / "best.pth").write_bytes(b"1")
    (tmp_path / "costs.json").write_bytes(b"1")
    files = (f"--weights={tmp_path / 'best.pth'}", f"--costs={tmp_path / 'costs.json'}")
    arguments = (*cell.arguments, f"--calib={images}", *files)
    given = dataclasses.replace(cell, arguments=arguments)
    made = []

    def run_cell(cell, bundle, _limits):
        made.append(cell.name)
        bundle.mkdir(exist_ok=True)
        return dataclasses.replace(
            result, model=cell.model, command=tuple(cell.command()), inputs=fingerprints(cell) or {}
        )

    monkeypatch.setattr(matrix_cell, "run_cell", run_cell)
    changes = [
        lambda: None,
        lambda: (images / "b.png").write_bytes(b"2"),
        lambda: (tmp_path / "best.pth").write_bytes(b"2"),
        lambda: (tmp_path / "costs.json").write_bytes(b"2"),
    ]
    for runs, change in enumerate(changes, 1):
        change()
        for _ in range(2):
            matrix_run.run([given], out, seconds=1)
            assert len(made) == runs
    own = dataclasses.replace(cell, model="nets/net.py:build")
    for _ in range(2):
        matrix_run.run([own], out, seconds=1)
    assert len(made) == len(changes) + 2, "what its code reads may be anywhere"


def test_a_cell_does_not_import_what_lies_beside_the_user(tmp_path, monkeypatch):
    for name in ("exporter", "onnx", "click"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('the one of the user')")
    monkeypatch.chdir(tmp_path)
    ended = process.run_limited(["inspect", "none.bundle"], seconds=100, memory=None)
    assert "none.bundle" in ended.reason
    assert ended.code == 5


def on_haswell(cell: plan.Cell, **changes) -> plan.Cell:
    return dataclasses.replace(cell, cpu="haswell", images=2, **changes)


@needs_qemu
def test_the_bundle_of_a_cell_is_run_on_an_emulated_cpu_and_not_exported_again(ran, monkeypatch):
    cell, out, result = ran
    monkeypatch.setattr(matrix_cell, "run_cell", lambda *_, **__: pytest.fail("it is exported already"))
    store(out / "results", result)
    cells = [cell, on_haswell(cell)]
    seen: list[tuple[str, bool]] = []
    done = lambda result, cached: seen.append((result.cpu, cached))  # noqa: E731
    host, haswell = matrix_run.run(cells, out, seconds=300, done=done)
    assert host == result
    assert haswell.status == "ok", haswell.reason
    assert haswell.engine["state"] == "emulated"
    assert haswell.figure("gate", "metrics", "images") == 2
    assert haswell.figure("gate", "eager_metrics", "sqnr") > 60
    assert haswell.figure("emulation", "host", "sqnr") > 60
    assert haswell.figure("emulation", "host", "max_difference") is not None
    assert haswell.instruction_set == "avx2"
    assert "emulated" in haswell.machine
    assert haswell.versions["qemu"] != "absent"
    assert haswell.random
    monkeypatch.setattr(matrix_cell, "run_on_cpu", lambda *_, **__: pytest.fail("it is verified already"))
    assert matrix_run.run(cells, out, seconds=300, done=done) == [host, haswell]
    assert seen == [("host", True), ("haswell", False), ("host", True), ("haswell", True)]


def test_an_emulated_cpu_runs_again_when_the_export_changed_and_only_then(ran, monkeypatch, tmp_path):
    cell, _, result = ran
    out, made = tmp_path / "out", []
    changed = {"sha256": result.engine["file"]["sha256"], "status": "ok"}

    def run_cell(cell, bundle, _limits):
        made.append("host")
        bundle.mkdir(parents=True, exist_ok=True)
        engine = {**result.engine, "file": {"sha256": changed["sha256"]}}
        return dataclasses.replace(result, engine=engine, status=changed["status"])

    def run_on_cpu(cell, exported, bundle, _limits):
        assert bundle.is_dir()
        made.append(cell.cpu)
        inputs = matrix_cell.inputs_on_cpu(cell, exported) or {}
        return dataclasses.replace(
            result,
            cpu=cell.cpu,
            command=tuple(cell.command()),
            inputs=inputs,
            versions=matrix_cell.versions(cell),
        )

    monkeypatch.setattr(matrix_cell, "run_cell", run_cell)
    monkeypatch.setattr(matrix_cell, "run_on_cpu", run_on_cpu)
    cells = [cell, on_haswell(cell)]

    def run(cells, **options):
        made.clear()
        found = matrix_run.run(cells, out, seconds=1, **options)
        return made, [one.status for one in found]

    assert run(cells[:1], keep_bundles=False) == (["host"], ["ok"])
    assert run(cells, keep_bundles=False) == (["host", "haswell"], ["ok", "ok"]), "its bundle was deleted"
    assert not list((out / "bundles").iterdir())
    assert run(cells, keep_bundles=False) == ([], ["ok", "ok"])
    assert run(cells) == (["host"], ["ok", "ok"]), "the same engine"
    nehalem = dataclasses.replace(cells[1], cpu="nehalem")
    assert run([*cells, nehalem]) == (["nehalem"], ["ok", "ok", "ok"])
    changed["sha256"] = "another"
    shutil.rmtree(out / "bundles")
    assert run(cells) == (["host", "haswell"], ["ok", "ok"]), "another engine"
    changed["status"] = "failed"
    assert run(cells, again=True) == (["host"], ["failed", "skipped"])
    assert on_haswell(cell).name not in stored(out / "results")


def test_a_cpu_that_cannot_be_emulated_here_fails_as_a_target_that_is_not_available(ran, monkeypatch):
    cell, out, result = ran
    store(out / "results", result)
    monkeypatch.setenv("PATH", "")
    _, nehalem = matrix_run.run([cell, dataclasses.replace(cell, cpu="nehalem")], out, seconds=300)
    assert (nehalem.status, nehalem.gate, nehalem.exit_code) == ("failed", False, 4)
    assert "qemu-x86_64 is not installed; next: install qemu-user" in nehalem.reason
    assert stored(out / "results")[nehalem.name] == nehalem
    target = dataclasses.replace(cell, target="tensorrt")
    skipped = matrix_run.left_out(on_haswell(target))
    assert (skipped.status, skipped.reason) == (
        "skipped",
        "not run on haswell: emulation runs engines of onnxruntime and openvino only",
    )


def test_a_run_that_is_stopped_leaves_no_old_result(ran, monkeypatch):
    cell, out, result = ran

    def run_cell(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(matrix_cell, "run_cell", run_cell)
    with pytest.raises(KeyboardInterrupt):
        matrix_run.run([cell], out, seconds=1, again=True)
    assert cell.name not in stored(out / "results")
    store(out / "results", result)


# -- several at once ---------------------------------------------------------------------------------------------


def four(cell: plan.Cell) -> list[plan.Cell]:
    return [dataclasses.replace(cell, model=f"resnet{i}") for i in (1, 2, 3, 4)]


def test_cells_run_at_once_each_with_its_cores_and_are_told_in_the_order_of_the_file(
    ran, tmp_path, monkeypatch
):
    cell, _, result = ran
    both, seen = threading.Barrier(2), []

    def run_cell(cell, bundle, limits):
        both.wait(timeout=60)  # ends only if two are here
        seen.append(limits.cores)
        return dataclasses.replace(result, model=cell.model, command=tuple(cell.command()))

    monkeypatch.setattr(matrix_cell, "run_cell", run_cell)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5})
    cells, told = four(cell), []
    found = matrix_run.run(
        cells, tmp_path, seconds=1, place=machine.Machine(2), done=lambda result, _: told.append(result.model)
    )
    assert [one.model for one in found] == [one.model for one in cells]
    assert sorted(told) == [one.model for one in cells]
    assert set(seen) == {frozenset({0, 2}), frozenset({1, 5})}
    assert len(stored(tmp_path / "results")) == 4


def test_cells_that_do_not_fit_into_memory_together_run_one_after_the_other(ran, tmp_path, monkeypatch):
    cell, _, result = ran
    running, most, asked = [], [], []

    def run_cell(cell, bundle, limits):
        running.append(cell)
        most.append(len(running))
        time.sleep(0.05)
        running.remove(cell)
        return dataclasses.replace(result, model=cell.model, command=tuple(cell.command()), peak_mib=100)

    def expected(cell):
        asked.append(cell.model)
        return 7 << 30

    monkeypatch.setattr(matrix_cell, "run_cell", run_cell)
    monkeypatch.setattr(machine, "available_memory", lambda: 8 << 30)
    matrix_run.run(four(cell), tmp_path, seconds=1, place=machine.Machine(4), expected=expected)
    assert max(most) == 1
    assert len(asked) == 4
    most.clear()
    matrix_run.run(four(cell), tmp_path, seconds=1, place=machine.Machine(4), expected=expected, again=True)
    assert max(most) > 1, "they took 100 MiB"
    assert len(asked) == 4


def test_one_that_never_fits_runs_alone(monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda: 1 << 30)
    with machine.Machine(2).room(9 << 30):
        pass


def test_what_ends_the_run_ends_the_cells_that_run(ran, tmp_path, monkeypatch):
    cell, _, _ = ran
    began, ended = threading.Barrier(2), []

    def run_cell(cell, bundle, limits):
        began.wait(timeout=60)
        if cell.model == "resnet1":
            raise KeyboardInterrupt
        ended.append(limits.stopped.wait(timeout=60))
        raise process.StoppedError

    monkeypatch.setattr(matrix_cell, "run_cell", run_cell)
    with pytest.raises(KeyboardInterrupt):
        matrix_run.run(four(cell), tmp_path, seconds=1, place=machine.Machine(2))
    for _ in range(600):
        if ended:
            break
        time.sleep(0.1)
    assert ended == [True], "the other one was ended, and no third began"


def test_a_process_is_killed_when_the_run_is_stopped():
    stopped = threading.Event()
    stopped.set()
    began = time.monotonic()
    with pytest.raises(process.StoppedError):
        process.run_limited(["list"], seconds=300, memory=None, stopped=stopped)
    assert time.monotonic() - began < 5


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_a_cell_uses_the_cores_that_it_is_given(ran, tmp_path):
    """One core where this process may use more, two where it may use one."""
    cell, _, _ = ran
    own = sorted(os.sched_getaffinity(0))
    cores, said = (own[:1], ", 1 core") if len(own) > 1 else ([0, 1], ", 2 cores")
    result = matrix_cell.run_cell(
        cell, tmp_path / "x.bundle", matrix_cell.Limits(300, cores=frozenset(cores))
    )
    assert result.status == "ok", result.reason
    assert result.engine["latency"]["machine"].endswith(said)


@pytest.mark.parametrize(("text", "jobs"), [("1", 1), ("12", 12), ("auto", machine.automatic_jobs())])
def test_jobs_are_a_number_or_chosen_by_the_cores(text, jobs):
    assert matrix_command._jobs(text) == jobs


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5", "", "99999"])
def test_jobs_that_are_no_number_are_refused_before_anything_runs(text, tmp_path, capsys):
    path = write(tmp_path / "m.yaml", SMALL)
    assert main(["matrix", str(path), f"--jobs={text}", "--out", str(tmp_path / "out")]) == 2
    assert f"--jobs {text}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_memory_of_a_network_that_no_run_has_measured_is_expected_from_its_shapes():
    def bytes_of(*arguments: str) -> int:
        return expected_memory(read_arguments([*arguments, "--weights=none"]))

    assert 1 << 30 < bytes_of("squeezenet1_1") < bytes_of("vgg11") < 12 << 30
    assert expected_memory(read_arguments(["vgg11", "--weights=none.pth"])) == UNKNOWN


def test_a_cell_gets_what_its_container_has_left(monkeypatch):
    monkeypatch.setattr(process, "available_memory", lambda: 8 << 30)
    assert process._budget(None) == 7 << 30


def test_a_failed_gate_is_told_by_the_exit_code_though_nobody_reads_on(ran, tmp_path):
    _, out, result = ran
    store(out / "results", dataclasses.replace(result, status="failed", gate=True, reason="sqnr"))
    path = write(tmp_path / "m.yaml", SMALL)
    reader, writer = os.pipe()
    os.close(reader)
    command = ["matrix", str(path), "--out", str(out), "--stored", "--json", str(tmp_path / "r.json")]
    done = subprocess.run(
        [sys.executable, "-m", "export_zoo", *command],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        cwd=ROOT,
    )
    os.close(writer)
    store(out / "results", result)
    assert done.returncode == 3, done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["exit_code"] == 3


def test_a_cell_that_takes_too_long_or_too_much_memory_is_ended(ran, tmp_path):
    cell, _, _ = ran
    late = matrix_cell.run_cell(cell, tmp_path / "a.bundle", matrix_cell.Limits(0.5))
    assert (late.status, late.gate, late.exit_code) == ("failed", False, None)
    assert late.reason == "took longer than 0.5 s"
    large = matrix_cell.run_cell(cell, tmp_path / "b.bundle", matrix_cell.Limits(300, 0.05))
    assert large.status == "failed"
    assert large.reason == "took more than 51 MiB of memory"
    assert not list(tmp_path.glob("*.bundle"))


def test_failures_of_cells_are_told_with_their_reason_and_do_not_stop_the_others(tmp_path):
    path = write(
        tmp_path / "m.yaml",
        SMALL.replace("fp32", "[fp16, fp32]")
        + """\
override:
  - {precisions: fp16, options: {weights: missing.pth}}
  - {precisions: fp32, options: {tolerance: sqnr=199}}
""",
    )
    code = main(
        [
            *("matrix", str(path), "--out", str(tmp_path / "out"), "--json", str(tmp_path / "r.json"), "-q"),
            *("--junit", str(tmp_path / "j.xml"), "--html", str(tmp_path / "p.html")),
            *("--markdown", str(tmp_path / "p.md")),
        ]
    )
    assert code == 3, "a gate failed"
    document = json.loads((tmp_path / "r.json").read_text())
    seen = {cell["precision"]: cell for cell in document["cells"]}
    assert seen["fp16"]["exit_code"] == 5
    assert not seen["fp16"]["gate"]
    assert "missing.pth" in seen["fp16"]["reason"]
    assert seen["fp32"]["exit_code"] == 3
    assert seen["fp32"]["gate"]
    assert "sqnr" in seen["fp32"]["reason"]
    assert seen["fp32"]["engine"]["state"] == "built"
    assert seen["fp32"]["nodes"] > 20, "what failed its gate is kept"
    suite = ET.parse(tmp_path / "j.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("2", "1", "1")
    assert "squeezenet1_1" in (tmp_path / "p.html").read_text()
    assert "missing.pth" in (tmp_path / "p.md").read_text()


def test_without_a_failed_gate_the_exit_code_is_that_of_bad_input(tmp_path, monkeypatch):
    failed = CellResult("resnet18", "onnxruntime", "fp32", (), "failed", "killed by signal 11")
    monkeypatch.setattr(matrix_run, "run", lambda *_, **__: [failed])
    path = write(tmp_path / "m.yaml", MINIMAL)
    assert main(["matrix", str(path), "-q"]) == 5


def test_a_crashed_process_is_told_by_its_signal_and_last_words():
    assert process._reason({}, -11, "a\nb\n") == "killed by signal 11: b"
    assert process._reason({}, 1, "") == "exit code 1"


def test_stored_results_are_told_without_running_anything(ran, tmp_path, monkeypatch, capsys):
    cell, out, result = ran
    monkeypatch.setattr(matrix_cell, "run_cell", lambda *_, **__: pytest.fail("nothing is to be run"))
    path = write(tmp_path / "m.yaml", SMALL.replace("fp32", "[fp32, fp16]"))
    store(out / "results", dataclasses.replace(result, versions={"torch": "0.1"}))
    page = tmp_path / "page.md"
    assert main(["matrix", str(path), "--out", str(out), "--stored", "--markdown", str(page)]) == 0
    assert "1 ok, 1 not run" in capsys.readouterr().out
    assert "1 ok, 1 not run yet." in page.read_text()
    assert str(out / "results") in page.read_text()
    assert f"| {cell.model} | {cell.engine} | ok | verified | 64x64 |" in page.read_text()
    assert result.date[:10] in page.read_text()
    assert main(["matrix", str(path), "--out", str(tmp_path / "none"), "--stored"]) == 2
    other = write(tmp_path / "other.yaml", SMALL.replace("1:2:3", "1:2:4"))
    assert main(["matrix", str(other), "--out", str(out), "--stored", "--markdown", str(page)]) == 0
    assert "1 result(s) were made with other options" in capsys.readouterr().err
    assert (
        "Made with other options than the file has now: squeezenet1_1-onnxruntime-fp32." in page.read_text()
    )
    excluded = path.read_text() + "exclude: [{models: squeezenet1_1, precisions: fp16, reason: slow}]\n"
    assert main(["matrix", str(write(path, excluded)), "--out", str(out), "--stored"]) == 0
    assert "1 ok, 1 excluded" in capsys.readouterr().out
    store(out / "results", result)


def test_an_output_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFailureError, match="cannot be created"):
        matrix_run.run([], tmp_path / "file" / "out", seconds=1)


# -- what is told ----------------------------------------------------------------------------------------------


def result(model="resnet18", precision="int8", **changes) -> CellResult:
    engine = {
        "state": "verified",
        "file": {"size_bytes": 11_831_664},
        "gate": {"eager_metrics": {"sqnr": 47.53, "top1": 0.9921}},
        "latency": {"speedup": 3.456},
    }
    known = {
        "status": "ok",
        "seconds": 12.34,
        "peak_mib": 1234,
        "nodes": 48,
        "exit_code": 0,
        "engine": engine,
    }
    return CellResult(model, "onnxruntime", precision, (), **(known | changes))


def test_a_row_shows_what_was_measured_and_nothing_else():
    shown = dict(zip(report.COLUMNS, report.cells_of(result()), strict=True))
    assert shown == {
        "model": "resnet18",
        "engine": "onnxruntime-int8",
        "result": "ok",
        "state": "verified",
        "SQNR dB": "47.5",
        "agreement": "99.2 %",
        "vs FP32": "3.46x",
        "MB": "11.8",
        "nodes": "48",
        "s": "12",
        "peak MiB": "1234",
    }
    nothing = CellResult("vgg11", "onnxruntime", "fp32", (), "excluded", "too old")
    assert set(report.cells_of(nothing)[3:]) == {"-"}
    assert "47.5*" in report.cells_of(result(random=True))


def test_the_line_of_a_cell_tells_why_it_failed():
    assert "3.46x, 12 s, 1234 MiB" in report.line(result(), 3, 12, False)
    failed = result(status="failed", reason="out of luck")
    assert report.line(failed, 3, 12, False).startswith("[ 3/12] resnet18")
    assert report.line(failed, 3, 12, False).endswith("FAILED   out of luck")
    assert report.line(result(), 3, 12, True).endswith("(earlier run)")


def emulated(**changes) -> CellResult:
    engine = {
        "state": "emulated",
        "gate": {"eager_metrics": {"sqnr": 47.53, "top1": 0.5}},
        "emulation": {"cpu": "haswell", "host": {"sqnr": 48.91, "max_difference": 0.0}},
    }
    return result(**({"cpu": "haswell", "engine": engine} | changes))


def test_what_an_emulated_cpu_gave_is_called_emulated_wherever_it_is_shown():
    text = "emulated, SQNR 47.5 dB (48.9 on this machine), logits equal to the bit"
    skipped = CellResult("resnet18", "tensorrt", "int8", (), "skipped", "not run", cpu="haswell")
    rows = [result(), emulated(), skipped]
    line = report.line(emulated(), 1, 2, False)
    assert "onnxruntime-int8 on haswell ok" in line
    assert line.endswith(f"{text}, 12 s, 1234 MiB")
    suite = ET.fromstring(report.junit(rows))[0]
    assert (suite.get("tests"), suite.get("skipped")) == ("3", "1")
    case = suite.find("./testcase[@name='onnxruntime-int8 on haswell, emulated']")
    assert case.findtext("system-out") == text
    page = report.markdown(rows, "x")
    assert "| onnxruntime-int8 on haswell | ok | emulated | - | 47.5 |" in page
    assert "| 48.9 | equal |" in page
    assert "- resnet18-tensorrt-int8-haswell: skipped: not run" in page
    html = report.html(rows, "x")
    assert "<td>onnxruntime-int8 on haswell</td><td>ok</td><td>emulated</td>" in html
    assert "<td>48.9</td><td>equal</td>" in html
    assert html.count("resnet18 onnxruntime-int8:") == 2, "plots show what was not emulated"
    assert report.totals(rows) == "2 ok, 1 skipped"
    assert "host dB" not in report.markdown([result(), skipped], "x")
    engine = emulated().engine | {"emulation": {"host": {"sqnr": 48.91, "max_difference": 0.0125}}}
    assert "logits differ by 0.013" in report.line(emulated(engine=engine), 1, 2, False)


def test_totals_count_each_kind():
    rows = [
        result(),
        result(),
        result(status="failed", gate=True),
        result(status="failed"),
        result(status="excluded"),
    ]
    assert report.totals(rows) == "2 ok, 1 gate failed, 1 failed, 1 excluded"


def test_junit_holds_each_cell_and_survives_odd_text():
    text = report.junit(
        [
            result(),
            result(precision="fp16", status="failed", reason='a <b> & "c" \x1b[0m\x00'),
            result("vgg11"),
        ]
    )
    root = ET.fromstring(text)
    assert [suite.get("name") for suite in root] == ["resnet18", "vgg11"]
    error = root.find("./testsuite/testcase[@name='onnxruntime-fp16']/error")
    assert error.get("message") == 'a <b> & "c" [0m'


def test_the_page_is_self_contained_escaped_and_plots_each_model():
    page = report.html(
        [result(), result("vgg11", reason="<script>", status="failed"), result("alexnet")], "A <title>"
    )
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "A &lt;title&gt;" in page
    assert page.count("<svg") == 2, "SQNR and speed"
    assert "resnet18 onnxruntime-int8: 47.53 dB" in page
    assert "alexnet onnxruntime-int8: 3.46 x" in page
    assert "vgg11 onnxruntime-int8: 47.53" not in page, "failed: no point"
    assert "http" not in page


def test_a_page_of_nothing_but_failures_has_no_plots():
    assert "<svg" not in report.html([result(status="failed", engine={})], "x")


# -- the command -----------------------------------------------------------------------------------------------


def test_github_gets_the_jobs_as_one_line_of_json(tmp_path, capsys):
    path = write(tmp_path / "m.yaml", MINIMAL + "jobs: [{name: a, runs-on: [self-hosted, gpu]}]\n")
    assert main(["matrix", str(path), "--github"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "include": [{"name": "a", "runs-on": ["self-hosted", "gpu"]}]
    }
    assert main(["matrix", str(path), "--github", "--job", "b*"]) == 2
    assert main(["matrix", str(write(path, MINIMAL)), "--github"]) == 2


def scripted(tmp_path: Path, text: str, *more: str) -> tuple[Path, int]:
    path, script = write(tmp_path / "m.yaml", text), tmp_path / "array.sh"
    code = main(["matrix", str(path), "--out", str(tmp_path / "out"), "--slurm", str(script), *more])
    return script, code


def test_slurm_gets_an_array_of_bundles_whose_tasks_run_one_by_one(tmp_path, capsys):
    """As Slurm would run it: the same script, with the index in the environment."""
    text = SMALL.replace("precisions: fp32", "precisions: [fp32, fp16]")
    script, code = scripted(tmp_path, text)
    assert code == 0
    assert f"{script}: 2 task(s); next: sbatch {script}" in capsys.readouterr().out
    lines = script.read_text().splitlines()
    asked = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH")
    )
    assert asked["array"] == "0-1"
    assert (tmp_path / "out").is_dir(), "Slurm opens the logs there, and a task fails if it cannot"
    assert 1000 < int(asked["mem"].removesuffix("M")) < 4000
    assert asked["time"] == "62"
    assert "gpus" not in asked
    for index in (0, 1):
        done = subprocess.run(
            ["bash", script],
            env={**os.environ, "SLURM_ARRAY_TASK_ID": str(index)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert len(stored(tmp_path / "out" / "results")) == index + 1
    assert sorted(stored(tmp_path / "out" / "results")) == [
        "squeezenet1_1-onnxruntime-fp16",
        "squeezenet1_1-onnxruntime-fp32",
    ]


def test_an_array_is_for_one_type_of_gpu(tmp_path, capsys):
    text = (
        SMALL
        + """\
jobs:
  - {name: cpu, runs-on: [x]}
  - {name: hopper, runs-on: [x], accelerators: [H200, H100], options: {seed: 1}}
"""
    )
    script, code = scripted(tmp_path, text, "--job", "hopper")
    assert code == 0
    assert "#SBATCH --gpus=1\n#SBATCH --constraint=h200|h100\n" in script.read_text()
    assert "--job=hopper" in script.read_text()
    text = text.replace("runs-on: [x]}", "runs-on: [x], precisions: fp16}", 1)
    text = text.replace("precisions: fp32", "precisions: [fp32, fp16]", 1)
    text = text.replace("options: {seed: 1}", "precisions: fp32", 1)
    script, code = scripted(tmp_path, text, "--job", "*")
    assert code == 2
    assert "--slurm: the cells are for different types of GPU" in capsys.readouterr().err


@pytest.mark.parametrize("more", [("--part", "1"), ("--jobs", "2"), ("--on", "ray")])
def test_an_array_divides_the_cells_itself(more, tmp_path, capsys):
    script, code = scripted(tmp_path, SMALL, *more)
    assert code == 2
    assert f"--slurm excludes {more[0]}" in capsys.readouterr().err
    assert not script.exists()


def test_a_part_that_is_not_there_is_refused(tmp_path, capsys):
    path = write(tmp_path / "m.yaml", SMALL)
    assert main(["matrix", str(path), "--part", "1", "--out", str(tmp_path / "out")]) == 2
    assert "--part 1: the matrix has parts 0 to 0" in capsys.readouterr().err


def test_a_dry_run_prints_command_lines_and_runs_nothing(tmp_path, capsys):
    path = write(tmp_path / "m.yaml", MINIMAL + "cpus: [host, haswell]\n")
    assert main(["matrix", str(path), "--dry-run", "--out", str(tmp_path / "out")]) == 0
    bundle = tmp_path / "out" / "bundles" / "resnet18-onnxruntime-fp32.bundle"
    assert capsys.readouterr().out.splitlines() == [
        f"export-zoo export resnet18 --precision=fp32 --target=onnxruntime --out={bundle}",
        f"export-zoo verify {bundle} --cpu=haswell --images=16",
    ]
    assert not (tmp_path / "out").exists()


def test_a_target_that_refuses_a_network_is_no_failed_gate():
    for kind, gate in (("state", True), ("refused", False)):
        assert process.Ended({"error": {"kind": kind}}, 6, "", 0, "").gate is gate
