"""Hashes of the files that a cell's command line names: the cell's result depends on them, too."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from export_zoo.base.graph_io import sha256_of
from export_zoo.exporter.matrix.plan import Cell
from export_zoo.exporter.model_sources import source_of

_FILES = ("--weights", "--preprocess", "--ranges", "--costs", "--timing-cache")
_FOLDERS = ("--calib", "--verify")


def fingerprints(cell: Cell) -> dict[str, str] | None:
    """SHA-256 of each file and folder, by its name on the command line.

    A folder's hash covers the names and sizes of its files. Returns None for the user's own networks: their code may
    import and read files from anywhere.
    """
    if ":" in cell.model:
        return None
    found = {}
    for argument in cell.arguments:
        option, _, value = argument.partition("=")
        path = Path(value)
        if (option in _FILES and path.is_file()) or (option in _FOLDERS and path.is_dir()):
            found[value] = content_of(path)
    return found


def named_paths(cell: Cell) -> list[Path]:
    """Files and folders that a cell's command line names and that exist, and the file of the user's own network."""
    values = [
        value
        for option, _, value in (a.partition("=") for a in cell.arguments)
        if option in _FILES + _FOLDERS
    ]
    if source_of(cell.model).own_code:
        values.append(cell.model.rpartition(":")[0])
    return [path for path in map(Path, dict.fromkeys(values)) if path.exists()]


def content_of(path: Path) -> str:
    """SHA-256 of a file; of a folder's file names and sizes."""
    resolved = path.resolve()
    return _of_file(resolved, resolved.stat().st_mtime_ns) if path.is_file() else _of_folder(resolved)


def of_emulation(
    cell: Cell,
    command: Sequence[str],
    inputs: Mapping[str, str],
    versions: Mapping[str, str],
    engine: Mapping[str, Any],
) -> dict[str, str] | None:
    """SHA-256 of the engine that an emulated CPU runs, and of what its export depended on.

    Returns None for the user's own networks, as `fingerprints` does.

    Args:
        cell: the cell of the emulated CPU.
        command, inputs, versions, engine: fields of the export's result.
    """
    if ":" in cell.model:
        return None
    export = json.dumps([list(command), dict(inputs), dict(versions)], sort_keys=True)
    return {
        "engine": str((engine.get("file") or {}).get("sha256", "")),
        "export": hashlib.sha256(export.encode()).hexdigest(),
    }


@cache
def _of_file(path: Path, changed: int) -> str:
    del changed  # part of the cache's key: a file that changes during a run is hashed again
    return sha256_of(path)


@cache
def _of_folder(folder: Path) -> str:
    combined = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        combined.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
    return combined.hexdigest()
