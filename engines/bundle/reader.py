"""Read a bundle: its manifest, its files, its held-out inputs, and what was attested of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from export_zoo.base.errors import BadInputError, first_of
from export_zoo.base.graph_io import sha256_of
from export_zoo.engines.bundle import manifest as m
from export_zoo.engines.parity.outputs import sampled_shape

Float32Array = npt.NDArray[np.float32]
MANIFEST = "manifest.json"
ATTESTATIONS = "attestations"


def read_manifest(bundle: Path) -> m.Manifest:
    """Read and validate a bundle's manifest.

    Raises:
        BadInputError: not a bundle, a manifest of another version, or one that does not validate.
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
                f"{path}: schema version {version!r}, this export-zoo reads {m.SCHEMA_VERSION}",
                hint="use the export-zoo that wrote it, or export again",
            )
        found = m.Manifest.of(document)
    except ValidationError as error:
        raise BadInputError(
            f"{path}: damaged manifest: {first_of(error)}", hint="export the bundle again"
        ) from error
    except m.NoKnownEngineError as error:
        raise BadInputError(f"{path}: {error}", hint="update export-zoo, or export again") from error
    except (ValueError, OSError, RecursionError) as error:
        raise BadInputError(f"{path}: damaged manifest: {error}", hint="export the bundle again") from error
    for file in found.files():
        if file.path.startswith("/") or ".." in Path(file.path).parts:
            raise BadInputError(f"{path}: {file.path!r} points outside the bundle", hint="do not use it")
    return found


def checked(bundle: Path, file: m.File) -> Path:
    """The path of a bundle's file, after checking size and SHA-256.

    Raises:
        BadInputError: missing, or not the bytes that the manifest promises.
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


@dataclass(frozen=True)
class HeldOut:
    """Held-out inputs of one size, uint8 [N, H, W, 3], and eager's logits, float32, as `parity.outputs.sampled`."""

    pixels: npt.NDArray[np.uint8]
    logits: Float32Array
    labels: list[int] | None = None
    further: tuple[Float32Array, ...] = ()
    """Of the outputs beside the first."""
    sizes: tuple[HeldOut, ...] = ()
    """The first images at other sizes, where the input's is dynamic."""

    def outputs(self, recipe: m.Recipe) -> dict[str, Float32Array]:
        """Eager's logits by the name of the output, the first one first."""
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
    """Read a bundle's held-out inputs, uint8 [N, H, W, 3], and eager logits, float32, see `parity.outputs.sampled`."""
    described = manifest.artifacts.held_out
    recipe, p = manifest.recipe, manifest.recipe.preprocess

    def read(
        part: m.HeldOut | m.HeldOutSize, height: int, width: int
    ) -> tuple[npt.NDArray[np.uint8], list[Float32Array]]:
        pixels = _array(checked(bundle, part.inputs), np.uint8, (part.count, height, width, 3))
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
    return HeldOut(pixels, logits, described.labels, tuple(further), tuple(sizes))


def named(bundle: Path, manifest: m.Manifest, name: str) -> m.Engine:
    """A bundle's engine of this name.

    Raises:
        BadInputError: it has none.
    """
    engines = {engine.name: engine for engine in manifest.artifacts.engines}
    if name in manifest.unknown_engines:
        raise BadInputError(
            f"{bundle}: engine {name!r} is of a target or precision that this version does not know",
            hint=f"update export-zoo; it knows: {', '.join(engines)}",
        )
    if name not in engines:
        raise BadInputError(f"{bundle}: no engine {name!r}", hint=f"it has: {', '.join(engines) or 'none'}")
    return engines[name]


@dataclass(frozen=True)
class Attested:
    """What `verify` found of a bundle with the manifest that it has now, on whatever machines."""

    by_file: dict[str, m.Attestation]
    """By path within the bundle, newest first."""
    unreadable: list[str]
    """Paths of what is no attestation that this version can read."""


def attestations(bundle: Path) -> Attested:
    """Read all attestations of a bundle. Those of another manifest are left out."""
    sha256 = sha256_of(bundle / MANIFEST)
    found = Attested({}, [])
    for path in sorted((bundle / ATTESTATIONS).glob("*.json"), reverse=True):  # named by time
        name = path.relative_to(bundle).as_posix()
        try:
            if not path.is_file():  # a pipe would be waited for
                raise ValueError("not a file")
            attestation = m.Attestation.model_validate_json(path.read_bytes())
        except (OSError, ValueError):
            found.unreadable.append(name)
            continue
        if attestation.manifest_sha256 == sha256:
            found.by_file[name] = attestation
    return found
