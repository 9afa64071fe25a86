"""Reads a bundle: its manifest, files, held-out inputs and attestations."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from export_zoo.base.errors import BadInputError, first_of
from export_zoo.base.graph_io import external_files, sha256_of
from export_zoo.base.package import __version__
from export_zoo.calibration.preprocess import Pixels
from export_zoo.engines.bundle import manifest as m
from export_zoo.engines.parity.outputs import sampled_shape

Float32Array = npt.NDArray[np.float32]
MANIFEST = "manifest.json"
ATTESTATIONS = "attestations"


def read_manifest(bundle: Path) -> m.Manifest:
    """Read and validate a bundle's manifest.

    Raises:
        BadInputError: `bundle` is not a bundle, or its manifest has another schema version or does not validate.
    """
    path = bundle / MANIFEST
    if not path.is_file():
        why = (
            f"no {MANIFEST} in it"
            if bundle.is_dir()
            else "a file"
            if bundle.exists()
            else "there is no such directory"
        )
        raise BadInputError(
            f"{bundle}: not a bundle ({why})", hint="pass the directory that `export-zoo export` wrote"
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        version = document.get("schema_version") if isinstance(document, dict) else None
        if version != m.SCHEMA_VERSION:
            raise BadInputError(
                f"{path}: schema version {version!r}, but this export-zoo reads {m.SCHEMA_VERSION}",
                hint="use the export-zoo version that wrote the bundle, or export again",
            )
        found = m.Manifest.of(document)
    except ValidationError as error:
        raise BadInputError(
            f"{path}: damaged manifest: {first_of(error)}",
            hint=f"made by {_maker(document)}, read by {__version__}: use a version as new, or export the bundle again",
        ) from error
    except m.NoKnownEngineError as error:
        raise BadInputError(f"{path}: {error}", hint="update export-zoo, or export again") from error
    except (ValueError, OSError, RecursionError) as error:
        raise BadInputError(f"{path}: damaged manifest: {error}", hint="export the bundle again") from error
    for file in found.files():
        if file.path.startswith("/") or ".." in Path(file.path).parts:
            raise BadInputError(
                f"{path}: {file.path!r} points outside the bundle",
                hint="do not use this bundle: a path that escapes the bundle directory is unsafe",
            )
    return found


def _maker(document: Any) -> str:
    """The version that wrote a manifest, as it says."""
    tool = document.get("tool") if isinstance(document, dict) else None
    return tool if isinstance(tool, str) and tool else "an unknown version"


def checked(bundle: Path, file: m.File) -> Path:
    """Check the size and SHA-256 of a bundle's file, and return its path.

    Raises:
        BadInputError: the file is missing, or its size or SHA-256 differs from the manifest's.
    """
    path = bundle / file.path
    if not path.is_file():
        raise BadInputError(f"{path}: missing from the bundle", hint="copy the bundle again, files/ included")
    if path.stat().st_size != file.size_bytes or sha256_of(path) != file.sha256:
        raise BadInputError(
            f"{path}: checksum mismatch: not the file that the manifest describes",
            hint="the copy is damaged or was edited: copy or export the bundle again",
        )
    return path


def check_files(bundle: Path, manifest: m.Manifest) -> None:
    """Check all of a bundle's files, and that its graphs have weights in no others.

    Raises:
        BadInputError: see `checked` and `check_weights`.
    """
    for file in manifest.files():
        checked(bundle, file)
    check_weights(bundle, manifest.recipe.graph, manifest.recipe.external_data)
    for engine in manifest.artifacts.engines:
        check_weights(bundle, *engine.precision_graph())


def check_weights(bundle: Path, graph: m.File, beside: Sequence[m.File]) -> None:
    """Check that a graph has weights only in itself and in `beside`: other files have no checksum.

    Raises:
        BadInputError: it has some in another file, or seems so and cannot be parsed.
    """
    path = bundle / graph.path
    listed = {os.path.normpath(bundle / file.path) for file in beside}
    try:
        found = external_files(path)
    except Exception as error:  # protobuf and onnx_ir raise many types
        raise BadInputError(f"{path}: is no ONNX file: {error}", hint="export the bundle again") from error
    for file in found:
        if os.path.normpath(file) not in listed:
            raise BadInputError(
                f"{path}: has weights in {file.name!r}, which the manifest does not list",
                hint="export the bundle again",
            )


@dataclass(frozen=True)
class HeldOut:
    """Held-out inputs of one size, [N, H, W, C], and eager PyTorch's logits for them, float32.

    The logits are reduced as by `parity.outputs.sampled`.
    """

    pixels: Pixels
    logits: Float32Array
    labels: list[int] | None = None
    further: tuple[Float32Array, ...] = ()
    """Values of the outputs after the first."""
    sizes: tuple[HeldOut, ...] = ()
    """The first images at other sizes; empty if the input size is fixed."""
    patterns: HeldOut | None = None
    """The test patterns (`calibration.synthetic.test_patterns`); None for bundles of earlier versions."""
    names: tuple[str, ...] = ()
    """Names of the test patterns; empty for other images."""

    def outputs(self, recipe: m.Recipe) -> dict[str, Float32Array]:
        """Eager PyTorch's logits by output name, in the order of the outputs."""
        names = [port.name for port in recipe.outputs]
        return dict(zip(names, (self.logits, *self.further), strict=True))


