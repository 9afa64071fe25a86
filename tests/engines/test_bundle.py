"""The bundle: loaded, run and verified without PyTorch; damage and tampering found; published whole or not at all."""

from __future__ import annotations

import errno
import gc
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support.paths import ROOT

import export_zoo
from export_zoo.base.errors import BadInputError, ParityError, TargetUnavailableError, UsageError
from export_zoo.base.graph_io import sha256_of
from export_zoo.calibration.preprocess import normalize
from export_zoo.engines.bundle import manifest as manifest_module
from export_zoo.engines.bundle.manifest import Attestation, File, Manifest
from export_zoo.engines.bundle.reader import checked, held_out, read_manifest
from export_zoo.engines.parity.metrics import compare
from export_zoo.engines.targets.onnxruntime.target import OnnxRuntime
from export_zoo.engines.targets.registry import TARGETS
from export_zoo.engines.verification.verify import verify
from export_zoo.exporter import publish as publish_module
from export_zoo.exporter.publish import check_destination, describe, failed_place, publish

ENGINES = ["onnxruntime-fp32", "onnxruntime-int8"]


@pytest.fixture
def bundle(digits_bundle, tmp_path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(digits_bundle, tmp_path / "digits.bundle"))


def _edit(bundle: Path, change) -> None:
    """Change the manifest's JSON by hand."""
    path = bundle / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def _tree(directory: Path) -> dict[str, str]:
    """Every file below a directory, by its hash."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): sha256_of(path) for path in files}


# -- load and run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "sqnr"), zip(ENGINES, [100, 20], strict=True))
def test_engine_gives_the_held_out_logits(digits_bundle, name, sqnr):
    engine = export_zoo.load(digits_bundle, engine=name)
    assert (engine.name, engine.state, engine.why) == (name, "verified", "asked for")
    held = held_out(digits_bundle, engine.manifest)
    batch = normalize(held.pixels[:32], engine.manifest.recipe.preprocess)
    found = compare(held.logits[:32], engine.run(batch))
    assert found.sqnr > sqnr
    assert found.top1 > 0.9


@pytest.mark.parametrize("where", ["initializer", "attribute"])
def test_weights_in_files_that_the_manifest_does_not_list_are_refused(bundle, where):
    def promise(document):
        document["artifacts"]["engines"][0]["file"] |= {
            "sha256": sha256_of(path),
            "size_bytes": path.stat().st_size,
        }

    path = bundle / read_manifest(bundle).artifacts.engines[0].file.path
    model = onnx.load(path)
    if where == "attribute":
        tensor = onnx.helper.make_tensor(
            "c", onnx.TensorProto.FLOAT, [1], np.zeros(1, np.float32).tobytes(), raw=True
        )
        model.graph.node.append(onnx.helper.make_node("Constant", [], ["unused"], value=tensor))
        tensor = model.graph.node[-1].attribute[0].t
    else:
        tensor = next(t for t in model.graph.initializer if len(t.dims) == 4)
    (path.parent / "other.bin").write_bytes(tensor.raw_data)
    onnx.external_data_helper.set_external_data(tensor, "other.bin")
    tensor.ClearField("raw_data")
    path.write_bytes(model.SerializeToString())
    _edit(bundle, promise)
    for action in (lambda: export_zoo.load(bundle, engine="onnxruntime-fp32"), lambda: verify(bundle)):
        with pytest.raises(
            BadInputError, match=r"has weights in 'other.bin', which the manifest does not list"
        ):
            action()


def test_a_bundle_can_be_loaded_by_a_string(digits_bundle):
    assert export_zoo.load(str(digits_bundle)).run(np.zeros((1, 3, 32, 32), dtype=np.float32)).shape == (
        1,
        10,
    )


@pytest.mark.parametrize("fastest", ENGINES)
def test_fastest_verified_engine_is_chosen_and_why_is_said(bundle, fastest):
    def change(document):
        for engine in document["artifacts"]["engines"]:
            engine["latency"]["speedup"] = 3.25 if engine["name"] == fastest else 1.0

    _edit(bundle, change)
    engine = export_zoo.load(bundle)
    assert engine.name == fastest
    assert "3.25x" in engine.why


def test_attestations_that_are_no_files_are_left_out(bundle):
    place = bundle / "attestations"
    (place / "29990101T000000000000Z.json").mkdir(parents=True)
    os.mkfifo(place / "29990101T000000000001Z.json")
    (place / "29990101T000000000002Z.json").write_text("{")
    found = export_zoo.load(bundle, engine="onnxruntime-int8")
    assert found.state == "verified"
    for number in range(3):
        text = f"attestations/29990101T00000000000{number}Z.json cannot be read, and is not used"
        assert text in found.why
        assert text in export_zoo.load(bundle).why


def test_verify_tells_what_it_found_where_no_attestation_can_be_written(bundle):
    (bundle / "attestations").write_text("in the way")
    attestation, path = verify(bundle)
    assert attestation.status == "ok"
    assert path is None


@pytest.mark.parametrize("state", ["built", "graph verified"])
def test_engine_that_was_not_verified_is_not_chosen_however_fast(bundle, state):
    def change(document):
        fp32, int8 = document["artifacts"]["engines"]
        fp32["latency"]["speedup"], int8["latency"]["speedup"] = 1.0, 100.0
        int8["state"] = state

    _edit(bundle, change)
    assert export_zoo.load(bundle).name == "onnxruntime-fp32"
    assert export_zoo.load(bundle, engine="onnxruntime-int8").state == state


def test_what_verify_finds_here_overrules_the_manifest(bundle):
    def change(document):
        fp32, int8 = document["artifacts"]["engines"]
        fp32["latency"]["speedup"], int8["latency"]["speedup"] = 1.0, 100.0
        fp32["state"] = "graph verified"
        int8["gate"]["tolerances"]["sqnr"] = 500  # as if this machine's kernels were wrong

    _edit(bundle, change)
    assert export_zoo.load(bundle).name == "onnxruntime-int8"
    attestation, path = verify(bundle)
    assert attestation.status == "failed"
    assert path is not None
    found = export_zoo.load(bundle)
    assert (found.name, found.state) == ("onnxruntime-fp32", "verified")
    told = f"onnxruntime-int8 was left out: built, not verified (attestations/{path.name}: {attestation.machine})"
    assert told in found.why
    named = export_zoo.load(bundle, engine="onnxruntime-int8")
    assert (named.state, named.why) == (
        "built",
        f"asked for; built (attestations/{path.name}: {attestation.machine})",
    )


def test_an_attestation_or_manifest_with_a_number_that_is_none_is_damaged(bundle):
    _, path = verify(bundle)
    document = json.loads(path.read_text())
    document["engines"]["onnxruntime-int8"]["eager_metrics"]["sqnr"] = float("nan")
    path.write_text(json.dumps(document))
    assert f"attestations/{path.name} cannot be read" in export_zoo.load(bundle).why
    _edit(
        bundle,
        lambda document: document["artifacts"]["engines"][0]["gate"]["metrics"].update(sqnr=float("nan")),
    )
    with pytest.raises(BadInputError, match="damaged manifest"):
        export_zoo.load(bundle)


@pytest.mark.parametrize(
    "change",
    [
        {"instruction_set": "Z80"},
        {"manifest_sha256": "0" * 64},
        {"schema_version": 2},
        {"engines": {}, "latencies": {}},  # its times would count: INT8 is no faster on some CPUs
    ],
)
def test_attestations_of_other_machines_and_manifests_change_nothing(bundle, change):
    def faster(document):
        document["artifacts"]["engines"][1]["latency"]["speedup"] = 100.0
        document["artifacts"]["engines"][1]["gate"]["tolerances"]["sqnr"] = 500

    _edit(bundle, faster)
    _, path = verify(bundle)
    assert path is not None
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert export_zoo.load(bundle).name == "onnxruntime-int8"


def test_the_newest_attestation_counts(bundle):
    _, path = verify(bundle)
    assert path is not None
    failed = json.loads(path.read_text())
    failed["engines"]["onnxruntime-int8"]["failures"] = ["as it was"]
    path.with_name("20200101T000000000000Z.json").write_text(json.dumps(failed))
    assert export_zoo.load(bundle, engine="onnxruntime-int8").state == "verified"
    path.with_name("29990101T000000000000Z.json").write_text(json.dumps(failed))
    assert export_zoo.load(bundle, engine="onnxruntime-int8").state == "built"


def _later(document, index=1):
    """As a later version of the schema may write it: fields that are new, and an engine of a target that is."""
    document["recipe"]["further"] = document["further"] = {"new": [1]}
    for number, engine in enumerate(document["artifacts"]["engines"]):
        engine["gate"]["further_figure"] = 1.0
        if number == index:
            engine.update(name="coreml-int8", target="coreml", cache={"what": "ever"})


def test_engines_and_fields_of_a_later_version_are_left_out_and_why_says_so(bundle):
    _edit(bundle, _later)
    assert read_manifest(bundle).unknown_engines == ("coreml-int8",)
    found = export_zoo.load(bundle)
    assert found.name == "onnxruntime-fp32"
    assert "; coreml-int8 was left out: this version does not know it" in found.why
    with pytest.raises(
        BadInputError, match="'coreml-int8' is of a target or precision that this version does not"
    ):
        export_zoo.load(bundle, engine="coreml-int8")
    attestation, _ = verify(bundle)
    assert attestation.states == {"onnxruntime-fp32": "verified"}
    assert attestation.warnings == ["coreml-int8: not run, this version does not know it"]


def test_a_precision_of_a_later_version_is_left_out(bundle):
    changed = {"name": "onnxruntime-fp8", "precision": "fp8"}
    _edit(bundle, lambda document: document["artifacts"]["engines"][0].update(changed))
    assert read_manifest(bundle).unknown_engines == ("onnxruntime-fp8",)
    assert export_zoo.load(bundle).name == "onnxruntime-int8"


def test_a_bundle_of_which_no_engine_is_known_says_to_update(bundle):
    _edit(bundle, lambda document: document["artifacts"]["engines"].pop(0))
    _edit(bundle, lambda document: _later(document, 0))
    with pytest.raises(BadInputError, match="this version knows none of its engines: coreml-int8") as raised:
        export_zoo.load(bundle)
    assert "update export-zoo" in raised.value.hint


def test_names_of_a_later_version_do_not_keep_a_bundle_from_being_loaded(bundle):
    def change(document):
        document["recipe"]["source"]["zoo"] = "hub"
        document["recipe"]["source"]["weights"]["kind"] = "hub"
        for engine in document["artifacts"]["engines"]:
            engine["gate"]["tolerances"]["sharpness"] = 1.0

    _edit(bundle, change)
    assert export_zoo.load(bundle).name
    with pytest.raises(ParityError, match="does not know the metric sharpness") as raised:
        verify(bundle)
    assert "update export-zoo" in raised.value.hint


def test_a_task_of_a_later_version_is_verified_by_the_limits_of_all_outputs(bundle):
    limits = [set(engine.gate.tolerances) for engine in read_manifest(bundle).artifacts.engines]
    assert all("top1" in found for found in limits)
    _edit(bundle, lambda document: document["recipe"]["output"].update(task="pose"))
    attestation, _ = verify(bundle, latencies=False)
    assert attestation.status == "ok"
    assert all(
        "sqnr" in gate.tolerances and "top1" not in gate.tolerances for gate in attestation.engines.values()
    )


def test_a_place_that_cannot_be_written_to_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(publish_module.os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UsageError, match="cannot be written to") as raised:
        check_destination(tmp_path / "new" / "out")
    assert str(tmp_path) in raised.value.message


def test_an_engine_whose_package_is_not_installed_is_left_out(bundle, monkeypatch):
    class Other(OnnxRuntime):
        name = "other"
        distribution = "no-such-package"

        def open(self, opening):
            raise AssertionError("it cannot be opened")

    monkeypatch.setitem(TARGETS, "other", Other())

    def change(document):
        (engine, *_) = document["artifacts"]["engines"]
        document["artifacts"]["engines"].append({**engine, "name": "other-fp32", "target": "other"})

    _edit(bundle, change)
    found = export_zoo.load(bundle)
    assert found.name.startswith("onnxruntime")
    assert "the package no-such-package is not installed" in found.why


def test_preprocessing_of_a_later_version_is_refused_for_it_changes_logits(bundle):
    _edit(bundle, lambda document: document["recipe"]["preprocess"].update(pad=4))
    with pytest.raises(BadInputError, match=r"recipe\.preprocess\.pad"):
        export_zoo.load(bundle)


def test_bundle_without_a_verified_engine_says_so(bundle):
    _edit(bundle, lambda document: [e.update(state="built") for e in document["artifacts"]["engines"]])
    with pytest.raises(
        TargetUnavailableError, match=r"no verified engine.*onnxruntime-int8: built, not verified"
    ):
        export_zoo.load(bundle)


def test_unknown_engine_is_refused_with_those_there_are(digits_bundle):
    with pytest.raises(BadInputError, match="no engine 'tensorrt-fp16'") as raised:
        export_zoo.load(digits_bundle, engine="tensorrt-fp16")
    assert all(name in raised.value.hint for name in ENGINES)


def test_failed_bundle_is_refused_unless_asked_for(bundle):
    _edit(bundle, lambda document: document.update(status="failed"))
    with pytest.raises(ParityError, match="failed its parity gate") as raised:
        export_zoo.load(bundle)
    assert "allow_failed" in raised.value.hint
    with pytest.raises(ParityError):
        export_zoo.load(bundle, engine="onnxruntime-fp32")
    batch = np.zeros((1, 3, 32, 32), dtype=np.float32)
    assert export_zoo.load(bundle, engine="onnxruntime-fp32", allow_failed=True).run(batch).shape == (1, 10)


@pytest.mark.parametrize("count", [1, 8, 32])
def test_any_batch_in_the_range_runs(digits_bundle, count):
    batch = np.random.default_rng(0).normal(size=(count, 3, 32, 32)).astype(np.float32)
    logits = export_zoo.load(digits_bundle).run(batch)
    assert (logits.shape, logits.dtype) == ((count, 10), np.float32)


@pytest.mark.parametrize("count", [0, 33, 1000])
def test_batch_out_of_the_range_is_refused_with_the_range(digits_bundle, count):
    with pytest.raises(
        BadInputError, match=f"batch {count} is outside this bundle's range 1 to 32"
    ) as raised:
        export_zoo.load(digits_bundle).run(np.zeros((count, 3, 32, 32), dtype=np.float32))
    assert "--batch" in raised.value.hint


@pytest.mark.parametrize(
    ("shape", "dtype", "says"),
    [
        ((2, 3, 32, 32), np.float64, "input float64 [2, 3, 32, 32]"),
        ((2, 3, 32, 32), np.uint8, "input uint8 [2, 3, 32, 32]"),
        ((2, 3, 32, 31), np.float32, "input float32 [2, 3, 32, 31]"),
        ((2, 32, 32, 3), np.float32, "input float32 [2, 32, 32, 3]"),
        ((3, 32, 32), np.float32, "input float32 [3, 32, 32]"),
        ((), np.float32, "input float32 []"),
    ],
)
def test_wrong_input_is_refused_with_what_is_expected(digits_bundle, shape, dtype, says):
    with pytest.raises(BadInputError) as raised:
        export_zoo.load(digits_bundle).run(np.zeros(shape, dtype=dtype))
    assert says in str(raised.value)
    assert "expected float32 ['batch', 3, 32, 32]" in str(raised.value)


def test_input_that_is_a_view_gives_the_same_logits(digits_bundle):
    engine = export_zoo.load(digits_bundle)
    images = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
    view = np.moveaxis(images, 3, 1)
    assert not view.flags.c_contiguous
    np.testing.assert_array_equal(engine.run(view), engine.run(np.ascontiguousarray(view)))


@pytest.mark.parametrize(("threads", "streams"), [(1, 1), (1, 2), (2, 2), (0, 3)])
def test_one_engine_can_be_shared_by_threads(digits_bundle, threads, streams):
    engine = export_zoo.load(digits_bundle, threads=threads, streams=streams)
    batches = np.random.default_rng(0).normal(size=(24, 3, 3, 32, 32)).astype(np.float32)
    want = [engine.run(batch) for batch in batches]
    with ThreadPoolExecutor(6) as pool:
        have = list(pool.map(engine.run, batches))
    np.testing.assert_array_equal(have, want)


# -- preprocess ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_files(digits, digits_bundle) -> list[Path]:
    """The image files of the held-out inputs, in order."""
    by_hash = {sha256_of(path): path for path in digits.images.rglob("*.png")}
    return [by_hash[sha256] for sha256 in read_manifest(digits_bundle).artifacts.held_out.image_sha256]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are chosen on Linux only")
def test_an_engine_has_no_more_threads_than_cores_that_it_may_use(digits_bundle):
    """ONNX Runtime itself starts a thread for every core of the machine, also under taskset."""

    def threads() -> int:
        return len([*Path("/proc/self/task").iterdir()])

    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        gc.collect()  # engines of other tests have threads, too
        before = threads()
        engine = export_zoo.load(digits_bundle)
        assert threads() <= before
    finally:
        os.sched_setaffinity(0, cores)
    assert engine.run(np.zeros((1, 3, 32, 32), np.float32)).shape == (1, 10)


def test_an_idle_engine_leaves_the_cores_to_others(digits_bundle):
    """ONNX Runtime's threads spin for 10 ms and more after a run, unless told not to."""
    engine = export_zoo.load(digits_bundle, threads=2)
    pixels = held_out(digits_bundle, engine.manifest).pixels[:32]
    batch = normalize(pixels, engine.manifest.recipe.preprocess)
    burnt = []
    for _ in range(5):
        engine.run(batch)
        before = time.process_time()
        time.sleep(0.01)
        burnt.append(time.process_time() - before)
    assert min(burnt) < 0.002


