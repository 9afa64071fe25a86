"""Publish a bundle. A process that is killed at any moment leaves either the old bundle or the new one.

Files are named by their hash and written first. manifest.json is replaced last. Files that no manifest refers to are
removed after that. A first bundle is written to a directory beside its final place, then renamed as a whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export_zoo.base.errors import UsageError
from export_zoo.base.files import locked, replacing
from export_zoo.base.graph_io import sha256_of
from export_zoo.engines.bundle.manifest import File, Manifest
from export_zoo.engines.bundle.reader import ATTESTATIONS, MANIFEST

FILES = "files"
_STAGING = ".export-zoo-staging-"


def describe(path: Path, stem: str) -> File:
    """The bundle entry of a file: `files/<stem>.<hash><suffix>`. External weights keep their (hashed) name."""
    sha256 = sha256_of(path)
    name = path.name if stem == "" else f"{stem}.{sha256[:16]}{path.suffix}"
    return File(path=f"{FILES}/{name}", sha256=sha256, size_bytes=path.stat().st_size)


def failed_place(out: Path) -> Path:
    """Path `OUT.failed`, where everything is kept if an engine fails its gate or misses the required state."""
    out = Path(os.path.abspath(out))  # noqa: PTH100 (links are kept)
    return out.with_name(f"{out.name}.failed")


def check_destination(out: Path) -> None:
    """Refuse a destination that holds something other than a bundle. Called before any work.

    Raises:
        UsageError: `out` is the root directory. `out`, its `.failed` neighbour or a directory above is a file. `out` or
            its neighbour holds something other than a bundle.
    """
    absolute = Path(os.path.abspath(out))  # noqa: PTH100 (links are kept)
    if not absolute.name:
        raise UsageError(f"--out {out}: is the root directory", hint="give a new directory")
    for above in absolute.parents:
        if above.exists() and not above.is_dir():
            raise UsageError(f"--out {out}: {above} is a file", hint="give a directory")
    nearest = next((above for above in (absolute, *absolute.parents) if above.is_dir()), None)
    if nearest is not None and not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"--out {out}: {nearest} cannot be written to", hint="give another directory")
    for place, shown in ((absolute, out), (failed_place(out), f"{out} ({failed_place(out).name})")):
        if place.exists() and not place.is_dir():
            raise UsageError(f"--out {shown}: is a file", hint="give a directory, or remove that file")
        if place.is_dir() and any(place.iterdir()) and not _is_bundle(place):
            raise UsageError(
                f"--out {shown}: is not empty and not a bundle",
                hint="give a new directory, or remove that one",
            )


def check_same_network(out: Path, source: Mapping[str, Any]) -> None:
    """Refuse to replace a bundle of another network. Called only if --out was not given.

    Args:
        source: entries that must be equal in the `recipe.source` of the bundle's manifest.

    Raises:
        UsageError: `out` holds the bundle of another network.
    """
    found = (_manifest(out) or {}).get("recipe", {}).get("source", {})
    for key, value in source.items():
        if found and found.get(key) != value:
            raise UsageError(
                f"{out}: holds the bundle of another network ({key} {found.get(key)!r}, not {value!r})",
                hint="give another --out, or remove that one",
            )


def _is_bundle(directory: Path) -> bool:
    return _manifest(directory) is not None


def _manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest if export-zoo wrote it, of any version, else None: `manifest.json` is a common file name."""
    try:
        document = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ours = isinstance(document, dict) and {"schema_version", "recipe", "artifacts"} <= document.keys()
    return document if ours else None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy(source: Path, target: Path) -> None:
    try:
        with replacing(target) as temporary:
            shutil.copyfile(source, temporary)
            _sync(temporary)
    except OSError as error:  # Python names the source, but the full disk is the target's
        raise OSError(error.errno, error.strerror or str(error), str(target)) from error


def _write_into(directory: Path, manifest: Manifest, sources: dict[str, Path]) -> None:
    (directory / FILES).mkdir(parents=True, exist_ok=True)
    for file in manifest.files():
        target = directory / file.path
        if not target.is_file() or sha256_of(target) != file.sha256:
            _copy(sources[file.path], target)
    _sync(directory / FILES)
    with replacing(directory / MANIFEST) as temporary:
        temporary.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
        _sync(temporary)
    _sync(directory)


_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}")
_NAMED_BY_HASH = re.compile(r".*\.([0-9a-f]{16})(?:\.\w+)?|weights-([0-9a-f]{32})\.bin")
_ATTESTATION = re.compile(r"\d{8}T\d{12}Z\.json")


def _is_ours(path: Path) -> bool:
    """Whether a file was left by a killed run, or is named by the hash of its content."""
    if _TEMPORARY.fullmatch(path.name):
        return True
    match = _NAMED_BY_HASH.fullmatch(path.name)
    return match is not None and path.is_file() and sha256_of(path).startswith(match[1] or match[2])


def _collect_garbage(directory: Path, manifest: Manifest) -> None:
    """Remove files that only an earlier manifest or a killed run needed. Never remove a file that is not ours.

    The new bundle is already in place, so a file that cannot be removed is left and is not an error.
    """
    kept = {Path(file.path).name for file in manifest.files()}
    garbage = [p for p in (directory / FILES).iterdir() if p.name not in kept and _is_ours(p)]
    garbage += [p for p in directory.glob(f".{MANIFEST}.*") if _TEMPORARY.fullmatch(p.name)]
    # The attestations belong to the old manifest.
    garbage += [p for p in (directory / ATTESTATIONS).glob("*.json") if _ATTESTATION.fullmatch(p.name)]
    for path in garbage:
        with contextlib.suppress(OSError):
            path.unlink()
    with contextlib.suppress(OSError):  # not there, or not empty
        (directory / ATTESTATIONS).rmdir()


def publish(out: Path, manifest: Manifest, sources: dict[str, Path]) -> None:
    """Write or replace the bundle at `out`.

    Args:
        sources: current path of each of the manifest's files, by bundle path.

    Raises:
        OSError: the disk is full or not writable; the old bundle stays as it was.
    """
    out = Path(os.path.realpath(out))  # a link to a directory stays a link
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.parent):
        for abandoned in out.parent.glob(f"{_STAGING}*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        if (out / MANIFEST).is_file():
            _write_into(out, manifest, sources)
            _collect_garbage(out, manifest)
            return
        staging = out.parent / f"{_STAGING}{uuid.uuid4().hex}"
        try:
            _write_into(staging, manifest, sources)
            if out.is_dir():
                out.rmdir()  # empty, or check_destination would have refused
            staging.rename(out)
            _sync(out.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
