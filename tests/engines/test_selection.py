"""Which engine is best here: one table of cases for Python and C++ (engines/cpp/tests/engine_test.cpp runs it, too)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.paths import ROOT

import export_zoo
from export_zoo.base.graph_io import sha256_of
from export_zoo.base.machine import instruction_set
from export_zoo.engines.bundle.reader import attestations, read_manifest
from export_zoo.engines.bundle.selection import rank, standing

CASES = json.loads((ROOT / "tests" / "cases" / "selection.json").read_text())
SPEEDUPS = {"onnxruntime-fp32": 1.0, "onnxruntime-int8": 2.0}


def prepare(bundle: Path, case: dict) -> None:
    """Give a bundle the engines' states and speeds, and the attestations, of a case."""
    path = bundle / "manifest.json"
    document = json.loads(path.read_text())
    for engine in document["artifacts"]["engines"]:
        changed = dict(case.get("engines", {}).get(engine["name"], {}))
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
            "emulation": {"cpu": emulated, "saturates": False, "host": {}} if emulated else None,
        }
        text = given.get("text", json.dumps(written))
        (bundle / "attestations" / f"{number}.json").write_text(text)


@pytest.mark.parametrize("case", CASES, ids=[case["case"] for case in CASES])
def test_the_best_engine_is_chosen_and_why_is_said(case, digits_bundle, tmp_path):
    bundle = Path(shutil.copytree(digits_bundle, tmp_path / "digits.bundle"))
    prepare(bundle, case)
    found = export_zoo.load(bundle)
    assert found.name == case["chosen"]
    assert case.get("why", "") in found.why
    attested = attestations(bundle)
    known = read_manifest(bundle).artifacts.engines
    verified = [engine for engine in known if standing(engine, attested).state == "verified"]
    assert max(verified, key=rank).name == case["chosen"], "what Triton is given"