def test_held_out_inputs_are_what_preprocessing_makes_of_the_files(digits_bundle, held_files):
    engine = export_zoo.load(digits_bundle)
    held = held_out(digits_bundle, engine.manifest)
    assert len(held_files) == len(held.pixels) >= 32
    want = normalize(held.pixels, engine.manifest.recipe.preprocess)
    np.testing.assert_array_equal(engine.preprocess(held_files), want)


def test_images_may_be_paths_strings_or_bytes(digits_bundle, held_files):
    engine = export_zoo.load(digits_bundle)
    batch = engine.preprocess([held_files[0], str(held_files[1]), held_files[2].read_bytes()])
    assert (batch.shape, batch.dtype) == ((3, 3, 32, 32), np.float32)
    np.testing.assert_array_equal(batch, engine.preprocess(held_files[:3]))


def test_labels_are_the_folders_and_the_engine_finds_them(digits_bundle, held_files):
    engine = export_zoo.load(digits_bundle)
    assert engine.labels == [str(digit) for digit in range(10)]
    best = engine.run(engine.preprocess(held_files[:32])).argmax(axis=1)
    truth = [path.parent.name for path in held_files[:32]]
    assert sum(engine.labels[i] == label for i, label in zip(best, truth, strict=True)) >= 30


@pytest.mark.parametrize("content", [b"", b"no image", "truncated"])
def test_image_that_cannot_be_decoded_is_named(digits_bundle, held_files, tmp_path, content):
    good = held_files[0].read_bytes()
    data = good[: len(good) // 2] if content == "truncated" else content
    path = tmp_path / "broken.png"
    path.write_bytes(data)
    engine = export_zoo.load(digits_bundle)
    with pytest.raises(BadInputError, match=r"broken\.png"):
        engine.preprocess([held_files[0], path])
    with pytest.raises(BadInputError, match="image 1: "):
        engine.preprocess([good, data])


def test_missing_image_is_named(digits_bundle):
    with pytest.raises(BadInputError, match=r"nowhere\.png"):
        export_zoo.load(digits_bundle).preprocess(["nowhere.png"])


def test_no_images_are_refused(digits_bundle):
    with pytest.raises(BadInputError, match="no images"):
        export_zoo.load(digits_bundle).preprocess([])


# -- damage ----------------------------------------------------------------------------------------------------


def _stems(manifest: Manifest) -> dict[str, File]:
    return {Path(file.path).name.split(".")[0]: file for file in manifest.files()}


STEMS = [
    *("resnet18", "resnet18-onnxruntime-int8", "ranges"),
    *("inputs", "logits", "inputs-patterns", "logits-patterns"),
]


def test_bundle_holds_the_manifests_files_and_no_other(digits_bundle):
    manifest = read_manifest(digits_bundle)
    assert set(_stems(manifest)) == set(STEMS)
    assert set(_tree(digits_bundle)) - {"manifest.json"} == {file.path for file in manifest.files()}


def test_files_are_named_by_their_hash(digits_bundle):
    for file in read_manifest(digits_bundle).files():
        content = (digits_bundle / file.path).read_bytes()
        assert hashlib.sha256(content).hexdigest() == file.sha256
        assert file.sha256[:16] in file.path
        assert len(content) == file.size_bytes


@pytest.mark.parametrize("where", ["first byte", "middle", "last byte", "one byte more", "one byte less"])
@pytest.mark.parametrize("stem", STEMS)
def test_flipped_byte_in_any_file_is_found_by_verify(bundle, stem, where):
    path = bundle / _stems(read_manifest(bundle))[stem].path
    content = bytearray(path.read_bytes())
    if where == "one byte more":
        content += b"\0"
    elif where == "one byte less":
        content.pop()
    else:
        content[{"first byte": 0, "middle": len(content) // 2, "last byte": -1}[where]] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInputError, match="checksum mismatch") as raised:
        verify(bundle)
    assert str(path) in str(raised.value)
    assert not (bundle / "attestations").exists()


@pytest.mark.parametrize(("stem", "name"), zip(STEMS[:2], ENGINES, strict=True))
def test_flipped_byte_in_an_engine_is_found_by_load(bundle, stem, name):
    path = bundle / _stems(read_manifest(bundle))[stem].path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInputError, match="checksum mismatch") as raised:
        export_zoo.load(bundle, engine=name)
    assert str(path) in str(raised.value)
    (other,) = set(ENGINES) - {name}
    assert export_zoo.load(bundle, engine=other).name == other


@pytest.mark.parametrize("stem", STEMS)
def test_missing_file_is_named_by_verify(bundle, stem):
    path = bundle / _stems(read_manifest(bundle))[stem].path
    path.unlink()
    with pytest.raises(BadInputError, match="missing from the bundle") as raised:
        verify(bundle)
    assert str(path) in str(raised.value)


def test_missing_engine_is_named_by_load(bundle):
    path = bundle / _stems(read_manifest(bundle))["resnet18"].path
    path.unlink()
    with pytest.raises(BadInputError, match="missing from the bundle") as raised:
        export_zoo.load(bundle, engine="onnxruntime-fp32")
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("use", [export_zoo.load, verify])
def test_directory_that_is_no_bundle_is_refused(tmp_path, use):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BadInputError, match="not a bundle"):
            use(place)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_truncated_manifest_is_refused_wherever_it_ends(bundle, share):
    path = bundle / "manifest.json"
    content = path.read_bytes().rstrip()
    path.write_bytes(content[: int(share * len(content))])
    for use in (export_zoo.load, verify):
        with pytest.raises(BadInputError, match="damaged manifest"):
            use(bundle)


@pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
def test_manifest_of_another_schema_version_is_refused(bundle, version):
    _edit(bundle, lambda document: document.update(schema_version=version))
    with pytest.raises(BadInputError, match="schema version"):
        export_zoo.load(bundle)


@pytest.mark.parametrize("content", [b"[]", b"null", b"1", b'"text"', b"{}", b"\xff\xfe", b"not json"])
def test_manifest_that_is_something_else_is_refused(bundle, content):
    (bundle / "manifest.json").write_bytes(content)
    for use in (export_zoo.load, verify):
        with pytest.raises(BadInputError, match=r"manifest\.json"):
            use(bundle)


def _without_recipe(document):
    del document["recipe"]


def _with_a_short_hash(document):
    document["recipe"]["graph"]["sha256"] = "abc"


def _with_text_for_a_number(document):
    document["recipe"]["batch"]["max"] = "many"


def _with_an_unknown_state(document):
    document["artifacts"]["engines"][0]["state"] = "trusted"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (_without_recipe, "recipe"),
        (_with_a_short_hash, "recipe.graph.sha256"),
        (_with_text_for_a_number, "recipe.batch.max"),
        (_with_an_unknown_state, "artifacts.engines.0.state"),
    ],
)
def test_manifest_that_does_not_validate_is_refused_with_its_key(bundle, change, key):
    _edit(bundle, change)
    with pytest.raises(BadInputError) as raised:
        export_zoo.load(bundle)
    assert f"manifest.json: damaged manifest: {key}: " in raised.value.message
    assert "errors.pydantic.dev" not in raised.value.message


