"""`export-zoo triton`: a repository whose configuration Triton's own protobuf reads, and whose model is the engine."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx_ir as ir
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from export_zoo.base import graph_io
from export_zoo.engines.bundle.loading import load
from export_zoo.engines.bundle.reader import read_manifest
from export_zoo.engines.bundle.triton import config
from export_zoo.engines.precision.int8.saturation.pairs import quantized_weights, saturating_layers
from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine


def read(model) -> ModelConfig:
    return text_format.Parse((model / "config.pbtxt").read_text(), ModelConfig())


def changed(bundle, tmp_path, change):
    """A copy of a bundle with a changed manifest."""
    copy = tmp_path / "changed.bundle"
    shutil.copytree(bundle, copy)
    document = json.loads((copy / "manifest.json").read_text())
    change(document)
    (copy / "manifest.json").write_text(json.dumps(document))
    return copy


def test_a_repository_is_what_triton_reads_and_serves_the_verified_engine(cli, digits_bundle, tmp_path):
    done = cli("triton", digits_bundle, tmp_path / "models")
    assert done.code == 0, done.err
    model = tmp_path / "models" / "resnet18"
    assert done.json["model"] == str(model)
    found = read(model)
    assert (found.name, found.platform, found.max_batch_size) == ("resnet18", "onnxruntime_onnx", 32)
    (feed,), (logits,) = found.input, found.output
    assert (feed.name, list(feed.dims), feed.data_type) == ("input", [3, 32, 32], 11)  # TYPE_FP32
    assert (logits.name, list(logits.dims), logits.data_type) == ("logits", [10], 11)
    assert logits.label_filename == "labels.txt"
    assert (model / "labels.txt").read_text().splitlines() == list("0123456789")
    assert list(found.dynamic_batching.preferred_batch_size) == [8]
    assert found.dynamic_batching.max_queue_delay_microseconds == 1000
    assert found.instance_group[0].kind == ModelInstanceGroup.KIND_CPU
    best = load(digits_bundle)
    engine = next(e for e in best.manifest.artifacts.engines if e.name == best.name)
    assert (model / "1" / "model.onnx").read_bytes() == (digits_bundle / engine.file.path).read_bytes()
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"resnet18"}


def test_every_output_is_configured(digits_bundle):
    manifest = read_manifest(digits_bundle)
    dense = manifest.recipe.output.model_copy(
        update={"name": "aux", "shape": ["batch", 10, "height", "width"]}
    )
    recipe = manifest.recipe.model_copy(update={"further_outputs": [dense]})
    text = config(manifest.model_copy(update={"recipe": recipe}), manifest.artifacts.engines[0], "net")
    first, second = text_format.Parse(text, ModelConfig()).output
    assert (first.name, list(first.dims), first.label_filename) == ("logits", [10], "labels.txt")
    assert (second.name, list(second.dims), second.label_filename) == ("aux", [10, -1, -1], "")


def test_an_engine_that_failed_on_a_machine_like_this_is_not_served_unless_it_is_asked_for(
    cli, digits_bundle, tmp_path
):
    def wrong_here(document):
        fp32, int8 = document["artifacts"]["engines"]
        fp32["latency"]["speedup"], int8["latency"]["speedup"] = 1.0, 100.0
        int8["gate"]["tolerances"]["sqnr"] = 500

    bundle, models = changed(digits_bundle, tmp_path, wrong_here), tmp_path / "models"
    assert cli("triton", bundle, models, "--name", "before").code == 0
    assert cli("verify", bundle).code == 3
    assert cli("triton", bundle, models, "--name", "after").code == 0
    assert cli("triton", bundle, models, "--name", "asked", "--engine", "onnxruntime-int8").code == 0
    sizes = {
        name: (models / name / "1" / "model.onnx").stat().st_size for name in ("before", "after", "asked")
    }
    assert sizes["before"] == sizes["asked"] < sizes["after"] / 3
    attested = next((bundle / "attestations").iterdir())
    document = json.loads(attested.read_text())
    document["engines"]["onnxruntime-fp32"]["failures"] = ["too"]
    attested.write_text(json.dumps(document))
    none = cli("triton", bundle, models, "--name", "none")
    assert none.code == 4
    assert (
        f"onnxruntime-int8: built, not verified (attestations/{attested.name}: "
        in none.json["error"]["message"]
    )


def test_versions_share_a_configuration(cli, digits_bundle, tmp_path):
    models = tmp_path / "models"
    assert cli("triton", digits_bundle, models, "--engine", "onnxruntime-fp32").code == 0
    assert cli("triton", digits_bundle, models, "--engine", "onnxruntime-int8", "--version", "2").code == 0
    first, second = (models / "resnet18" / v / "model.onnx" for v in "12")
    assert first.stat().st_size > 3 * second.stat().st_size
    again = cli("triton", digits_bundle, models, "--version", "2")
    assert again.code == 2
    assert "already exists" in again.json["error"]["message"]
    other = cli("triton", digits_bundle, models, "--version", "3", "--queue-delay", "0")
    assert other.code == 2
    assert "differs from this engine's configuration" in other.json["error"]["message"]
    named = cli("triton", digits_bundle, models, "--name", "digits", "--queue-delay", "0")
    assert named.code == 0
    assert read(models / "digits").dynamic_batching.max_queue_delay_microseconds == 0
    assert {path.name for path in (models / "resnet18").iterdir()} == {"1", "2", "config.pbtxt", "labels.txt"}


def test_a_plan_is_served_by_the_tensorrt_backend_on_a_gpu(digits_bundle):
    from export_zoo.engines.bundle.triton import config

    manifest = read_manifest(digits_bundle)
    engine = manifest.artifacts.engines[0].model_copy(update={"target": "tensorrt"})
    found = text_format.Parse(config(manifest, engine, 'a "name"\\'), ModelConfig())
    assert (found.name, found.platform) == ('a "name"\\', "tensorrt_plan")
    assert found.instance_group[0].kind == ModelInstanceGroup.KIND_GPU


@pytest.mark.parametrize(
    ("given", "code", "says"),
    [
        (["--engine", "onnxruntime-fp64"], 2, "--engine onnxruntime-fp64: "),
        (["--name", "../evil"], 2, "--name"),
        (["--name", ""], 2, "--name"),
        (["--name", "a" * 201], 2, "--name"),
        (["--version", "0"], 2, "--version 0"),
        (["--version", "9223372036854775808"], 2, "--version 9223372036854775808"),
        (["--queue-delay", "-1"], 2, "--queue-delay"),
    ],
)
def test_what_triton_would_not_take_is_refused(cli, digits_bundle, tmp_path, given, code, says):
    done = cli("triton", digits_bundle, tmp_path / "models", *given)
    assert done.code == code
    assert says in done.json["error"]["message"]
    assert not (tmp_path / "models").exists()


def test_a_folder_that_is_no_model_is_left_alone(cli, digits_bundle, tmp_path):
    (tmp_path / "models" / "resnet18").mkdir(parents=True)
    done = cli("triton", digits_bundle, tmp_path / "models")
    assert done.code == 2
    assert "exists, but is not a model of Triton" in done.json["error"]["message"]
    assert not list((tmp_path / "models" / "resnet18").iterdir())


def test_bundles_that_are_not_to_be_served_are_refused(cli, digits_bundle, tmp_path):
    failed = changed(digits_bundle, tmp_path, lambda d: d.update(status="failed"))
    done = cli("triton", failed, tmp_path / "models")
    assert (done.code, done.json["error"]["kind"]) == (3, "parity")
    shutil.rmtree(failed)

    def unverify(document):
        for engine in document["artifacts"]["engines"]:
            engine["state"] = "built"

    built = changed(digits_bundle, tmp_path, unverify)
    done = cli("triton", built, tmp_path / "models")
    assert done.code == 4
    assert "no verified engine" in done.json["error"]["message"]
    assert not (tmp_path / "models").exists()


def test_a_bundle_that_was_never_verified_at_one_image_is_refused(cli, digits_bundle, tmp_path):
    several = changed(digits_bundle, tmp_path, lambda d: d["recipe"]["batch"].update(min=2))
    done = cli("triton", several, tmp_path / "models")
    assert done.code == 4
    assert "batches 2 to 32" in done.json["error"]["message"]
    assert "--batch 1:8:32" in done.json["error"]["hint"]
    assert not (tmp_path / "models").exists()


def test_a_plan_without_weights_is_refused_and_never_chosen(cli, digits_bundle, tmp_path):
    def strip(document):
        engine = next(e for e in document["artifacts"]["engines"] if e["name"] == "onnxruntime-int8")
        engine.update(name="tensorrt-int8", target="tensorrt", graph=engine["file"], state="verified")
        engine["file"] = {**engine["file"], "path": "files/stripped.plan"}
        engine["latency"]["speedup"] = 100
        engine["plan"] = {
            "version": "11.1.0",
            "compute_capabilities": ["8.9"],
            **dict.fromkeys(("hardware_compatible", "version_compatible"), False),
            **dict.fromkeys(("refittable", "strip_weights"), True),
            "workspace_mb": None,
        }

    stripped = changed(digits_bundle, tmp_path, strip)
    done = cli("triton", stripped, tmp_path / "models", "--engine", "tensorrt-int8")
    assert done.code == 4
    assert "no weights" in done.json["error"]["message"]
    assert not (tmp_path / "models").exists()
    done = cli("triton", stripped, tmp_path / "models")
    assert done.code == 0, done.err
    assert read(tmp_path / "models" / "resnet18").platform == "onnxruntime_onnx"


def test_a_damaged_engine_and_a_place_that_cannot_be_written_leave_nothing(cli, digits_bundle, tmp_path):
    copy = tmp_path / "copy.bundle"
    shutil.copytree(digits_bundle, copy)
    for path in (copy / "files").glob("*int8*.onnx"):
        path.write_bytes(path.read_bytes()[:-1])
    done = cli("triton", copy, tmp_path / "models", "--engine", "onnxruntime-int8")
    assert done.code == 5
    assert "checksum mismatch" in done.json["error"]["message"]
    assert not (tmp_path / "models").exists()
    (tmp_path / "file").write_text("")
    done = cli("triton", digits_bundle, tmp_path / "file" / "models")
    assert done.code == 7
    assert str(tmp_path / "file" / "models") in done.json["error"]["message"]


# -- CPUs whose sums saturate: Triton gives sessions no configuration ---------------------------------------------


def saturating(bundle, tmp_path):
    """A copy of a bundle whose INT8 engine can saturate, as those of earlier versions can."""
    copy = tmp_path / "saturating.bundle"
    shutil.copytree(bundle, copy)
    document = json.loads((copy / "manifest.json").read_text())
    engine = next(e for e in document["artifacts"]["engines"] if e["name"] == "onnxruntime-int8")
    model = graph_io.load(copy / engine["file"]["path"])
    node, _, weight = quantized_weights(model.graph)[-1]
    largest = np.where(weight.const_value.numpy() > 0, 127, -127).astype(np.int8)
    weight.const_value = ir.tensor(largest, name=weight.name)
    path = copy / "files" / "saturating.onnx"
    graph_io.save(model, path)
    engine["file"] = {
        "path": "files/saturating.onnx",
        "sha256": graph_io.sha256_of(path),
        "size_bytes": path.stat().st_size,
    }
    del engine["saturating_cpu_session"]
    (copy / "manifest.json").write_text(json.dumps(document))
    return copy, path, node.name


def test_an_engine_that_can_saturate_is_refused_and_written_exact_when_asked_for(
    cli, digits_bundle, tmp_path
):
    bundle, engine, layer = saturating(digits_bundle, tmp_path)
    assert saturating_layers(graph_io.load(engine).graph) == [layer]
    given = ("triton", bundle, tmp_path / "models", "--engine", "onnxruntime-int8")
    done = cli(*given)
    assert done.code == 4
    assert "its sums saturate" in done.err
    assert "--cpu-graph exact" in done.err
    assert not (tmp_path / "models").exists()
    assert cli(*given, "--cpu-graph", "vnni", "--name", "vnni").code == 0
    assert (tmp_path / "models" / "vnni" / "1" / "model.onnx").read_bytes() == engine.read_bytes()
    assert cli(*given, "--cpu-graph", "exact", "--name", "exact").code == 0
    exact = tmp_path / "models" / "exact" / "1" / "model.onnx"
    assert quantized_weights(graph_io.load(exact).graph) == []
    inputs = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    want = OnnxRuntimeEngine(engine).run(inputs)  # by a session that is exact where sums saturate
    assert np.ptp(want) > 1
    np.testing.assert_array_equal(OnnxRuntimeEngine(exact, saturating_session={}).run(inputs), want)


def test_exact_weights_of_an_engine_as_it_is_made_now_change_no_bit(cli, digits_bundle, tmp_path):
    given = ("triton", digits_bundle, tmp_path / "models", "--engine", "onnxruntime-int8")
    assert cli(*given, "--name", "as-it-is").code == 0
    assert cli(*given, "--name", "exact", "--cpu-graph", "exact").code == 0
    inputs = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    paths = [tmp_path / "models" / name / "1" / "model.onnx" for name in ("as-it-is", "exact")]
    plain, exact = (OnnxRuntimeEngine(path, saturating_session={}).run(inputs) for path in paths)
    np.testing.assert_array_equal(plain, exact)


def test_nothing_but_int8_of_the_cpu_is_made_exact(cli, digits_bundle, tmp_path):
    given = ("triton", digits_bundle, tmp_path / "models", "--engine", "onnxruntime-fp32")
    done = cli(*given, "--cpu-graph", "exact")
    assert done.code == 2
    assert "--cpu-graph exact" in done.err
    assert "onnxruntime-fp32" in done.err
