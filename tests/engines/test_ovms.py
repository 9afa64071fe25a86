"""`export-zoo ovms`: a repository that OpenVINO reads as the server does. There is no server here."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jsonschema
import numpy as np
import openvino as ov
import pytest
from support.options import UNTUNED

from export_zoo.engines.bundle.loading import load
from export_zoo.engines.bundle.manifest import SizeRange
from export_zoo.engines.bundle.ovms import entry, write_repository
from export_zoo.engines.bundle.reader import read_manifest
from export_zoo.exporter.cli.app import main

# What the server requires of config.json, of the keys that are written (its src/schema.cpp).
MODEL = {
    "type": "object",
    "required": ["name", "base_path"],
    "properties": {
        "name": {"type": "string"},
        "base_path": {"type": "string"},
        "shape": {"type": ["object", "string"]},
        "target_device": {"type": "string"},
        "plugin_config": {"type": "object"},
    },
    "additionalProperties": False,
}
SCHEMA = {
    "type": "object",
    "required": ["model_config_list"],
    "properties": {
        "model_config_list": {
            "type": "array",
            "items": {"type": "object", "required": ["config"], "properties": {"config": MODEL}},
        }
    },
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def bundle(digits, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("ovms") / "resnet18.bundle"
    arguments = [
        *digits.arguments(),
        "--calib",
        digits.images,
        *UNTUNED,
        "--target",
        "openvino",
        "--batch",
        "1:4:8",
    ]
    assert (
        main(
            [*map(str, arguments), "--precision", "fp32", "--precision", "int8", "--out", str(out), "--quiet"]
        )
        == 0
    )
    return out


def read(models: Path) -> dict[str, dict]:
    """The models of config.json, by name."""
    document = json.loads((models / "config.json").read_text())
    jsonschema.validate(document, SCHEMA)
    return {model["config"]["name"]: model["config"] for model in document["model_config_list"]}


def compiled(models: Path, name: str, version: int) -> ov.CompiledModel:
    """A model as the server compiles it, by its own configuration."""
    config, core = read(models)[name], ov.Core()
    (file,) = (models / config["base_path"] / str(version)).glob("*.onnx")
    model = core.read_model(file)
    sizes = config["shape"].strip("()").split(",")
    model.reshape([tuple(map(int, size.split(":"))) if ":" in size else int(size) for size in sizes])
    return core.compile_model(model, config["target_device"], config["plugin_config"])


def test_a_repository_gives_the_logits_of_the_engine_by_the_names_of_the_manifest(cli, bundle, tmp_path):
    models = tmp_path / "models"
    done = cli("ovms", bundle, models, "--engine", "openvino-int8", "--name", "digits")
    assert done.code == 0, done.err
    assert done.json["model"] == str(models / "digits")
    found = compiled(models, "digits", 1)
    recipe = read_manifest(bundle).recipe
    batch = np.random.default_rng(0).standard_normal((8, 3, 32, 32), dtype=np.float32)
    logits = found({recipe.input.name: batch})[recipe.output.name]
    assert np.array_equal(logits, load(bundle, engine="openvino-int8").run(batch))
    with pytest.raises(RuntimeError):
        found({recipe.input.name: np.repeat(batch, 2, axis=0)})  # 16 were never verified
    assert {path.name for path in models.iterdir()} == {"config.json", "digits"}


def test_the_shape_is_the_range_that_was_verified(bundle):
    manifest = read_manifest(bundle)
    assert entry(manifest, "x")["shape"] == "(1:8,3,32,32)"
    sizes = SizeRange(min=(24, 32), opt=(32, 32), max=(48, 32))
    shape = ["batch", 3, "height", "width"]
    recipe = manifest.recipe.model_copy(
        update={"input_size": sizes, "input": manifest.recipe.input.model_copy(update={"shape": shape})}
    )
    batch = recipe.batch.model_copy(update={"min": 4, "opt": 4, "max": 4})
    recipe = recipe.model_copy(update={"batch": batch})
    assert entry(manifest.model_copy(update={"recipe": recipe}), "x")["shape"] == "(4,3,24:48,32)"


def test_models_and_versions_are_added_and_the_rest_of_the_configuration_is_kept(cli, bundle, tmp_path):
    models = tmp_path / "models"
    assert cli("ovms", bundle, models, "--engine", "openvino-fp32").code == 0
    document = json.loads((models / "config.json").read_text())
    document["monitoring"] = {"metrics": {"enable": True}}
    (models / "config.json").write_text(json.dumps(document))
    assert cli("ovms", bundle, models, "--engine", "openvino-int8", "--version", "2").code == 0
    assert cli("ovms", bundle, models, "--name", "other").code == 0
    document = json.loads((models / "config.json").read_text())
    assert document["monitoring"] == {"metrics": {"enable": True}}
    assert [model["config"]["name"] for model in document["model_config_list"]] == ["resnet18", "other"]
    first, second = (models / "resnet18" / version / "model.onnx" for version in "12")
    assert first.stat().st_size > 3 * second.stat().st_size

    again = cli("ovms", bundle, models, "--version", "2")
    assert again.code == 2
    assert "already exists" in again.json["error"]["message"]
    document["model_config_list"][0]["config"]["nireq"] = 4  # somebody changed it
    (models / "config.json").write_text(json.dumps(document))
    other = cli("ovms", bundle, models, "--version", "3")
    assert other.code == 2
    assert "its model resnet18 differs" in other.json["error"]["message"]
    assert not (models / "resnet18" / "3").exists()


def test_models_that_are_added_at_once_are_all_there(bundle, tmp_path):
    names = [f"model-{index}" for index in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: write_repository(bundle, tmp_path / "models", name=name), names))
    assert read(tmp_path / "models").keys() == set(names)


@pytest.mark.parametrize(
    ("given", "code", "says"),
    [
        (["--engine", "openvino-fp64"], 2, "--engine openvino-fp64: "),
        (["--name", "../evil"], 2, "--name"),
        (["--name", "config.json"], 2, "--name config.json: is the server's configuration"),
        (["--version", "0"], 2, "--version 0"),
    ],
)
def test_what_the_server_would_not_take_is_refused(cli, bundle, tmp_path, given, code, says):
    done = cli("ovms", bundle, tmp_path / "models", *given)
    assert done.code == code
    assert says in done.json["error"]["message"]
    assert not (tmp_path / "models").exists()


def test_a_bundle_without_an_engine_of_openvino_is_refused(cli, digits_bundle, tmp_path):
    done = cli("ovms", digits_bundle, tmp_path / "models")
    assert done.code == 4
    assert "no verified engine of openvino" in done.json["error"]["message"]
    assert done.json["error"]["hint"] == "export with --target openvino"
    done = cli("ovms", digits_bundle, tmp_path / "models", "--engine", "onnxruntime-int8")
    assert done.code == 4
    assert "OpenVINO Model Server cannot run engines of onnxruntime" in done.json["error"]["message"]
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"model_config_list": 3}',
        '{"model_config_list": {}}',
        '{"model_config_list": [{}]}',
        '{"model_config_list": [], "monitoring": 1e400}',
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_a_file_that_is_no_configuration_is_left_alone(cli, bundle, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    done = cli("ovms", bundle, tmp_path)
    assert done.code == 5
    assert f"{tmp_path / 'config.json'}: not a configuration" in done.json["error"]["message"]
    assert (tmp_path / "config.json").read_text() == text
    assert not (tmp_path / "resnet18").exists()


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_no_model_of_the_configuration_is_left_alone(cli, bundle, tmp_path, kind):
    place = tmp_path / "models" / "resnet18"
    place.parent.mkdir()
    if kind == "folder":  # such as a model of Triton
        place.mkdir()
    elif kind == "file":
        place.write_text("")
    else:
        place.symlink_to(tmp_path / "absent")
    done = cli("ovms", bundle, tmp_path / "models")
    assert done.code == 2
    assert (
        f"{place}: exists, but {tmp_path / 'models' / 'config.json'} has no model"
        in done.json["error"]["message"]
    )
    assert [*(tmp_path / "models").iterdir()] == [place]


def test_a_linked_configuration_stays_a_link(cli, bundle, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "real.json").write_text('{"model_config_list": []}')
    (tmp_path / "models" / "config.json").symlink_to(tmp_path / "real.json")
    assert cli("ovms", bundle, tmp_path / "models").code == 0
    assert (tmp_path / "models" / "config.json").is_symlink()
    assert read(tmp_path / "models").keys() == {"resnet18"}
    assert '"resnet18"' in (tmp_path / "real.json").read_text()


def test_a_damaged_engine_and_a_place_that_cannot_be_written_leave_nothing(cli, bundle, tmp_path):
    copy = tmp_path / "copy.bundle"
    shutil.copytree(bundle, copy)
    for path in (copy / "files").glob("*int8*.onnx"):
        path.write_bytes(path.read_bytes()[:-1])
    done = cli("ovms", copy, tmp_path / "models", "--engine", "openvino-int8")
    assert done.code == 5
    assert "checksum mismatch" in done.json["error"]["message"]
    assert not (tmp_path / "models").exists()
    (tmp_path / "file").write_text("")
    done = cli("ovms", bundle, tmp_path / "file" / "models")
    assert done.code == 7
    assert str(tmp_path / "file" / "models") in done.json["error"]["message"]
