"""Bundles that earlier versions wrote (tests/cases/bundles, a folder for each version) load, run and verify."""

from __future__ import annotations

import shutil

import pytest
from support.paths import ROOT

import export_zoo
from export_zoo.calibration.preprocess import normalize
from export_zoo.engines.bundle.reader import attestations, held_out, read_manifest
from export_zoo.engines.parity.metrics import compare

BUNDLES = sorted(path for path in (ROOT / "tests" / "cases" / "bundles").iterdir() if path.is_dir())


@pytest.fixture(params=BUNDLES, ids=lambda path: path.name)
def bundle(request):
    return request.param


def test_every_engine_of_onnxruntime_gives_its_logits(bundle):
    manifest = read_manifest(bundle)
    assert not manifest.unknown_engines
    held = held_out(bundle, manifest)
    engines = [e for e in manifest.artifacts.engines if e.target == "onnxruntime"]
    assert {e.precision for e in engines} == {"fp32", "fp16", "int8"}
    for engine in engines:
        loaded = export_zoo.load(bundle, engine=engine.name)
        assert loaded.state == "verified"
        found = compare(held.logits, loaded.run(normalize(held.pixels, manifest.recipe.preprocess)))
        assert abs(found.sqnr - engine.gate.eager_metrics["sqnr"]) < (3 if engine.precision == "int8" else 20)
        assert found.top1 == engine.gate.eager_metrics["top1"]


def test_its_attestations_are_read(bundle):
    found = attestations(bundle)
    assert found.by_file
    assert not found.unreadable


def test_it_is_verified_and_inspected(bundle, tmp_path, cli):
    copy = tmp_path / "copy.bundle"
    shutil.copytree(bundle, copy)
    done = cli("verify", copy)
    assert done.code == 0, done.err
    assert set(done.json["engines"]) == {e.name for e in read_manifest(bundle).artifacts.engines}
    assert cli("inspect", copy).code == 0
