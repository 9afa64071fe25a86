"""Results of cells, and the folder that keeps them: one JSON file a cell."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from export_zoo.base.errors import EnvironmentFailureError
from export_zoo.base.files import replacing
from export_zoo.exporter.matrix.plan import HOST, cell_name

Status = Literal["ok", "failed", "excluded", "skipped"]


@dataclass(frozen=True)
class CellResult:
    """Result of a cell, stored as JSON in the results folder; see docs/matrix.md.

    Attributes:
        gate: whether the cell's parity gate failed, or its engine did not reach the required state.
        status: `excluded` by the file; `skipped` if an emulated CPU cannot run the engine, or there is no engine.
        engine: the engine's entry in the manifest; empty if it was not built. On an emulated CPU: its name, the state
            `emulated`, the gate there, and under `emulation` the SQNR of this machine and the largest difference.
        nodes: number of nodes of the simplified FP32 graph.
        peak_mib: peak memory of the process and its children, in MiB, sampled ten times a second.
        random: whether the weights were random; INT8 figures then say nothing about accuracy.
        inputs: hashes of the files that the command line names, see `inputs.fingerprints` and `of_emulation`.
        cpu: `host` for this machine's CPU, else the name of the emulated CPU.
    """

    model: str
    target: str
    precision: str
    command: tuple[str, ...]
    status: Status
    reason: str = ""
    exit_code: int | None = None
    gate: bool = False
    seconds: float = 0.0
    peak_mib: int = 0
    nodes: int | None = None
    input_size: tuple[int, int] | None = None
    random: bool = False
    engine: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    machine: str = ""
    instruction_set: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    date: str = ""
    cpu: str = HOST

    @property
    def emulated(self) -> bool:
        return self.cpu != HOST

    @property
    def engine_name(self) -> str:
        return f"{self.target}-{self.precision}"

    @property
    def name(self) -> str:
        return cell_name(self.model, self.engine_name, self.cpu)

    def figure(self, *path: str) -> float | None:
        """A number in the engine's entry, or None."""
        found: Any = self.engine
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        return float(found) if isinstance(found, (int, float)) else None


def stored(folder: Path) -> dict[str, CellResult]:
    """Results in a results folder, by cell name. Files that cannot be read are left out; their cells run again."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            document = json.loads(path.read_text(encoding="utf-8"))
            for key in ("command", "warnings", "input_size"):
                document[key] = tuple(document[key]) if document[key] is not None else None
            result = CellResult(**document)
            found[result.name] = result
    return found


def unreadable(folder: Path, read: Mapping[str, CellResult]) -> list[str]:
    """Names of the files in a results folder that `stored` left out."""
    return sorted(path.name for path in folder.glob("*.json") if path.stem not in read)


def store(folder: Path, result: CellResult) -> None:
    path = folder / f"{result.name}.json"
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise EnvironmentFailureError(
            f"{path}: cannot be written: {error.strerror}", hint="free some space, or give another --out"
        ) from error
