"""`verify --cpu`: engines on emulated CPUs, what is attested of them, and the ARM64 root."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import platform
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from support.emulated import emulated_cpu, emulated_engine
from support.paths import ROOT

import export_zoo
from export_zoo.base import machine
from export_zoo.base.errors import BadInputError, EnvironmentFailureError, TargetUnavailableError, UsageError
from export_zoo.base.graph_io import sha256_of
from export_zoo.calibration.preprocess import normalize
from export_zoo.calibration.ranges import Ranges
from export_zoo.engines.bundle.manifest import Attestation, HostFigures
from export_zoo.engines.bundle.reader import attestations, held_out, read_manifest
from export_zoo.engines.emulation import arm64, arm64_root
from export_zoo.engines.emulation.cpus import CPUS, launch
from export_zoo.engines.emulation.engine import qemu_version
from export_zoo.engines.emulation.verify import FLOAT_IMAGES, IMAGES, _Beside, verify_on
from export_zoo.engines.emulation.worker import receive, send
from export_zoo.engines.parity.metrics import compare
from export_zoo.engines.precision.int8.qdq import quantize
from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine
from export_zoo.engines.targets.registry import TARGETS
from export_zoo.engines.verification.verify import verify

INT8 = "onnxruntime-int8"
x86 = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"),
    reason="runs this machine's Python as an x86-64 CPU",
)


def edit(bundle: Path, change) -> None:
    """Change the manifest's JSON."""
    path = bundle / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.fixture
def bundle(digits_bundle: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(digits_bundle, tmp_path / "digits.bundle"))


@pytest.fixture
def int8_bundle(bundle: Path) -> Path:
    """A copy with the INT8 engine only: each engine takes an emulated process of its own."""
    edit(bundle, only_int8)
    return bundle


def only_int8(document: dict[str, Any]) -> None:
    engines_ = document["artifacts"]["engines"]
    document["artifacts"]["engines"] = [engine for engine in engines_ if engine["name"] == INT8]


# -- verify --cpu ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verified:
    code: int
    out: str
    json: dict[str, Any]
    bundle: Path