def _graph(document):
    return document["recipe"]["graph"]


def _engine(document):
    return document["artifacts"]["engines"][1]["file"]


def _inputs(document):
    return document["artifacts"]["held_out"]["inputs"]


def _ranges(document):
    return document["recipe"]["calibration"]["ranges"]


@pytest.mark.parametrize("path", ["../secret", "/etc/hostname", "files/../../secret", ".."])
@pytest.mark.parametrize("entry", [_graph, _engine, _inputs, _ranges])
def test_path_outside_the_bundle_is_refused(bundle, entry, path):
    (bundle.parent / "secret").write_bytes(b"")
    _edit(bundle, lambda document: entry(document).update(path=path))
    for use in (export_zoo.load, verify):
        with pytest.raises(BadInputError, match="points outside the bundle"):
            use(bundle)


# -- verify ----------------------------------------------------------------------------------------------------


def test_verify_of_a_good_bundle_is_ok_and_changes_nothing_but_attestations(bundle):
    before, done = _tree(bundle), []
    attestation, path = verify(bundle, progress=done.append)
    assert (attestation.status, attestation.warnings) == ("ok", [])
    assert attestation.states == dict.fromkeys(ENGINES, "verified")
    assert path.parent == bundle / "attestations"
    assert {
        name: sha for name, sha in _tree(bundle).items() if not name.startswith("attestations/")
    } == before
    assert sum(done) > 0
    assert export_zoo.load(bundle).state == "verified"


