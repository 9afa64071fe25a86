"""Which engine is best here: one table of cases for Python and C++ (engines/cpp/tests/engine_test.cpp runs it, too)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.paths import ROOT

import export_zoo
from export_zoo.base.graph_io import sha256_of
from export_zoo.base.machine import instruction_set
from export_zoo.engines.bundle import local_latencies
from export_zoo.engines.bundle.reader import attestations, read_manifest
from export_zoo.engines.bundle.selection import fastest_first, speeds, standing

CASES = json.loads((ROOT / "tests" / "cases" / "selection.json").read_text())
SPEEDUPS = {"onnxruntime-fp32": 1.0, "onnxruntime-int8": 2.0}


def prepare(bundle: Path, case: dict) -> None:
    """Give a bundle the engines' states and speeds, and the attestations, of a case."""
    path = bundle / "manifest.json"
    document = json.loads(path.read_text())
    latencies = {}
    for engine in document["artifacts"]["engines"]:
        changed = dict(case.get("engines", {}).get(engine["name"], {}))
        latencies[engine["name"]] = dict(engine["latency"])
        engine["latency"]["speedup"] = changed.pop("speedup", SPEEDUPS[engine["name"]])
        engine.update(changed)
    path.write_text(json.dumps(document))
    gates = {engine["name"]: engine["gate"] for engine in document["artifacts"]["engines"]}
    (bundle / "attestations").mkdir()
    for number, given in case.get("attestations", {}).items():
        attested = {
            name: {
                **gate,
                "ran": given.get("ran", "engine"),
                "failures": ["wrong"] * (name in given.get("failed", [])),
            }
            for name, gate in gates.items()
        }
        emulated = given.get("emulated")
        written = {
            "schema_version": 1,
            "manifest_sha256": given.get("manifest_sha256", sha256_of(path)),
            "created": "2026-01-01T00:00:00+00:00",
            "machine": "a machine",
            "instruction_set": given.get("instruction_set", instruction_set()),
            "compute_capability": None,
            "versions": {},
            "status": "ok",
            "warnings": [],
            "engines": attested,
            "states": {},
            "latencies": {
                name: {**latencies[name], "speedup": speedup}
                for name, speedup in given.get("speedups", {}).items()
            },
            "emulation": {"cpu": emulated, "saturates": False, "host": {}} if emulated else None,
        }
        text = given.get("text", json.dumps(written))
        (bundle / "attestations" / f"{number}.json").write_text(text)
    if "kept_ms" in case:
        local_latencies.write(local_latencies.file_for(bundle, None, 0), case["kept_ms"])


@pytest.mark.parametrize("case", CASES, ids=[case["case"] for case in CASES])
def test_the_best_engine_is_chosen_and_why_is_said(case, digits_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("EXPORT_ZOO_CACHE", str(tmp_path / "cache"))
    bundle = Path(shutil.copytree(digits_bundle, tmp_path / "digits.bundle"))
    prepare(bundle, case)
    found = export_zoo.load(bundle, measure=case.get("measure", True))
    assert found.name == case["chosen"]
    assert case.get("why", "") in found.why
    attested = attestations(bundle)
    known = read_manifest(bundle).artifacts.engines
    verified = [engine for engine in known if standing(engine, attested).state == "verified"]
    if "measured here" not in case.get("why", ""):
        best = fastest_first(verified, speeds(verified, attested))[0]
        assert best.name == case["chosen"], "what Triton is given"


def test_engines_that_no_machine_like_this_one_timed_are_timed_once(digits_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("EXPORT_ZOO_CACHE", str(tmp_path / "cache"))
    bundle = Path(shutil.copytree(digits_bundle, tmp_path / "digits.bundle"))
    elsewhere = {"instruction_set": "z80"}
    prepare(bundle, {"engines": {"onnxruntime-fp32": elsewhere, "onnxruntime-int8": elsewhere}})
    assert "another instruction set" in export_zoo.load(bundle, measure=False).why
    kept = local_latencies.file_for(bundle, None, 0)
    assert kept is not None
    assert not kept.exists()
    found = export_zoo.load(bundle)
    median_ms = local_latencies.read(kept)
    assert set(median_ms) == {"onnxruntime-fp32", "onnxruntime-int8"}
    assert found.name == min(median_ms, key=lambda name: median_ms[name])
    assert "measured here, " in found.why
    assert found.why.endswith(" images per second")
    assert found.run(np.zeros((1, 3, 32, 32), dtype=np.float32)).shape == (1, 10)
    # The next load reads the file, and measures what is not in it.
    other = max(median_ms, key=lambda name: median_ms[name])
    local_latencies.write(kept, {found.name: 9.0, other: 3.0})
    assert export_zoo.load(bundle).name == other
    local_latencies.write(kept, {found.name: 9.0})
    assert export_zoo.load(bundle).name in median_ms
    assert set(local_latencies.read(kept)) == set(median_ms)
    assert local_latencies.read(kept)[found.name] != 9.0
    for damaged in ("{", "[]", '{"median_ms": {"onnxruntime-fp32": "fast"}}', "[" * 100_000):
        kept.write_text(damaged)
        assert local_latencies.read(kept) == {}
        assert "measured here, " in export_zoo.load(bundle).why


def test_latencies_that_cannot_be_kept_are_measured_again(digits_bundle, tmp_path, monkeypatch):
    bundle = Path(shutil.copytree(digits_bundle, tmp_path / "digits.bundle"))
    elsewhere = {"instruction_set": "z80"}
    prepare(bundle, {"engines": {"onnxruntime-fp32": elsewhere, "onnxruntime-int8": elsewhere}})
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("EXPORT_ZOO_CACHE", str(tmp_path / "a file"))
    assert "measured here, " in export_zoo.load(bundle).why


def test_verify_times_the_engines_for_load(digits_bundle, tmp_path):
    bundle = Path(shutil.copytree(digits_bundle, tmp_path / "digits.bundle"))
    attestation, path = export_zoo.verify(bundle, latencies=False)
    assert attestation.latencies == {}
    assert "measured at export" in export_zoo.load(bundle).why
    attestation, path = export_zoo.verify(bundle)
    assert path is not None
    timed = {name: latency.speedup for name, latency in attestation.latencies.items()}
    assert set(timed) == {"onnxruntime-fp32", "onnxruntime-int8"}
    assert timed["onnxruntime-fp32"] == 1.0
    found = export_zoo.load(bundle)
    assert found.name == max(timed, key=lambda name: timed[name])
    assert (
        f"measured by attestations/{path.name}: {attestation.machine}, {timed[found.name]:.2f}x" in found.why
    )


def test_the_command_verify_tells_the_speed_unless_it_is_told_not_to(digits_bundle, tmp_path, cli):
    bundle = Path(shutil.copytree(digits_bundle, tmp_path / "digits.bundle"))
    told = cli("verify", bundle)
    assert "1.00x the speed of FP32" in told.out
    assert set(told.json["latencies"]) == {"onnxruntime-fp32", "onnxruntime-int8"}
    silent = cli("verify", bundle, "--no-latency")
    assert (silent.code, silent.json["latencies"]) == (0, {})
    assert "the speed of FP32" not in silent.out
    refused = cli("verify", bundle, "--no-latency", "--cpu", "haswell")
    assert refused.code == 2
    assert "--no-latency has no effect with --cpu" in refused.json["error"]["message"]