@pytest.fixture(scope="module")
def verified(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Verified:
    """`verify BUNDLE --cpu haswell --cpu nehalem --images 2`, with one CPU given twice."""
    from export_zoo.exporter.cli.app import main

    for name in ("haswell", "nehalem"):
        emulated_cpu(name)
    folder = tmp_path_factory.mktemp("verified")
    copy, path, out = folder / "digits.bundle", folder / "result.json", io.StringIO()
    shutil.copytree(digits_bundle, copy)
    given = ["--cpu", "haswell", "--cpu", "nehalem", "--cpu", "haswell", "--images", "2"]
    with contextlib.redirect_stdout(out):
        code = main(["verify", str(copy), *given, "--json", str(path)])
    return Verified(code, out.getvalue(), json.loads(path.read_text()), copy)


def test_a_bundle_is_verified_on_emulated_cpus_and_each_engine_has_a_line(verified):
    assert verified.code == 0, verified.json["error"]
    lines = verified.out.splitlines()
    for cpu in ("haswell", "nehalem"):
        for name in ("onnxruntime-fp32", INT8):
            (line,) = (line for line in lines if line.startswith(f"{name} on {cpu}: ok, emulated, SQNR "))
            assert re.search(r" dB \(\d+\.\d\d here\), top-1 agreement 100\.0 % of 2 images; ", line)
        assert line.endswith("logits are equal to the bit"), "INT8 on another CPU differs"
    assert sum(line.startswith("attestation: ") for line in lines) == 2


def test_emulated_verification_is_in_the_json_document_and_attested_in_the_bundle(verified):
    haswell, nehalem = verified.json["emulated"]
    assert verified.json["error"] is None
    assert verified.json["bundle"] == str(verified.bundle)
    for name, found in (("haswell", haswell), ("nehalem", nehalem)):
        document = {key: value for key, value in found.items() if key != "attestation"}
        assert json.loads(Path(found["attestation"]).read_text()) == document
        attestation = Attestation.model_validate(document)
        assert attestation.emulation is not None
        assert attestation.emulation.cpu == name
        assert attestation.emulation.host[INT8].max_difference == 0
        assert attestation.emulation.host[INT8].sqnr == attestation.engines[INT8].eager_metrics["sqnr"]
        assert attestation.states == {}
        assert attestation.status == "ok"
        assert attestation.engines.keys() == {"onnxruntime-fp32", INT8}
        for gate in attestation.engines.values():
            assert gate.metrics["images"] == 2
            assert gate.tolerances.keys() == {"sqnr"}, "two images resolve neither shares nor classes"
        assert re.fullmatch(r"\d+\.\d+(\.\d+)?", attestation.versions["qemu"])
        assert attestation.versions["onnxruntime"] == ort.__version__
        assert attestation.versions["numpy"] == np.__version__
        assert attestation.machine.startswith(f"{name}, emulated by qemu ")
        assert attestation.compute_capability is None
    assert haswell["emulation"]["saturates"]
    assert not nehalem["emulation"]["saturates"]
    assert (haswell["instruction_set"], nehalem["instruction_set"]) == ("avx2", "x86_64")
    assert {a.emulation.cpu for a in attestations(verified.bundle).by_file.values() if a.emulation} == {
        "haswell",
        "nehalem",
    }


def test_verified_engines_stay_verified_after_an_emulated_verification_that_holds(verified):
    assert export_zoo.load(verified.bundle, engine=INT8).state == "verified"


@pytest.fixture(scope="module")
def old_bundle(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of an earlier version, whose INT8 engine can saturate and does not say so.

    Its SQNR must be within 3 dB of that of exact sums.
    """
    copy = tmp_path_factory.mktemp("old") / "digits.bundle"
    shutil.copytree(digits_bundle, copy)
    manifest = read_manifest(copy)
    assert manifest.recipe.calibration is not None
    ranges = Ranges.model_validate_json((copy / manifest.recipe.calibration.ranges.path).read_bytes())
    path = copy / "files" / "old.onnx"
    before = replace(TARGETS["onnxruntime"].int8, sums_in_16_bits=False)
    quantize(copy / manifest.recipe.graph.path, ranges, path, rules=before)
    held = held_out(copy, manifest)
    inputs = normalize(held.pixels[:IMAGES], manifest.recipe.preprocess)
    exact = compare(held.logits[:IMAGES], OnnxRuntimeEngine(path).run(inputs)).sqnr

    def change(document: dict[str, Any]) -> None:
        only_int8(document)
        (int8,) = document["artifacts"]["engines"]
        int8["file"] = {
            "path": "files/old.onnx",
            "sha256": sha256_of(path),
            "size_bytes": path.stat().st_size,
        }
        int8["gate"]["tolerances"]["sqnr"] = exact - 3
        int8["saturating_cpu_session"] = None

    edit(copy, change)
    return copy


def test_int8_of_an_earlier_version_is_exact_on_a_cpu_that_saturates(old_bundle, cli):
    emulated_cpu("haswell")
    done = cli("verify", old_bundle, "--cpu", "haswell")
    assert done.code == 0, done.err
    (found,) = done.json["emulated"]
    assert found["emulation"]["saturates"]
    assert found["emulation"]["host"][INT8]["max_difference"] == 0
    assert found["engines"][INT8]["metrics"]["images"] == IMAGES


def test_verify_warns_of_int8_that_can_saturate_here_and_of_no_other(old_bundle, bundle, monkeypatch):
    monkeypatch.setattr("export_zoo.engines.verification.verify.saturates", lambda: True)
    edit(bundle, lambda document: document["artifacts"]["engines"][1].update(saturating_cpu_session=None))
    assert verify(bundle)[0].warnings == []
    (warning,) = verify(old_bundle)[0].warnings
    assert warning.startswith(
        f"{INT8}: sums of INT8 saturate on this CPU; it runs with session.x64quantprecision=1"
    )


@pytest.mark.parametrize("given", [[], ["--cpu", "nehalem", "--images", "2"]], ids=["here", "nehalem"])
def test_int8_that_falsely_says_that_it_cannot_saturate_fails_where_nothing_saturates(
    given, old_bundle, tmp_path, cli, monkeypatch
):
    if given:
        emulated_cpu("nehalem")
    monkeypatch.setattr("export_zoo.engines.targets.onnxruntime.engine.saturates", lambda: False)
    bundle = shutil.copytree(old_bundle, tmp_path / "digits.bundle")
    edit(bundle, lambda document: document["artifacts"]["engines"][0].update(saturating_cpu_session={}))
    done = cli("verify", bundle, *given)
    assert done.code == 3
    assert "the manifest says that sums of INT8 cannot saturate" in done.json["error"]["message"]


def test_int8_that_saturates_and_says_that_it_cannot_ends_with_3(old_bundle, tmp_path, cli):
    """The red test of the one before: all that differs is the option."""
    emulated_cpu("haswell")
    bundle = shutil.copytree(old_bundle, tmp_path / "digits.bundle")
    edit(bundle, lambda document: document["artifacts"]["engines"][0].update(saturating_cpu_session={}))
    done = cli("verify", bundle, "--cpu", "haswell")
    assert done.code == 3
    assert f"{INT8} on haswell: FAILED, emulated, SQNR " in done.out
    assert f"{INT8} on haswell: batch " in done.json["error"]["message"]
    assert "sqnr is" in done.json["error"]["message"]
    assert "export the bundle again" in done.json["error"]["hint"]
    (found,) = done.json["emulated"]
    assert found["status"] == "failed"
    assert json.loads(Path(found["attestation"]).read_text())["status"] == "failed"


@pytest.mark.parametrize("name", ["cortex-a53", "neoverse-n1"])
def test_int8_is_within_a_tenth_of_a_decibel_on_arm64(name, int8_bundle):
    if not arm64.usable(arm64.default_root()):
        pytest.skip(f"there is no ARM64 root in {arm64.default_root()}")
    attestation, path = verify_on(int8_bundle, emulated_cpu(name), images=4)
    assert path is not None
    assert attestation.status == "ok"
    assert attestation.instruction_set == "aarch64"
    assert attestation.emulation is not None
    assert attestation.emulation.cpu == name
    assert not attestation.emulation.saturates
    here, there = attestation.emulation.host[INT8].sqnr, attestation.engines[INT8].eager_metrics["sqnr"]
    assert here is not None
    assert there == pytest.approx(here, abs=0.1)


# -- the command line ------------------------------------------------------------------------------------------


def test_cpus_are_listed_without_a_bundle(cli):
    done = cli("verify", "--cpu", "list")
    assert done.code == 0
    lines = done.out.splitlines()
    assert [line.split()[:2] for line in lines] == [[cpu.name, cpu.machine] for cpu in CPUS.values()]
    assert "sums of INT8 saturate" in lines[0]
    assert [cpu["name"] for cpu in done.json["cpus"]] == [*CPUS]


def test_cpus_are_listed_alone_and_nothing_is_verified_without_a_bundle(cli, tmp_path):
    for beside in ([tmp_path], ["--cpu", "haswell"], ["--images", "4"]):
        done = cli("verify", "--cpu", "list", *beside)
        assert done.code == 2
        assert done.json["error"]["message"].startswith("--cpu list: cannot be combined")
    done = cli("verify")
    assert done.code == 2
    assert "BUNDLE" in done.json["error"]["message"]


def test_an_unknown_cpu_is_refused_with_those_there_are(cli, tmp_path):
    done = cli("verify", tmp_path, "--cpu", "z80")
    assert done.code == 2
    assert "'z80'" in done.json["error"]["message"]
    assert all(name in done.json["error"]["hint"] for name in CPUS)


def test_images_without_a_cpu_are_refused(cli, tmp_path):
    done = cli("verify", tmp_path, "--images", "4")
    assert done.code == 2
    assert "--images" in done.json["error"]["message"]
    assert "--cpu" in done.json["error"]["hint"]


def test_a_missing_qemu_ends_with_4_and_the_package_that_has_it(digits_bundle, cli, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("haswell", "cortex-a53"):
        done = cli("verify", digits_bundle, "--cpu", name)
        assert done.code == 4
        assert f"--cpu {name}: qemu-{CPUS[name].machine} is not installed" in done.json["error"]["message"]
        assert "qemu-user" in done.json["error"]["hint"]
        assert "emulated" not in done.json
    assert not (digits_bundle / "attestations").exists()


def program(folder: Path, name: str, script: str) -> Path:
    """A program of its own in a folder."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`qemu(script)`: a qemu-x86_64 that goes before the real one, called with `-cpu NAME PYTHON ...`."""

    def make(script: str) -> None:
        version = '[ "$1" = --version ] && { echo "qemu-x86_64 version 9.8.7 (Debian)"; exit; }'
        program(tmp_path / "bin", "qemu-x86_64", f"{version}\n{script}")
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    qemu_version.cache_clear()
    yield make
    qemu_version.cache_clear()


HOST = 'shift 2; exec "$@"'
"""A qemu that emulates nothing: the program runs as this machine."""


def test_a_missing_arm64_root_ends_with_4_and_what_makes_it(digits_bundle, cli, tmp_path, monkeypatch):
    program(tmp_path / "bin", "qemu-aarch64", "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("EXPORT_ZOO_ARM64_ROOT", str(empty))
    done = cli("verify", digits_bundle, "--cpu", "neoverse-n1")
    assert done.code == 4
    assert str(empty) in done.json["error"]["message"]
    assert "python -m export_zoo.engines.emulation.arm64_root" in done.json["error"]["hint"]
    assert "EXPORT_ZOO_ARM64_ROOT" in done.json["error"]["hint"]


@x86
def test_what_one_cpu_lacks_is_told_before_another_is_run(digits_bundle, cli, tmp_path, monkeypatch):
    program(tmp_path / "bin", "qemu-aarch64", "exit 1")
    program(tmp_path / "bin", "qemu-x86_64", f": > {tmp_path / 'ran'}; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("EXPORT_ZOO_ARM64_ROOT", str(tmp_path / "none"))
    done = cli("verify", digits_bundle, "--cpu", "haswell", "--cpu", "neoverse-n1")
    assert done.code == 4
    assert "--cpu neoverse-n1: " in done.json["error"]["message"]
    assert not (tmp_path / "ran").exists()


@x86
def test_an_onnx_runtime_that_does_not_start_ends_with_4_and_its_last_words(digits_bundle, cli, qemu):
    noise = "qemu-x86_64: warning: TCG doesn't support requested feature: CPUID.01H:ECX.pcid [bit 17]"
    qemu(f'echo "{noise}" >&2; echo "Illegal instruction: vpdpbusd" >&2; echo "{noise}" >&2; exit 132')
    done = cli("verify", digits_bundle, "--cpu", "haswell")
    assert done.code == 4
    assert done.json["error"]["message"] == (
        "--cpu haswell: onnxruntime does not start under qemu 9.8.7, exit code 132: Illegal instruction: vpdpbusd"
    )
    assert done.json["error"]["hint"]
    assert not (digits_bundle / "attestations").exists()


@x86
def test_a_cpu_that_cannot_be_run_does_not_lose_what_was_found_on_another(int8_bundle, cli, qemu):
    qemu(f'case "$2" in Nehalem*) exit 9;; esac; {HOST}')
    done = cli("verify", int8_bundle, "--cpu", "haswell", "--cpu", "nehalem", "--images", "2")
    assert done.code == 4
    assert done.json["bundle"] == str(int8_bundle)
    assert [found["emulation"]["cpu"] for found in done.json["emulated"]] == ["haswell"]


@x86
def test_an_engine_that_does_not_run_on_the_cpu_does_not_lose_what_was_found_of_another(
    digits_bundle, bundle, cli, qemu
):
    qemu(f'case "$*" in *int8*) echo "no kernels" >&2; exit 9;; esac; {HOST}')
    done = cli("verify", bundle, "--cpu", "haswell", "--images", "2")
    assert done.code == 4
    assert f"{INT8} on haswell cannot be run" in done.json["error"]["message"]
    (found,) = done.json["emulated"]
    assert [*found["engines"]] == ["onnxruntime-fp32"]
    (warning,) = found["warnings"]
    assert warning.startswith(f"{INT8}: not run: --cpu haswell: onnxruntime does not start")
    assert warning.endswith("no kernels")
    assert json.loads(Path(found["attestation"]).read_text())["engines"].keys() == {"onnxruntime-fp32"}


@x86
def test_another_version_of_onnx_runtime_is_warned_of(int8_bundle, cli, qemu, monkeypatch):
    qemu(HOST)
    monkeypatch.setattr(
        "export_zoo.engines.emulation.verify.library_versions", lambda *names: dict.fromkeys(names, "1.99.0")
    )
    done = cli("verify", int8_bundle, "--cpu", "haswell", "--images", "2")
    assert done.code == 0
    (warning,) = done.json["warnings"]
    assert warning.startswith(
        f"--cpu haswell: the emulated CPU ran onnxruntime {ort.__version__}, this machine ran 1.99.0"
    )
    assert done.json["emulated"][0]["warnings"] == [warning]


@x86
def test_a_bundle_that_failed_its_gate_ends_with_3_on_an_emulated_cpu_too(int8_bundle, cli, qemu):
    qemu(HOST)
    edit(int8_bundle, lambda document: document.update(status="failed"))
    done = cli("verify", int8_bundle, "--cpu", "haswell", "--images", "2")
    assert done.code == 3
    assert "failed its parity gate when it was exported" in done.json["error"]["message"]
    assert f"{INT8} on haswell: ok, emulated" in done.out


@x86
def test_a_damaged_file_ends_verification_on_an_emulated_cpu(digits_bundle, bundle, cli, qemu):
    qemu(HOST)
    manifest = read_manifest(bundle)
    file = next(f for f in manifest.files() if not f.path.endswith((".npy", ".onnx")))
    with (bundle / file.path).open("ab") as stream:
        stream.write(b" ")
    done = cli("verify", bundle, "--cpu", "haswell", "--images", "2")
    assert done.code == 5
    assert file.path in done.json["error"]["message"]


@x86
def test_an_engine_outside_its_tolerance_on_an_emulated_cpu_ends_with_3(bundle, cli, qemu):
    def change(document: dict[str, Any]) -> None:
        document["artifacts"]["engines"][1]["gate"]["tolerances"]["sqnr"] = 199

    qemu(HOST)
    edit(bundle, change)
    done = cli("verify", bundle, "--cpu", "haswell", "--images", "8")
    assert done.code == 3
    assert "onnxruntime-fp32 on haswell: ok, emulated" in done.out
    assert f"{INT8} on haswell: FAILED, emulated" in done.out
    assert "onnxruntime-fp32" not in done.json["error"]["message"]
    assert "cannot saturate" not in done.json["error"]["hint"]
    assert f"{INT8} on haswell: batch 8: sqnr is " in done.json["error"]["message"]
    (found,) = done.json["emulated"]
    counts = {name: gate["metrics"]["images"] for name, gate in found["engines"].items()}
    assert counts == {"onnxruntime-fp32": FLOAT_IMAGES, INT8: 8}
    assert found["engines"][INT8]["tolerances"].keys() == {"sqnr", "misplaced"}
    assert found["status"] == "failed"
    assert found["states"] == {}


@x86
def test_a_damaged_engine_is_not_run(int8_bundle, cli, qemu):
    qemu("exit 99")
    path = int8_bundle / read_manifest(int8_bundle).artifacts.engines[0].file.path
    path.write_bytes(path.read_bytes()[:-1])
    done = cli("verify", int8_bundle, "--cpu", "haswell")
    assert done.code == 5
    assert "checksum mismatch" in done.json["error"]["message"]


@x86
def test_a_bundle_without_an_engine_of_onnx_runtime_ends_with_4(int8_bundle, cli, qemu):
    def change(document: dict[str, Any]) -> None:
        (engine,) = document["artifacts"]["engines"]
        engine.update(
            name="tensorrt-int8", target="tensorrt", graph=engine["file"], saturating_cpu_session=None
        )
        engine["file"] = {**engine["file"], "path": "files/a.engine"}
        engine["plan"] = {
            "version": "10.0",
            "compute_capabilities": ["8.9"],
            "hardware_compatible": False,
            "version_compatible": False,
            "refittable": False,
            "strip_weights": False,
            "workspace_mb": None,
        }

    qemu("exit 99")
    edit(int8_bundle, change)
    done = cli("verify", int8_bundle, "--cpu", "haswell")
    assert done.code == 4
    assert "no engine of onnxruntime" in done.json["error"]["message"]


@x86
def test_a_bundle_that_cannot_be_written_to_is_verified_all_the_same(int8_bundle, cli, qemu):
    qemu(HOST)
    (int8_bundle / "attestations").write_text("in the way")
    done = cli("verify", int8_bundle, "--cpu", "haswell", "--images", "2")
    assert done.code == 0
    assert "attestation: not written" in done.out
    assert done.json["emulated"][0]["attestation"] is None


# -- attestations ----------------------------------------------------------------------------------------------

EMULATION = {"cpu": "haswell", "saturates": True, "host": {}}


def attest(
    bundle: Path, name: str, *, emulated: bool, failed: bool, instruction_set: str = "", cpu: str = "haswell"
) -> None:
    """Write an attestation of INT8 under a name; the later name is the newer one."""
    attestation, path = verify(bundle)
    assert path is not None
    path.unlink()
    document = attestation.model_dump(mode="json")
    if emulated:
        document |= {"emulation": {**EMULATION, "cpu": cpu}, "states": {}}
    if failed:
        document["engines"][INT8]["failures"] = ["as it was"]
        document["status"] = "failed"
    document["instruction_set"] = instruction_set or machine.instruction_set()
    path.with_name(f"{name}.json").write_text(json.dumps(document))


def test_an_engine_that_failed_when_its_cpu_was_emulated_is_not_verified_on_such_a_machine(bundle):
    def faster(document: dict[str, Any]) -> None:
        fp32, int8 = document["artifacts"]["engines"]
        fp32["latency"]["speedup"], int8["latency"]["speedup"] = 1.0, 3.0

    edit(bundle, faster)
    attest(bundle, "2026", emulated=True, failed=True, instruction_set="Z80")
    assert export_zoo.load(bundle).name == INT8, "that is no machine like this one"
    attest(bundle, "2027", emulated=True, failed=True)
    assert export_zoo.load(bundle).name == "onnxruntime-fp32"
    assert export_zoo.load(bundle, engine=INT8).state == "built"


@pytest.mark.parametrize("state", ["built", "graph verified", "verified"])
def test_emulation_that_holds_leaves_the_state_as_it_was(bundle, state):
    edit(bundle, lambda document: document["artifacts"]["engines"][1].update(state=state))
    attest(bundle, "2026", emulated=True, failed=False)
    assert export_zoo.load(bundle, engine=INT8).state == state


@pytest.mark.parametrize("failed", [False, True])
def test_a_real_machines_attestation_goes_before_newer_ones_of_emulated_cpus(bundle, failed):
    attest(bundle, "2026", emulated=False, failed=failed)
    attest(bundle, "2027", emulated=True, failed=not failed)
    assert export_zoo.load(bundle, engine=INT8).state == ("built" if failed else "verified")


@pytest.mark.parametrize("failed", ["haswell", "nehalem"])
def test_what_failed_on_one_emulated_cpu_is_not_hidden_by_another(failed, bundle):
    for year, cpu in enumerate(("haswell", "nehalem"), 2026):
        attest(bundle, str(year), emulated=True, failed=cpu == failed, cpu=cpu)
    assert export_zoo.load(bundle, engine=INT8).state == "built"
    attest(bundle, "2028", emulated=True, failed=False, cpu=failed)
    assert export_zoo.load(bundle, engine=INT8).state == "verified"


def test_the_newest_of_two_emulated_attestations_counts(bundle):
    attest(bundle, "2026", emulated=True, failed=True)
    attest(bundle, "2027", emulated=True, failed=False)
    assert export_zoo.load(bundle, engine=INT8).state == "verified"


# -- the emulated process --------------------------------------------------------------------------------------


class Given:
    """An engine whose outputs are given."""

    def __init__(self, *outputs: list[float]) -> None:
        self.outputs = tuple(np.array(output, np.float32) for output in outputs)

    def run_all(self, batch: np.ndarray) -> tuple[np.ndarray, ...]:
        return self.outputs


@pytest.mark.parametrize(
    ("there", "here", "difference"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.0], [1.5, 2.25], 0.5),
        ([np.nan, np.inf, -np.inf], [np.nan, np.inf, -np.inf], 0.0),
        ([np.nan, 1.0], [1.0, 1.0], None),
        ([1.0, 1.0], [np.nan, 1.0], None),
        ([np.inf, 1.0], [1.0, 1.0], None),
        ([np.inf, 1.0], [-np.inf, 1.0], None),
    ],
)
def test_largest_difference_is_a_number_that_json_holds(there, here, difference):
    both = _Beside(Given(there, [0.0]), Given(here, [0.0]))
    assert np.array_equal(both.run_all(np.zeros(1))[0], np.array(there, np.float32), equal_nan=True)
    figures = HostFigures(sqnr=None, max_difference=both.difference)
    read = HostFigures.model_validate(
        json.loads(json.dumps(figures.model_dump(mode="json"), allow_nan=False))
    )
    assert read == HostFigures.model_validate_json(figures.model_dump_json()) == figures
    if difference is None:
        assert both.difference > 1e38
    else:
        assert both.difference == difference


def test_the_largest_difference_is_that_of_all_batches_and_outputs():
    both = _Beside(Given([1.0], [2.0, 5.0]), Given([1.0], [2.0, 2.0]))
    both.run_all(np.zeros(1))
    both._here = Given([1.0], [2.0, 5.0])
    both.run_all(np.zeros(1))
    assert both.difference == 3.0


def test_messages_come_out_as_they_went_in():
    arrays = (np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros((0, 4), np.float32))
    stream = io.BytesIO()
    send(stream, arrays)
    send(stream, arrays[:1])
    stream.seek(0)
    first, second = receive(stream), receive(stream)
    assert first is not None
    assert second is not None
    assert [a.tolist() for a in first] == [a.tolist() for a in arrays]
    assert [a.shape for a in first] == [(2, 3), (0, 4)]
    assert len(second) == 1
    assert receive(stream) is None


def test_a_message_that_ends_early_is_none():
    stream = io.BytesIO()
    send(stream, (np.arange(6, dtype=np.float32),))
    whole = stream.getvalue()
    assert receive(io.BytesIO(whole)) is not None
    for length in range(len(whole)):
        assert receive(io.BytesIO(whole[:length])) is None, length


@pytest.fixture
def int8_graph(digits_bundle: Path) -> Path:
    manifest = read_manifest(digits_bundle)
    return digits_bundle / manifest.artifacts.engines[1].file.path


@x86
def test_an_engine_in_a_process_of_its_own_gives_what_it_gives_here(int8_graph, qemu):
    qemu(HOST)
    here = OnnxRuntimeEngine(int8_graph)
    with emulated_engine(int8_graph, CPUS["haswell"]) as engine:
        assert engine.emulated.session_config == here.session_config
        assert engine.emulated.versions["qemu"] == "9.8.7"
        for count in (1, 3):
            batch = np.random.default_rng(count).normal(size=(count, 3, 32, 32)).astype(np.float32)
            (found,) = engine.run_all(batch)
            assert np.array_equal(found, here.run(batch))


@x86
def test_the_process_imports_this_package_wherever_the_user_is(int8_graph, qemu, tmp_path, monkeypatch):
    qemu(HOST)
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "__init__.py").write_text("raise ImportError('of the current directory')")
    shutil.copy(int8_graph, tmp_path / "int8.onnx")
    monkeypatch.chdir(tmp_path)
    with emulated_engine(Path("int8.onnx"), CPUS["haswell"]) as engine:
        assert engine.run_all(np.zeros((1, 3, 32, 32), np.float32))[0].shape == (1, 10)


@x86
def test_what_the_process_prints_does_not_get_between_its_messages(int8_graph, qemu, tmp_path):
    """The program's own directory comes first among those that a module is imported from."""
    noisy = tmp_path / "noisy" / "onnxruntime.py"
    noisy.parent.mkdir()
    noisy.write_text(
        "import os, sys\n"
        "print('a library says hello', flush=True)\n"
        "os.write(1, b'and a C library, too')\n"
        "sys.path.remove(os.path.dirname(__file__)); del sys.modules['onnxruntime']\n"
        "import onnxruntime; sys.modules[__name__] = onnxruntime\n"
    )
    qemu(f'export PYTHONPATH="{noisy.parent}:$PYTHONPATH"; {HOST}')
    with emulated_engine(int8_graph, CPUS["haswell"]) as engine:
        (found,) = engine.run_all(np.zeros((1, 3, 32, 32), np.float32))
        engine._errors.seek(0)
        assert b"a library says hello" in engine._errors.read()
    assert found.shape == (1, 10)


@x86
def test_a_file_that_onnx_runtime_does_not_load_is_bad_input(qemu, tmp_path):
    qemu(HOST)
    (tmp_path / "graph.onnx").write_text("not a graph")
    with pytest.raises(BadInputError, match=r"--cpu haswell: .*graph\.onnx: is no ONNX file") as raised:
        emulated_engine(tmp_path / "graph.onnx", CPUS["haswell"])
    assert raised.value.hint


@x86
def test_a_graph_that_cannot_run_exactly_there_is_unavailable(qemu, tmp_path):
    said = {"error": "x.onnx: int8 sums saturate on this CPU", "hint": "export again", "exit_code": 4}
    qemu(f"echo '{json.dumps(said)}'")
    with pytest.raises(
        TargetUnavailableError, match=r"^--cpu haswell: x\.onnx: int8 sums saturate"
    ) as raised:
        emulated_engine(tmp_path / "x.onnx", CPUS["haswell"])
    assert raised.value.hint == "export again"


@x86
def test_an_emulator_that_computes_nothing_any_more_is_killed(digits_bundle, cli, qemu, monkeypatch):
    monkeypatch.setattr("export_zoo.engines.emulation.engine.STUCK_SECONDS", 0.5)
    qemu("echo waiting for a lock >&2; exec sleep 1000")
    done = cli("verify", digits_bundle, "--cpu", "haswell")
    assert done.code == 4
    assert done.json["error"]["message"].startswith(
        "--cpu haswell: onnxruntime is stuck under qemu 9.8.7, exit code -9"
    )
    assert "computed nothing for 0.5 s, and was killed; waiting for a lock" in done.json["error"]["message"]


@x86
@pytest.mark.parametrize("end", ["exit 0", "kill -9 $$", "sleep 1000"])
def test_an_emulator_that_says_something_else_ends_with_4(end, digits_bundle, cli, qemu):
    qemu(f"echo qemu-x86_64 is not what you think; exec sh -c '{end}'")
    done = cli("verify", digits_bundle, "--cpu", "haswell")
    assert done.code == 4
    assert "says 'qemu-x86_64 is not what you think' and does not start" in done.json["error"]["message"]


def test_figures_are_told_where_the_disk_is_full(int8_bundle, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("export_zoo.engines.verification.verify.replacing", full)
    attestation, path = verify(int8_bundle)
    assert path is None
    assert attestation.engines[INT8].metrics["sqnr"]


SAYS_AND_ENDS = """
echo '{"instruction_set": "avx2", "saturates": true, "session_config": {}, "versions": {}}'
echo "uncaught target signal 11 (Segmentation fault)" >&2
exit 139
"""


@x86
@pytest.mark.parametrize("count", [1, 200], ids=["fits in the pipe", "does not"])
def test_a_process_that_ends_while_it_is_fed_is_unavailable_with_its_last_words(count, qemu, tmp_path):
    qemu(SAYS_AND_ENDS)

    def feed() -> None:
        with emulated_engine(tmp_path / "graph.onnx", CPUS["haswell"]) as engine:
            engine._process.wait()
            engine.run_all(np.zeros((count, 3, 32, 32), np.float32))

    with pytest.raises(
        TargetUnavailableError, match=r"onnxruntime ended .*exit code 139: .*Segmentation fault"
    ):
        feed()


@x86
def test_the_process_ends_with_its_engine(int8_graph, qemu):
    qemu(HOST)
    with emulated_engine(int8_graph, CPUS["haswell"]) as engine:
        process = engine._process
        assert process.poll() is None
    assert process.poll() is not None


# -- the ARM64 root --------------------------------------------------------------------------------------------

RECORD = {"debian": "bookworm", "python": "3.11", "numpy": "2.4.6", "onnxruntime": "1.31.1"}
PARTS = [
    "root/usr/bin/python3.11",
    "root/lib/ld-linux-aarch64.so.1",
    "site/numpy/__init__.py",
    "site/onnxruntime/__init__.py",
    *(f"cpu/{cpu}/proc/cpuinfo" for cpu in arm64.CPUS),
    *(f"cpu/{cpu}/lib" for cpu in arm64.CPUS),
    "root.json",
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The files that a root is recognized by, most of them empty."""
    made = tmp_path / "arm64-root"
    for part in PARTS[:4]:
        (made / part).parent.mkdir(parents=True, exist_ok=True)
        (made / part).write_text("")
    arm64_root._add_cpus(made)
    (made / "root.json").write_text(json.dumps(RECORD))
    return made


def test_a_whole_root_is_usable_and_says_its_versions(root):
    assert arm64.usable(root)
    assert arm64.versions(root) == RECORD
    assert arm64.site(root) == root / "site"


@pytest.mark.parametrize("part", PARTS)
def test_a_root_that_lacks_a_part_is_not_usable(part, root):
    (root / part).unlink()
    assert not arm64.usable(root)


@pytest.mark.parametrize("record", ["", "{", "{}", "[]", "null", '{"onnxruntime": 1}', b"\xff\xfe"])
def test_a_root_with_a_damaged_record_is_not_usable(record, root):
    data = record if isinstance(record, bytes) else record.encode()
    (root / "root.json").write_bytes(data)
    assert not arm64.usable(root)
    assert arm64.versions(root) == {}


def test_an_empty_folder_and_none_are_not_usable(tmp_path):
    (tmp_path / "empty").mkdir()
    assert not arm64.usable(tmp_path / "empty")
    assert not arm64.usable(tmp_path / "none")


def test_each_cpu_has_a_cpuinfo_of_its_own(root):
    text = {cpu: (root / "cpu" / cpu / "proc" / "cpuinfo").read_text() for cpu in arm64.CPUS}
    assert "CPU part\t: 0xd03" in text["cortex-a53"]
    assert "CPU part\t: 0xd0c" in text["neoverse-n1"]
    assert all(found.count("processor\t: ") >= 256 for found in text.values())


def test_the_place_of_the_root_is_the_variables_then_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EXPORT_ZOO_ARM64_ROOT", "/somewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert arm64.default_root() == Path("/somewhere")
    monkeypatch.delenv("EXPORT_ZOO_ARM64_ROOT")
    assert arm64.default_root() == tmp_path / "export-zoo" / "arm64-root"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert arm64.default_root() == Path.home() / ".cache" / "export-zoo" / "arm64-root"


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Let arm64_root find these libraries here."""
    monkeypatch.setattr(arm64_root, "library_versions", lambda name: {name: versions.get(name, "absent")})


def test_a_root_that_is_there_is_not_made_again(root, monkeypatch):
    monkeypatch.setenv("PATH", "")
    installed(monkeypatch, onnxruntime=RECORD["onnxruntime"])
    assert not arm64_root.make(root)
    assert not arm64_root.make(root, onnxruntime="1.31.1")
    with pytest.raises(UsageError, match=r"has ONNX Runtime 1\.31\.1, not 1\.30\.0"):
        arm64_root.make(root, onnxruntime="1.30.0")
    installed(monkeypatch, onnxruntime="1.32.0")
    with pytest.raises(UsageError, match=r"has ONNX Runtime 1\.31\.1, not 1\.32\.0") as raised:
        arm64_root.make(root)
    assert "--onnxruntime 1.31.1" in raised.value.hint
    assert not arm64_root.make(root, onnxruntime="1.31.1")
    installed(monkeypatch)
    assert not arm64_root.make(root)


@pytest.mark.parametrize(
    ("has", "said"), [({}, "no OpenVINO"), ({"openvino": "2025.4.0"}, "OpenVINO 2025.4.0")]
)
def test_a_root_of_another_openvino_is_not_kept(has, said, root, monkeypatch):
    (root / "root.json").write_text(json.dumps(RECORD | has))
    installed(monkeypatch, onnxruntime=RECORD["onnxruntime"], openvino="2026.4.1")
    with pytest.raises(UsageError, match=rf"has {said}; 2026\.4\.1 is installed here") as raised:
        arm64_root.make(root)
    assert "--onnxruntime 1.31.1" in raised.value.hint
    assert not arm64_root.make(root, onnxruntime="1.31.1")
    (root / "root.json").write_text(json.dumps(RECORD | {"openvino": "2026.4.1"}))
    assert not arm64_root.make(root)


@pytest.mark.parametrize("what", ["folder", "file", "link", "damaged root"])
def test_a_root_is_not_made_over_something_else(what, root, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    place = tmp_path / "place"
    if what == "folder":
        place.mkdir()
        (place / "thesis.tex").write_text("mine")
    elif what == "file":
        place.write_text("mine")
    elif what == "link":
        (tmp_path / "empty").mkdir()
        place.symlink_to("empty")
    else:
        place = root
        (root / "root.json").unlink()
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    with pytest.raises(UsageError, match="exists, and is not a usable ARM64 root"):
        arm64_root.make(place)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_the_mirror_is_the_variables_then_that_of_apt(monkeypatch, tmp_path):
    monkeypatch.setenv("DEBIAN_MIRROR", "http://mirror.example/debian")
    assert arm64_root.mirror_of_apt() == "http://mirror.example/debian"
    monkeypatch.delenv("DEBIAN_MIRROR")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    lines = [
        " 500 http://security.example/debian-security bookworm-security/main amd64 Packages",
        " 500 https://deb.example/debian bookworm/main amd64 Packages",
    ]
    program(tmp_path / "bin", "apt-cache", f"echo '{lines[0]}'; echo '{lines[1]}'")
    assert arm64_root.mirror_of_apt() == "https://deb.example/debian"


@pytest.mark.parametrize(
    "apt", [None, "echo ' 500 http://archive.ubuntu.com/ubuntu noble/main amd64 Packages'"]
)
def test_a_machine_whose_apt_knows_no_mirror_of_debian_is_told_how_to_name_one(apt, monkeypatch, tmp_path):
    monkeypatch.delenv("DEBIAN_MIRROR", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    if apt is not None:
        program(tmp_path / "bin", "apt-cache", apt)
    with pytest.raises(TargetUnavailableError) as raised:
        arm64_root.mirror_of_apt()
    assert "DEBIAN_MIRROR" in raised.value.hint


MAKERS = {"apt-get": "exit 1", "dpkg-deb": "exit 1", "qemu-aarch64": "exit 1"}


@pytest.fixture
def makers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH of programs that fail, and a file of keys."""
    pytest.importorskip("pip", reason="pip downloads the wheels")
    for name, script in MAKERS.items():
        program(tmp_path / "bin", name, script)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}")
    monkeypatch.setattr(arm64_root, "KEYRING", tmp_path / "keys")
    (tmp_path / "keys").write_text("")
    return tmp_path / "bin"


@pytest.mark.parametrize("missing", MAKERS)
def test_a_program_that_is_missing_is_named_with_its_package(missing, makers, tmp_path):
    (makers / missing).unlink()
    with pytest.raises(TargetUnavailableError, match=f"{missing} is not installed") as raised:
        arm64_root.make(tmp_path / "root", mirror="http://mirror.example/debian")
    assert raised.value.hint


def test_missing_keys_are_named(makers, tmp_path):
    (tmp_path / "keys").unlink()
    with pytest.raises(TargetUnavailableError, match="keys is missing") as raised:
        arm64_root.make(tmp_path / "root", mirror="http://mirror.example/debian")
    assert "debian-archive-keyring" in raised.value.hint


def test_a_download_that_fails_is_an_environment_failure_and_leaves_nothing(makers, tmp_path):
    program(
        makers,
        "apt-get",
        "echo 'W: a warning'; echo 'E: Failed to fetch http://mirror.example' >&2; exit 100",
    )
    with pytest.raises(
        EnvironmentFailureError, match=r"apt-get update failed: E: Failed to fetch http://mirror\.example$"
    ) as raised:
        arm64_root.make(tmp_path / "place" / "root", mirror="http://mirror.example/debian")
    assert "http://mirror.example/debian" in raised.value.hint
    assert list((tmp_path / "place").iterdir()) == []


def test_a_full_disk_is_an_environment_failure_and_nothing_is_downloaded(makers, tmp_path, monkeypatch):
    monkeypatch.setattr(arm64_root, "_NEEDED_BYTES", 1 << 62)
    program(makers, "apt-get", f"touch {tmp_path / 'ran'}; exit 1")
    with pytest.raises(EnvironmentFailureError, match="MB free") as raised:
        arm64_root.make(tmp_path / "root", mirror="http://mirror.example/debian")
    assert raised.value.hint == "free some disk space"
    assert not (tmp_path / "ran").exists()


def test_a_place_that_cannot_be_written_to_is_an_environment_failure(makers, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFailureError, match="was not made") as raised:
        arm64_root.make(tmp_path / "file" / "root", mirror="http://mirror.example/debian")
    assert "can be written to" in raised.value.hint


def test_the_program_ends_with_the_errors_exit_code_and_hint(root, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")
    assert arm64_root.main([str(tmp_path / "file")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {tmp_path / 'file'}: exists")
    assert "\nhint: " in captured.err
    installed(monkeypatch)
    assert arm64_root.main([str(root)]) == 0
    assert capsys.readouterr().out == (
        f"{root}: already there, debian bookworm, python 3.11, numpy 2.4.6, onnxruntime 1.31.1\n"
    )


def test_the_command_names_the_cpu_and_its_files(root, tmp_path, monkeypatch):
    program(tmp_path / "bin", "qemu-aarch64", "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    found = arm64.command(root, "cortex-a53")
    assert found[1:5] == ["-cpu", "cortex-a53", "-L", str(root / "cpu" / "cortex-a53")]
    with pytest.raises(UsageError, match="'cortex-x9': not a CPU") as raised:
        arm64.command(root, "cortex-x9")
    assert "neoverse-n1" in raised.value.hint
    (tmp_path / "bin" / "qemu-aarch64").unlink()
    with pytest.raises(TargetUnavailableError, match=r"qemu-aarch64 is not installed"):
        arm64.command(root, "cortex-a53")


def test_the_roots_python_reads_its_own_files_whatever_this_machines_python_reads(
    root, tmp_path, monkeypatch
):
    program(tmp_path / "bin", "qemu-aarch64", "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYTHONHOME", "/usr")
    monkeypatch.setenv("EXPORT_ZOO_ARM64_ROOT", str(root))
    with pytest.raises(TargetUnavailableError, match="has no openvino") as raised:
        launch(CPUS["neoverse-n1"], "openvino")
    assert "remove it and make it again" in raised.value.hint
    environment = launch(CPUS["neoverse-n1"]).environment
    assert environment["PYTHONHOME"] == ""
    assert environment["PYTHONPATH"].split(":") == [str(root / "site"), str(ROOT)]