def test_attestation_says_what_was_verified_where_and_how(bundle):
    attestation, path = verify(bundle)
    assert Attestation.model_validate_json(path.read_text()) == attestation
    assert attestation.manifest_sha256 == sha256_of(bundle / "manifest.json")
    manifest = read_manifest(bundle)
    assert attestation.instruction_set == manifest.recipe.instruction_set
    assert set(attestation.versions) >= {"onnxruntime", "numpy"}
    for engine in manifest.artifacts.engines:
        gate = attestation.engines[engine.name]
        assert gate.tolerances == engine.gate.tolerances
        assert gate.batches == engine.gate.batches == [1, 8, 17, 32]
        assert gate.metrics["sqnr"] == pytest.approx(engine.gate.metrics["sqnr"], abs=0.5)


def test_every_verify_writes_an_attestation_of_its_own(bundle):
    paths = {verify(bundle)[1] for _ in range(2)}
    assert set((bundle / "attestations").iterdir()) == paths
    assert len(paths) == 2


def _replace(bundle: Path, entry, content: bytes) -> None:
    """Replace a file and make the manifest agree: hash and size are those of the new bytes."""

    def change(document):
        file = entry(document)
        (bundle / file["path"]).write_bytes(content)
        file.update(sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))

    _edit(bundle, change)


