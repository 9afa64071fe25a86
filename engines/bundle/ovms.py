"""Writes a bundle's engine as a model of an OpenVINO Model Server repository.

    REPOSITORY/config.json
    REPOSITORY/<name>/<version>/model.onnx

Source: OpenVINO Model Server, "Prepare a Model Repository", "Model Server Parameters" and "Dynamic Shape with dynamic
IR/ONNX Model" of its documentation. The server takes the tensors' names from the graph: a client of the open inference
protocol (KServe v2) sends the input and reads the outputs by the names in the manifest.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from export_zoo.base.errors import BadInputError, UsageError
from export_zoo.base.files import locked, replacing
from export_zoo.engines.bundle import manifest as m
from export_zoo.engines.bundle.model_repository import (
    Server,
    add_version,
    cannot_be_written,
    check_version,
    checked_files,
    checked_name,
    chosen,
    copied,
    servable,
)

OVMS = Server("OpenVINO Model Server", lambda target: target.ovms)

CONFIG = "config.json"

_PLUGIN = {"INFERENCE_PRECISION_HINT": "f32"}
"""Options that the logits depend on: those of `engines.targets.openvino.engine`."""


def entry(manifest: m.Manifest, name: str) -> dict[str, Any]:
    """The model's entry in `model_config_list`. The server refuses batches and sizes that were never verified."""

    def dimension(least: int, most: int) -> str:
        return str(least) if least == most else f"{least}:{most}"

    recipe = manifest.recipe
    sizes = [dimension(recipe.batch.min, recipe.batch.max), *map(str, recipe.input.shape[1:])]
    if (given := recipe.input_size) is not None:
        sizes[2:] = map(dimension, given.min, given.max)
    shape = f"({','.join(sizes)})"
    # Relative to config.json.
    return {"name": name, "base_path": name, "target_device": "CPU", "shape": shape, "plugin_config": _PLUGIN}


def _configuration(repository: Path, model: dict[str, Any]) -> str:
    """The text that config.json should have: what it has, and the model."""
    path, name = repository / CONFIG, model["name"]
    try:
        document = (
            json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"model_config_list": []}
        )
        models = document["model_config_list"]
        if not isinstance(models, list):
            raise TypeError("model_config_list is no list")
        known = {entry["config"]["name"]: entry["config"] for entry in models}
        if name not in known:
            models.append({"config": model})
        text = json.dumps(document, indent=1, allow_nan=False)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise BadInputError(
            f"{path}: not a configuration of OpenVINO Model Server: {error}", hint="give another repository"
        ) from error
    if known.get(name, model) != model:
        raise UsageError(
            f"{path}: its model {name} differs from this engine's configuration, which is {json.dumps(model)}",
            hint="give another --name: all versions of a model share one configuration",
        )
    place = repository / name
    if name not in known and (place.exists() or place.is_symlink()):
        raise UsageError(
            f"{place}: exists, but {path} has no model of that name", hint="give another --name, or remove it"
        )
    return text + "\n"


def write_repository(
    bundle: Path, repository: Path, *, engine: str | None = None, name: str | None = None, version: int = 1
) -> Path:
    """Add an engine to a repository of OpenVINO Model Server, completely or not at all. Returns the model's directory.

    Args:
        engine: name of the engine. Default: the fastest verified engine of openvino, as for `load` with
            `measure=False`.
        name: name of the model. Default: the network's name.
        version: version number of the model, and name of its folder. All versions of a model must have the same
            configuration.

    Raises:
        UsageError: the server does not accept the name or version, the version already exists, or there is no such
            engine.
        BadInputError: `bundle` is not a bundle, or is damaged; or the repository's config.json is.
        ParityError: the bundle failed its parity gate.
        TargetUnavailableError: the bundle has no engine of openvino.
        EnvironmentFailureError: the repository cannot be written to.
    """
    manifest = servable(bundle)
    served = chosen(bundle, manifest, engine, OVMS)
    name = checked_name(name, manifest)
    if name == CONFIG:
        raise UsageError(
            f"--name {name}: is the server's configuration", hint="use a name such as resnet50-int8"
        )
    check_version(version)
    files = checked_files(bundle, served, "model.onnx")
    model = repository / name
    try:
        repository.mkdir(parents=True, exist_ok=True)
        # config.json is replaced at the end: a server that watches it finds the model complete.
        with locked(repository), replacing((repository / CONFIG).resolve()) as temporary:
            temporary.write_text(_configuration(repository, entry(manifest, name)), encoding="utf-8")
            add_version(model, version, copied(files), described={}, server=OVMS)
    except OSError as error:
        raise cannot_be_written(repository, error) from error
    return model
