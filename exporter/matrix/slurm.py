"""A Slurm array script that runs a matrix: one task for each bundle, on any node that sees the same files."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

import jinja2

from export_zoo.base.errors import UsageError
from export_zoo.exporter.matrix.plan import Cell, by_bundle

_SPARE = 1.2
"""Memory that is asked for, as a multiple of what is expected: Slurm ends a task that takes more."""

_START_SECONDS = 120
"""Time of a task beside its cells."""


def part_of(cells: Sequence[Cell], index: int) -> list[Cell]:
    """The cells of one bundle, counted from 0. Raises UsageError if there are fewer bundles."""
    found = by_bundle(cells)
    if not 0 <= index < len(found):
        raise UsageError(
            f"--part {index}: the matrix has parts 0 to {len(found) - 1}", hint="give one of them"
        )
    return found[index]


def script(
    cells: Sequence[Cell],
    file: Path,
    out: Path,
    *,
    options: Sequence[str],
    seconds: float,
    memory: float | None,
    cores: int,
    expected: Callable[[Cell], int],
) -> str:
    """The text of the script.

    Args:
        file: the matrix file.
        out: the folder for results and bundles, which all nodes share.
        options: further options of `export-zoo matrix`.
        seconds: time limit of a cell.
        memory: memory of a task, in GiB; None for what its largest cell is expected to take.
        cores: number of cores of a task.

    Raises:
        UsageError: the cells are for different types of GPU.
    """
    accelerators = {cell.accelerators for cell in cells}
    if len(accelerators) > 1:
        raise UsageError(
            "--slurm: the cells are for different types of GPU, and an array is for one",
            hint="write a script for each job, with --job NAME",
        )
    groups = by_bundle(cells)
    largest = max(map(expected, cells)) if memory is None else memory * 2**30
    command = [sys.executable, "-m", "export_zoo", "matrix", str(file), f"--out={out}", *options]
    template = files(__package__).joinpath("slurm.sh.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(template).render(
        file=file,
        last=len(groups) - 1,
        cores=cores,
        memory_mib=math.ceil((largest if memory is not None else _SPARE * largest) / 2**20),
        minutes=math.ceil((max(map(len, groups)) * seconds + _START_SECONDS) / 60),
        out=str(out.resolve()),
        accelerators=[*accelerators.pop()],
        folder=shlex.quote(str(Path.cwd())),
        command=shlex.join(command),
    )
