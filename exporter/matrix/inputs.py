"""What a cell's result depends on beside its command line: the files that the command line names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from export_zoo.base.graph_io import sha256_of
from export_zoo.exporter.matrix.plan import Cell

_FILES = ("--weights", "--preprocess", "--ranges", "--timing-cache")
_FOLDERS = ("--calib", "--verify")


def fingerprints(cell: Cell) -> dict[str, str] | None:
    """SHA-256 of each file and folder by its name on the command line, of a folder of names and sizes; None for the
    user's own networks: what their code imports and reads may lie anywhere.
    """
    if ":" in cell.model:
        return None
    found = {}
    for argument in cell.arguments:
        option, _, value = argument.partition("=")
        path = Path(value)
        if option in _FILES and path.is_file():
            found[value] = _of_file(path.resolve(), path.stat().st_mtime_ns)
        elif option in _FOLDERS and path.is_dir():
            found[value] = _of_folder(path.resolve())
    return found


def of_emulation(
    cell: Cell,
    command: Sequence[str],
    inputs: Mapping[str, str],
    versions: Mapping[str, str],
    engine: Mapping[str, Any],
) -> dict[str, str] | None:
    """SHA-256 of the engine that an emulated CPU runs, and of what its export depended on; None for the user's own
    networks, as of `fingerprints`.

    Args:
        cell: the emulated CPU's.
        command, inputs, versions, engine: of the result of the export.
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
    del changed  # or a file would keep its hash for a whole run
    return sha256_of(path)


@cache
def _of_folder(folder: Path) -> str:
    combined = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        combined.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
    return combined.hexdigest()