def _tampered(path: Path, change) -> bytes:
    """The graph's bytes after `change(name, array)` edited its constants."""
    model, changed = onnx.load(path), 0
    for tensor in model.graph.initializer:
        array = change(tensor.name, numpy_helper.to_array(tensor).copy())
        if array is not None:
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
            changed += 1
    assert changed
    return model.SerializeToString()


def _swap_classes(name, array):
    if array.shape[:1] != (10,):
        return None
    array[[3, 8]] = array[[8, 3]]
    return array


def _negate_one_layer(name, array):
    return -array if array.dtype == np.int8 and array.ndim == 4 and array.shape[:2] == (512, 256) else None


def _cut_the_input_range(name, array):
    return array / 16 if name == "input_scale" else None


@pytest.mark.parametrize("change", [_swap_classes, _negate_one_layer, _cut_the_input_range])
def test_engine_whose_logits_changed_fails_verify_although_its_hash_fits(bundle, change):
    path = bundle / read_manifest(bundle).artifacts.engines[1].file.path
    _replace(bundle, _engine, _tampered(path, change))
    attestation, written = verify(bundle)
    assert attestation.status == "failed"
    assert attestation.states == {"onnxruntime-fp32": "verified", "onnxruntime-int8": "built"}
    assert attestation.engines["onnxruntime-int8"].failures
    assert attestation.engines["onnxruntime-fp32"].failures == []
    assert json.loads(written.read_text())["status"] == "failed"


def test_other_eager_logits_fail_every_engine(bundle):
    path = bundle / read_manifest(bundle).artifacts.held_out.logits.path
    np.save(bundle.parent / "other.npy", np.roll(np.load(path), 1, axis=0))
    content = (bundle.parent / "other.npy").read_bytes()
    _replace(bundle, lambda document: document["artifacts"]["held_out"]["logits"], content)
    assert verify(bundle)[0].states == dict.fromkeys(ENGINES, "built")


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("stem", ["inputs", "logits"])
@pytest.mark.parametrize(
    "change",
    [
        lambda a: _npy(a[:-1]),
        lambda a: _npy(a.astype(np.float64)),
        lambda a: _npy(a[..., :-1]),
        lambda a: b"no array",
    ],
    ids=["one image less", "another type", "another shape", "no array"],
)
def test_held_out_arrays_that_are_not_as_described_are_refused_by_name(bundle, stem, change):
    path = bundle / _stems(read_manifest(bundle))[stem].path
    _replace(bundle, lambda document: document["artifacts"]["held_out"][stem], change(np.load(path)))
    with pytest.raises(BadInputError, match=rf"{stem}\.\w+\.npy: not "):
        verify(bundle)


