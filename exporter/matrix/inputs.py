"""Hashes of the files that a cell's command line names: the cell's result depends on them, too."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from export_zoo.exporter.cluster.files import content_of
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