def _array(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BadInputError(f"{path}: not a NumPy file: {error}", hint="export the bundle again") from error
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
        raise BadInputError(
            f"{path}: not the array that the manifest describes, {np.dtype(dtype)} {list(shape)}",
            hint="export the bundle again",
        )
    return array


def held_out(bundle: Path, manifest: m.Manifest) -> HeldOut:
    """Read a bundle's held-out inputs, [N, H, W, C], and eager PyTorch's logits for them, float32.

    The logits are reduced as by `parity.outputs.sampled`.
    """
    described = manifest.artifacts.held_out
    recipe, p = manifest.recipe, manifest.recipe.preprocess

    def read(
        part: m.HeldOut | m.HeldOutSize | m.HeldOutPatterns, height: int, width: int
    ) -> tuple[Pixels, list[Float32Array]]:
        dtype = np.float32 if p.keeps_values else np.uint8
        pixels = _array(checked(bundle, part.inputs), dtype, (part.count, height, width, p.channels))
        shapes = [sampled_shape(port.of_image(height, width)) for port in recipe.outputs]
        files = [part.logits, *part.further]
        return pixels, [
            _array(checked(bundle, file), np.float32, (part.count, *shape))
            for file, shape in zip(files, shapes, strict=True)
        ]

    sizes = []
    for part in described.sizes:
        pixels, (logits, *further) = read(part, part.height, part.width)
        sizes.append(HeldOut(pixels, logits, None, tuple(further)))
    pixels, (logits, *further) = read(described, p.crop_height, p.crop_width)
    whole = HeldOut(pixels, logits, described.labels, tuple(further), tuple(sizes))
    if described.patterns is None:
        return whole
    pixels, (logits, *further) = read(described.patterns, p.crop_height, p.crop_width)
    names = tuple(described.patterns.names)
    return replace(whole, patterns=HeldOut(pixels, logits, None, tuple(further), names=names))


def named(bundle: Path, manifest: m.Manifest, name: str) -> m.Engine:
    """The engine of a bundle that has this name.

    Raises:
        BadInputError: the bundle has no engine of this name, or this version does not know the engine's target or
            precision.
    """
    engines = {engine.name: engine for engine in manifest.artifacts.engines}
    if name in manifest.unknown_engines:
        raise BadInputError(
            f"{bundle}: engine {name!r} is of a target or precision that this version does not know",
            hint=f"update export-zoo, or choose one of: {', '.join(engines)}",
        )
    if name not in engines:
        raise BadInputError(
            f"{bundle}: no engine {name!r}", hint=f"the bundle has: {', '.join(engines) or 'none'}"
        )
    return engines[name]


@dataclass(frozen=True)
class Attested:
    """Results of `verify` for a bundle's current manifest, on all machines that ran it."""

    by_file: dict[str, m.Attestation]
    """Attestations by path within the bundle, newest first."""
    unreadable: list[str]
    """Paths of files that this version cannot read as attestations."""


def attestations(bundle: Path) -> Attested:
    """Read all attestations of a bundle. Attestations for another manifest are left out."""
    sha256 = sha256_of(bundle / MANIFEST)
    found = Attested({}, [])
    for path in sorted((bundle / ATTESTATIONS).glob("*.json"), reverse=True):  # named by time
        name = path.relative_to(bundle).as_posix()
        try:
            if not path.is_file():  # reading a pipe would block
                raise ValueError("not a file")
            attestation = m.Attestation.model_validate_json(path.read_bytes())
        except (OSError, ValueError):
            found.unreadable.append(name)
            continue
        if attestation.manifest_sha256 == sha256:
            found.by_file[name] = attestation
    return found