def _of_unknown_operators() -> bytes:
    graph = onnx.helper.make_graph([onnx.helper.make_node("Nonsense", [], ["y"])], "main", [], [])
    return onnx.helper.make_model(graph).SerializeToString()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no graph", "is no ONNX file"), (_of_unknown_operators(), "ONNX Runtime .* cannot load it")],
    ids=["nonsense", "unknown operator"],
)
def test_engine_that_does_not_load_is_refused_by_name(bundle, content, message):
    _replace(bundle, _engine, content)
    for use in (verify, lambda place: export_zoo.load(place, engine="onnxruntime-int8")):
        with pytest.raises(BadInputError, match=rf"int8\.\w+\.onnx: {message}"):
            use(bundle)


# -- without PyTorch -------------------------------------------------------------------------------------------

WITHOUT_TORCH = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision"):
            raise ImportError(f"blocked: {name}")

sys.meta_path.insert(0, Block())
try:
    import torch
except ImportError:
    print("no torch")

import export_zoo
engine = export_zoo.load(sys.argv[1], engine=sys.argv[3])
print(engine.labels[engine.run(engine.preprocess([sys.argv[2]])).argmax()])

from export_zoo.engines.verification.verify import verify
print(verify(sys.argv[1])[0].status)
"""


@pytest.mark.parametrize("name", ENGINES)
def test_bundle_is_loaded_run_and_verified_without_torch(bundle, held_files, tmp_path, name):
    image = next(path for path in held_files if path.parent.name == "7")
    command = [sys.executable, "-c", WITHOUT_TORCH, str(bundle), str(image), name]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == ["no torch", "7", "ok"]


# -- JSON Schema -----------------------------------------------------------------------------------------------

SCHEMA = ROOT / "docs" / "manifest.schema.json"


def test_schema_in_the_docs_is_that_of_the_models(capsys):
    """If this fails: python -m export_zoo.engines.bundle.manifest > docs/manifest.schema.json"""
    assert json.loads(SCHEMA.read_text()) == manifest_module.json_schema()
    manifest_module.main()
    assert SCHEMA.read_text() == capsys.readouterr().out


def test_real_manifest_validates_against_the_schema(digits_bundle):
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    document = json.loads((digits_bundle / "manifest.json").read_text())
    jsonschema.validate(document, schema, jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    "change",
    [_without_recipe, _with_a_short_hash, _with_text_for_a_number, _with_an_unknown_state],
)
def test_schema_refuses_what_the_models_refuse(digits_bundle, change):
    document = json.loads((digits_bundle / "manifest.json").read_text())
    change(document)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, json.loads(SCHEMA.read_text()), jsonschema.Draft202012Validator)


# -- publish ---------------------------------------------------------------------------------------------------

Version = tuple[Manifest, dict[str, Path]]


def _version(manifest: Manifest, directory: Path, seed: int, size: int = 3000) -> Version:
    """A bundle's manifest over files of random bytes; the ranges are the same in every version."""
    directory.mkdir(parents=True)
    sources: dict[str, Path] = {}

    def made(stem: str, suffix: str, number: int) -> File:
        path = directory / f"{stem}{suffix}"
        path.write_bytes(np.random.default_rng(number).bytes(size))
        file = describe(path, stem)
        sources[file.path] = path
        return file

    recipe = manifest.recipe.model_copy(
        update={
            "graph": made("graph", ".onnx", 10 * seed),
            "calibration": manifest.recipe.calibration.model_copy(
                update={"ranges": made("ranges", ".json", 1)}
            ),
        }
    )
    built = [
        e.model_copy(update={"file": made(e.name, ".onnx", 10 * seed + 2 + i)})
        for i, e in enumerate(manifest.artifacts.engines)
    ]
    held = manifest.artifacts.held_out.model_copy(update={"inputs": made("inputs", ".npy", 10 * seed + 5)})
    held = held.model_copy(update={"logits": made("logits", ".npy", 10 * seed + 6)})
    patterns = {
        name: made(f"{name}-patterns", ".npy", 10 * seed + 7 + i)
        for i, name in enumerate(("inputs", "logits"))
    }
    held = held.model_copy(update={"patterns": held.patterns.model_copy(update=patterns)})
    artifacts = manifest.artifacts.model_copy(update={"engines": built, "held_out": held})
    changed = {"recipe": recipe, "artifacts": artifacts, "tool": f"export-zoo {seed}"}
    return manifest.model_copy(update=changed), sources


@pytest.fixture
def versions(digits_bundle, tmp_path) -> list[Version]:
    manifest = read_manifest(digits_bundle)
    return [_version(manifest, tmp_path / "sources" / str(seed), seed) for seed in (1, 2)]


def _assert_is(out: Path, version: Version) -> None:
    """Exactly this version, complete, and nothing left over."""
    assert read_manifest(out) == version[0]
    for file in version[0].files():
        checked(out, file)
    assert set(_tree(out)) == {"manifest.json", *(file.path for file in version[0].files())}
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]


def test_published_bundle_is_complete(versions, tmp_path):
    out = tmp_path / "place" / "out"
    publish(out, *versions[0])
    _assert_is(out, versions[0])


def test_republished_bundle_is_the_new_version_and_the_old_files_are_gone(versions, tmp_path):
    for version in (versions[0], versions[1], versions[0], versions[0]):
        publish(tmp_path / "place" / "out", *version)
        _assert_is(tmp_path / "place" / "out", version)


def test_empty_directory_is_taken(versions, tmp_path):
    out = tmp_path / "place" / "out"
    out.mkdir(parents=True)
    publish(out, *versions[0])
    _assert_is(out, versions[0])


