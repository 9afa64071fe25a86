"""Model repositories of inference servers: this module chooses the engine and adds a folder for each version.

REPOSITORY/<name>/<version>/<files of the engine>
"""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from export_zoo.base.errors import (
    BadInputError,
    EnvironmentFailureError,
    ParityError,
    TargetUnavailableError,
    UsageError,
)
from export_zoo.engines.bundle import manifest as m
from export_zoo.engines.bundle.reader import attestations, check_weights, checked, named, read_manifest
from export_zoo.engines.bundle.selection import fastest_first, not_verified, speeds, standing
from export_zoo.engines.targets.base import Target
from export_zoo.engines.targets.registry import TARGETS

_MAX_VERSION = 2**63 - 1
"""Largest version number; servers store it in 64 bits."""


@dataclass(frozen=True)
class Server:
    """An inference server that reads models from a repository."""

    name: str
    serves: Callable[[Target], bool]
    """Whether it can run a target's engines."""

    def targets(self) -> list[str]:
        """Names of the targets whose engines it can run."""
        return [target.name for target in TARGETS.values() if self.serves(target)]


def servable(bundle: Path) -> m.Manifest:
    """The manifest of a bundle that passed its gate.

    Raises:
        BadInputError: `bundle` is not a bundle, or is damaged.
        ParityError: the bundle failed its parity gate.
    """
    manifest = read_manifest(bundle)
    if manifest.status != "ok":
        raise ParityError(f"{bundle}: this bundle failed its parity gate", hint="export it again")
    return manifest


def chosen(bundle: Path, manifest: m.Manifest, wanted: str | None, server: Server) -> m.Engine:
    """The engine named `wanted`. Without a name, the fastest verified engine that the server can run.

    Raises:
        UsageError: there is no such engine.
        TargetUnavailableError: the server can run no engine of the bundle, or not the one that is wanted.
    """
    served = " or ".join(server.targets())
    if wanted is not None:
        try:
            engine = named(bundle, manifest, wanted)
        except BadInputError as error:
            raise UsageError(
                f"--engine {wanted}: {bundle} has no engine of that name", hint=error.hint
            ) from error
        if not server.serves(TARGETS[engine.target]):
            raise TargetUnavailableError(
                f"--engine {wanted}: {server.name} cannot run engines of {engine.target}",
                hint=f"use an engine of {served}",
            )
        if engine.without_weights:
            raise TargetUnavailableError(
                f"--engine {wanted}: its plan has no weights, and {server.name} does not refit plans",
                hint="export without --strip-weights, or use an engine of onnxruntime",
            )
        return engine
    attested = attestations(bundle)
    known = [
        e for e in manifest.artifacts.engines if server.serves(TARGETS[e.target]) and not e.without_weights
    ]
    standings = {e.name: standing(e, attested) for e in known}
    verified = [e for e in known if standings[e.name].state == "verified"]
    if not verified:
        listed = "; ".join(f"{name}: {not_verified(found)}" for name, found in standings.items())
        other = "choose an engine with --engine, or " if known else ""
        raise TargetUnavailableError(
            f"{bundle}: no verified engine of {served} that contains its weights"
            + (f": {listed}" if listed else ""),
            hint=f"{other}export with --target {server.targets()[0]}",
        )
    return fastest_first(verified, speeds(verified, attested))[0]


def checked_name(name: str | None, manifest: m.Manifest) -> str:
    """The model's name. Default: the network's name.

    Raises:
        UsageError: servers do not accept the name.
    """
    name = name if name is not None else manifest.recipe.source.name
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{,199}", name):
        raise UsageError(
            f"--name {name!r}: must be 1 to 200 letters, digits, _, - and ., and not begin with - or .",
            hint="use a name such as resnet50-int8",
        )
    return name


def check_version(version: int) -> None:
    """Check the number of a version.

    Raises:
        UsageError: servers do not accept the version.
    """
    if not 1 <= version <= _MAX_VERSION:
        raise UsageError(
            f"--version {version}: must be 1 to {_MAX_VERSION}", hint="leave out --version to use 1"
        )


def checked_files(bundle: Path, engine: m.Engine, name: str) -> dict[str, Path]:
    """The engine's file, under this name, and its weight files, under their own: the ONNX file refers to them.

    Raises:
        BadInputError: a file is damaged or missing.
    """
    files = {name: checked(bundle, engine.file)}
    files |= {Path(file.path).name: checked(bundle, file) for file in engine.external_data}
    if engine.graph is None:
        check_weights(bundle, *engine.precision_graph())
    return files


def copied(files: Mapping[str, Path]) -> Callable[[Path], None]:
    """A function that copies files into a folder under the given names."""

    def copy(folder: Path) -> None:
        for name, path in files.items():
            shutil.copyfile(path, folder / name)

    return copy


def add_version(
    model: Path, version: int, write: Callable[[Path], None], *, described: Mapping[str, str], server: Server
) -> None:
    """Add a version to a model, completely or not at all.

    Args:
        model: the model's directory, which is made unless it is there.
        write: writes the version's files into the folder that it is given.
        described: texts of the files beside the versions, by name. All versions must have the same.

    Raises:
        UsageError: the version already exists, or the model's directory has other files of these names.
        EnvironmentFailureError: the repository cannot be written to.
    """
    if model.exists():
        _refuse_other(model, described, version, server)
    temporary = model.with_name(f".{model.name}.{uuid.uuid4().hex}")
    try:
        (temporary / str(version)).mkdir(parents=True)
        write(temporary / str(version))
        if model.exists():
            (temporary / str(version)).rename(model / str(version))
        else:
            for file, text in described.items():
                (temporary / file).write_text(text, encoding="utf-8")
            temporary.rename(model)
    except OSError as error:
        raise cannot_be_written(model.parent, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def cannot_be_written(repository: Path, error: OSError) -> EnvironmentFailureError:
    """The error of a repository that cannot be written to, or has something else in the way."""
    path = error.filename2 or error.filename or repository
    return EnvironmentFailureError(
        f"{repository}: {path} cannot be written: {error.strerror}",
        hint="give a writable directory, with nothing in the way",
    )


def _refuse_other(model: Path, described: Mapping[str, str], version: int, server: Server) -> None:
    if (model / str(version)).exists():
        raise UsageError(f"{model}/{version}: already exists", hint="give another --version or --name")
    first = next(iter(described), None)
    if first is not None and not (model / first).is_file():
        raise UsageError(f"{model}: exists, but is not a model of {server.name}", hint="give another --name")
    for file, text in described.items():
        if not (model / file).is_file() or (model / file).read_text(encoding="utf-8") != text:
            raise UsageError(
                f"{model}/{file}: differs from this engine's configuration",
                hint="give another --name: all versions of a model share one configuration",
            )