def test_relative_place_is_that_below_the_working_directory(versions, tmp_path, monkeypatch):
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")
    publish(Path("out"), *versions[0])
    _assert_is(tmp_path / "place" / "out", versions[0])


def test_files_that_are_there_are_not_written_again_unless_they_are_damaged(versions, tmp_path):
    out = tmp_path / "place" / "out"
    publish(out, *versions[0])
    files = [out / file.path for file in versions[0][0].files()]
    inodes = [path.stat().st_ino for path in files]
    files[0].write_bytes(b"damaged")
    publish(out, *versions[0])
    _assert_is(out, versions[0])
    assert [path.stat().st_ino for path in files[1:]] == inodes[1:]


def test_attestations_of_the_old_manifest_go_with_it(versions, tmp_path):
    out = tmp_path / "place" / "out"
    publish(out, *versions[0])
    (out / "attestations").mkdir()
    (out / "attestations" / "20260101T000000000000Z.json").write_text("{}")
    publish(out, *versions[1])
    _assert_is(out, versions[1])


def test_files_of_others_are_left_alone(versions, tmp_path):
    out = tmp_path / "place" / "out"
    publish(out, *versions[0])
    others = [
        "README.md",
        "files/notes.txt",
        "files/mine.onnx",
        "files/.hidden",
        "deploy/Dockerfile",
        "files/a/b.onnx",
    ]
    for name in others:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(name)
    (out.parent / "neighbour").mkdir()
    (out.parent / "neighbour" / "file").write_text("kept")
    for version in (versions[1], versions[0]):
        publish(out, *version)
        assert [(out / name).read_text() for name in others] == others
        assert set(_tree(out)) == {"manifest.json", *others, *(file.path for file in version[0].files())}
    assert (out.parent / "neighbour" / "file").read_text() == "kept"


def test_editors_swap_file_is_left_alone(versions, tmp_path):
    out = tmp_path / "place" / "out"
    publish(out, *versions[0])
    (out / ".manifest.json.swp").write_text("vim's")
    publish(out, *versions[1])
    assert (out / ".manifest.json.swp").exists()


def test_directory_that_was_filled_meanwhile_is_not_touched(versions, tmp_path):
    out = tmp_path / "place" / "out"
    out.mkdir(parents=True)
    (out / "theirs").write_text("theirs")
    with pytest.raises(OSError, match="not empty"):
        publish(out, *versions[0])
    assert _tree(out.parent) == {"out/theirs": sha256_of(out / "theirs")}


def test_link_to_a_bundle_stays_a_link(versions, tmp_path):
    publish(tmp_path / "place" / "real", *versions[0])
    link = tmp_path / "place" / "link"
    link.symlink_to("real")
    publish(link, *versions[1])
    assert link.is_symlink()
    _assert_is(tmp_path / "place" / "real", versions[1])


def test_link_to_an_empty_directory_is_taken(versions, tmp_path):
    (tmp_path / "place" / "real").mkdir(parents=True)
    link = tmp_path / "place" / "link"
    link.symlink_to("real")
    check_destination(link)
    publish(link, *versions[0])
    assert read_manifest(link) == versions[0][0]


def test_many_publishers_in_one_directory_do_not_meet(versions, tmp_path):
    places = [tmp_path / "place" / name for name in ("a", "b", "c", "c")]
    jobs = [(place, versions[i % 2]) for i in range(6) for place in places]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda job: publish(job[0], *job[1]), jobs))
    for place in places:
        _assert_is(place, next(v for v in versions if v[0] == read_manifest(place)))


# -- a disk that fails -----------------------------------------------------------------------------------------


def _failing(real, after: int, spoil=lambda *_: None):
    """The function, but call number `after` (from 0) and all that follow end as on a full disk."""
    calls = []

    def fail(*arguments, **options):
        calls.append(arguments)
        if len(calls) > after:
            spoil(*arguments)
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **options)

    return fail


def _write_half(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes()[: source.stat().st_size // 2])


@pytest.mark.parametrize("after", range(7))
@pytest.mark.parametrize("spoil", [lambda *_: None, _write_half], ids=["nothing written", "half written"])
def test_full_disk_while_copying_leaves_the_old_bundle(versions, tmp_path, monkeypatch, after, spoil):
    out = tmp_path / "place" / "out"
    publish(out, *versions[0])
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", _failing(shutil.copyfile, after, spoil))
        with pytest.raises(OSError, match="No space left"):
            publish(out, *versions[1])
    assert read_manifest(out) == versions[0][0]
    for file in versions[0][0].files():
        checked(out, file)
    publish(out, *versions[1])
    _assert_is(out, versions[1])


@pytest.mark.parametrize("after", range(9))
def test_disk_that_does_not_sync_leaves_the_old_bundle(versions, tmp_path, monkeypatch, after):
    out = tmp_path / "place" / "out"
    publish(out, *versions[0])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _failing(os.fsync, after))
        with pytest.raises(OSError, match="No space left"):
            publish(out, *versions[1])
    assert read_manifest(out) == versions[0][0]
    for file in versions[0][0].files():
        checked(out, file)


@pytest.mark.parametrize("half", [False, True])
def test_full_disk_while_writing_the_manifest_leaves_the_old_bundle(versions, tmp_path, monkeypatch, half):
    def fail(self, text, **_):
        if half:
            self.write_bytes(text.encode()[: len(text) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "place" / "out"
    publish(out, *versions[0])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        with pytest.raises(OSError, match="No space left"):
            publish(out, *versions[1])
    assert read_manifest(out) == versions[0][0]
    publish(out, *versions[1])
    _assert_is(out, versions[1])


@pytest.mark.parametrize("after", range(8))
def test_full_disk_at_the_first_time_leaves_nothing(versions, tmp_path, monkeypatch, after):
    out = tmp_path / "place" / "out"
    with monkeypatch.context() as patch:
        patch.setattr(publish_module.shutil, "copyfile", _failing(shutil.copyfile, after, _write_half))
        with pytest.raises(OSError, match="No space left"):
            publish(out, *versions[0])
    assert list(out.parent.iterdir()) == []


# -- kill -9 ---------------------------------------------------------------------------------------------------

KILLER = """
import itertools, json, os, random, shutil, signal, sys, time, traceback
from pathlib import Path
from export_zoo.engines.bundle.reader import checked, read_manifest
from export_zoo.engines.bundle.manifest import Manifest
from export_zoo.exporter.publish import publish

document, out, first = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), sys.argv[3] == "first"
versions = [(Manifest.model_validate(d["manifest"]), {k: Path(p) for k, p in d["sources"].items()}) for d in document]
aside = out.parent.with_name("aside")
random.seed(0)

def state():
    if not out.exists():
        return "absent"
    found = read_manifest(out)
    for file in found.files():
        checked(out, file)
    return "ab"[[manifest for manifest, _ in versions].index(found)]

def torn():
    kept = {"manifest.json", *(f.path for f in read_manifest(out).files())} if out.exists() else set()
    files = [p for p in out.parent.rglob("*") if p.is_file()]
    return any(not p.is_relative_to(out) or p.relative_to(out).as_posix() not in kept for p in files)

def publish_for_ever(index):
    for number in itertools.count():
        publish(out, *versions[index])
        index = 1 - index
        if first:
            time.sleep(0.01)
            out.rename(aside / str(number))

begin = time.perf_counter()
for version in [*versions, versions[0]]:
    publish(out, *version)
took = (time.perf_counter() - begin) / 3

found = []

def enough():
    states, at_work = {state for state, _ in found}, sum(torn for _, torn in found)
    return len(found) >= 40 and at_work >= 20 and ("a" in states or "b" in states) and len(states) > 1

while not enough() and len(found) < 1000:
    if first:
        for old in (out, aside):
            shutil.rmtree(old, ignore_errors=True)
        aside.mkdir()
    now = state()
    ready, started = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(started, b"!")
            publish_for_ever(1 if now == "a" else 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.read(ready, 1)
    time.sleep(random.uniform(0, 3 * took))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    os.close(ready), os.close(started)
    assert os.WIFSIGNALED(status), "publish failed by itself"
    found.append((state(), torn()))
publish(out, *versions[1])
found.append((state(), torn()))
print(json.dumps(found))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("when", ["first", "again"])
def test_publisher_killed_at_any_moment_leaves_a_whole_bundle_or_none(digits_bundle, tmp_path, when):
    manifest = read_manifest(digits_bundle)
    versions = [_version(manifest, tmp_path / "sources" / str(seed), seed, size=400_000) for seed in (1, 2)]
    document = [
        {"manifest": m.model_dump(mode="json"), "sources": {k: str(p) for k, p in sources.items()}}
        for m, sources in versions
    ]
    (tmp_path / "versions.json").write_text(json.dumps(document))
    out = tmp_path / "place" / "out"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path / "versions.json"), str(out), when],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *killed, last = json.loads(done.stdout)
    assert len(killed) >= 40
    states = {state for state, _ in killed}
    assert states <= ({"absent", "a", "b"} if when == "first" else {"a", "b"})
    assert len(states) > 1
    assert sum(torn for _, torn in killed) >= 20, "hardly a kill met a publisher at work"
    assert last == ["b", False]
    _assert_is(out, versions[1])


# -- where a bundle may go -------------------------------------------------------------------------------------


def test_new_place_an_empty_directory_and_a_bundle_are_accepted(digits_bundle, tmp_path):
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "new", tmp_path / "new" / "deep", tmp_path / "empty", digits_bundle):
        check_destination(place)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_file_is_refused_as_a_place(tmp_path):
    (tmp_path / "file").write_text("theirs")
    with pytest.raises(UsageError, match="is a file"):
        check_destination(tmp_path / "file")


@pytest.mark.parametrize("name", ["notes.txt", "files/model.onnx", ".git/HEAD"])
def test_directory_with_something_else_is_refused_as_a_place(tmp_path, name):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("theirs")
    with pytest.raises(UsageError, match="not a bundle"):
        check_destination(tmp_path / "out")


@pytest.mark.parametrize("content", ['{"name": "My web app", "icons": []}', '{"manifest_version": 3}'])
def test_directory_with_a_manifest_of_something_else_is_refused_as_a_place(tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(content)
    with pytest.raises(UsageError, match="not a bundle"):
        check_destination(tmp_path / "out")


def test_place_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("theirs")
    with pytest.raises(UsageError):
        check_destination(tmp_path / "file" / "out")


def test_something_else_where_a_failed_bundle_would_go_is_refused(digits_bundle, tmp_path):
    failed = failed_place(tmp_path / "out")
    assert failed == tmp_path / "out.failed"
    failed.mkdir()
    check_destination(tmp_path / "out")
    (failed / "notes.txt").write_text("theirs")
    with pytest.raises(UsageError, match=r"out\.failed.*not a bundle"):
        check_destination(tmp_path / "out")
    shutil.rmtree(failed)
    shutil.copytree(digits_bundle, failed)
    check_destination(tmp_path / "out")
    shutil.rmtree(failed)
    failed.write_text("theirs")
    with pytest.raises(UsageError, match=r"out\.failed.*is a file"):
        check_destination(tmp_path / "out")


@pytest.mark.parametrize("threads", [-1, 1025])
def test_threads_that_cannot_be_are_refused(digits_bundle, threads):
    with pytest.raises(UsageError, match=f"threads={threads}: must be 0 to 1024"):
        export_zoo.load(digits_bundle, engine="onnxruntime-fp32", threads=threads)


@pytest.mark.parametrize(("threads", "streams"), [(0, 0), (0, 1025), (2, 513), (1, -1)])
def test_streams_that_cannot_be_are_refused(digits_bundle, threads, streams):
    with pytest.raises(UsageError, match=f"streams={streams}: must be 1 or more, with at most 1024 threads"):
        export_zoo.load(digits_bundle, engine="onnxruntime-fp32", threads=threads, streams=streams)
