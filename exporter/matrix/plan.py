"""Read a matrix file (models x precisions x targets x CPUs, overrides, excludes, CI jobs) and list its cells."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from export_zoo.base import yaml_text
from export_zoo.base.errors import UsageError, first_of
from export_zoo.engines.emulation.cpus import CPUS
from export_zoo.engines.emulation.verify import IMAGES
from export_zoo.engines.precision.registry import PRECISIONS
from export_zoo.engines.targets.registry import TARGETS
from export_zoo.exporter.model_sources import source_of

HOST = "host"
"""This machine's CPU, which exports. The other CPUs are emulated and run the exported bundle."""
KNOWN_CPUS = (HOST, *CPUS)

Value = bool | int | float | str | list[str | int | float]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @field_validator("models", "precisions", "targets", "cpus", mode="before", check_fields=False)
    @classmethod
    def _one_is_a_list(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given


class Where(_Model):
    """Cells that a rule applies to. Models are globs over names. A field that is left out means all."""

    models: list[str] = ["*"]
    precisions: list[str] = list(PRECISIONS)
    targets: list[str] = list(TARGETS)

    def matches(self, model: str, target: str, precision: str) -> bool:
        return (
            any(fnmatch.fnmatchcase(model, pattern) for pattern in self.models)
            and target in self.targets
            and precision in self.precisions
        )


class Exclude(Where):
    cpus: list[str] = list(KNOWN_CPUS)
    reason: str = Field(description="Shown in the report.")

    def excludes(self, model: str, target: str, precision: str, cpu: str) -> bool:
        """Whether the rule excludes a cell. A rule for the host excludes all CPUs: without it there is no bundle."""
        return self.matches(model, target, precision) and (cpu in self.cpus or HOST in self.cpus)


class Override(Where):
    options: dict[str, Value] = Field(description="Options of `export-zoo export`, without the dashes.")


class Job(Where):
    """A part of the matrix that one CI machine runs."""

    name: str
    runs_on: list[str] = Field(alias="runs-on", description="Labels of the runner.")
    cpus: list[str] | None = Field(default=None, description="CPUs of the job, in place of the file's.")
    options: dict[str, Value] = {}
    accelerators: list[str] = Field(
        default=[],
        description="Types of GPU that the job's engines are for, as Ray names them (`H100`). A cluster takes the "
        "first one that it has.",
    )


class MatrixFile(_Model):
    """Contents of the YAML file; see docs/matrix.md."""

    models: list[str]
    precisions: list[str]
    targets: list[str]
    cpus: list[str] = [HOST]
    cpu_images: int = Field(
        default=IMAGES, ge=2, alias="cpu-images", description="Held-out images that an emulated CPU runs."
    )
    options: dict[str, Value] = {}
    timeout: int = Field(default=3600, gt=0, description="Time limit of a cell, in seconds.")
    memory: float | None = Field(default=None, gt=0, description="Memory limit of a cell, in GiB.")
    exclude: list[Exclude] = []
    override: list[Override] = []
    jobs: list[Job] = []


def cell_name(model: str, engine: str, cpu: str = HOST) -> str:
    """Name of a cell and its files: `timm-resnet18-onnxruntime-fp32`, with `-haswell` added if it is emulated."""
    name = f"{re.sub(r'[^A-Za-z0-9_.]+', '-', model).strip('-.')}-{engine}"
    return name if cpu == HOST else f"{name}-{cpu}"


@dataclass(frozen=True)
class Cell:
    """One engine of one model on one CPU, and its command line: export, or verify on an emulated CPU."""

    model: str
    target: str
    precision: str
    arguments: tuple[str, ...]
    """Further options of `export-zoo export`."""
    excluded: str = ""
    """Reason from the matrix file if the cell is excluded, else empty."""
    cpu: str = HOST
    images: int = IMAGES
    """Held-out images that an emulated CPU runs."""
    accelerators: tuple[str, ...] = ()
    """Types of GPU that the engine is for, the best first; on a cluster, the first one that it has."""

    def command(self) -> list[str]:
        """Arguments of `export-zoo`, without --out and --json. A bundle is named without its folder."""
        if self.cpu != HOST:
            return ["verify", self.bundle, f"--cpu={self.cpu}", f"--images={self.images}"]
        return [
            "export",
            self.model,
            f"--precision={self.precision}",
            f"--target={self.target}",
            *self.arguments,
        ]

    @property
    def engine(self) -> str:
        return f"{self.target}-{self.precision}"

    @property
    def name(self) -> str:
        return cell_name(self.model, self.engine, self.cpu)

    @property
    def bundle(self) -> str:
        """Name of the bundle: the same on each CPU."""
        return f"{cell_name(self.model, self.engine)}.bundle"

    @property
    def skipped(self) -> str:
        """Reason why an emulated CPU does not run this engine, else empty."""
        if self.cpu == HOST:
            return ""
        machine, target = CPUS[self.cpu].machine, TARGETS[self.target]
        if machine in target.emulated:
            why = target.why_not_on(machine, PRECISIONS[self.precision])
            return f"not run on {self.cpu}: {why}" if why else ""
        names = " and ".join(target.name for target in TARGETS.values() if machine in target.emulated)
        return f"not run on {self.cpu}: emulation runs engines of {names} only"


def by_bundle(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The cells of each bundle: the one that exports it, and those of emulated CPUs that run it."""
    return [list(group) for _, group in groupby(cells, key=lambda cell: cell.bundle)]


def read(path: Path) -> MatrixFile:
    """Read and check a matrix file. Raises UsageError, which names the file and the key, if it is not one."""
    try:
        document = yaml_text.load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}", hint="give a YAML file") from error
    except (yaml_text.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path}: not YAML: {' '.join(str(error).split())}", hint="see docs/matrix.md"
        ) from error
    try:
        found = MatrixFile.model_validate(document)
    except ValidationError as error:
        raise UsageError(f"{path}: {first_of(error)}", hint="see docs/matrix.md") from error
    rules: list[MatrixFile | Where] = [found, *found.exclude, *found.override, *found.jobs]
    for rule in rules:
        for key, given, known in (
            ("precisions", rule.precisions, PRECISIONS),
            ("targets", rule.targets, TARGETS),
        ):
            if wrong := [name for name in given if name not in known]:
                raise UsageError(
                    f"{path}: {key}: unknown {wrong[0]!r}", hint=f"choose from {', '.join(known)}"
                )
    _check_cpus(path, found)
    names = [job.name for job in found.jobs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"{path}: jobs: two jobs are called {min(twice)!r}", hint="rename one")
    return found


def _check_cpus(path: Path, given: MatrixFile) -> None:
    axes = [("cpus", given.cpus)]
    axes += [(f"jobs: {job.name}: cpus", job.cpus) for job in given.jobs if job.cpus is not None]
    rules = [("exclude: cpus", rule.cpus) for rule in given.exclude]
    for key, names in (*axes, *rules):
        if wrong := [name for name in names if name not in KNOWN_CPUS]:
            raise UsageError(
                f"{path}: {key}: unknown {wrong[0]!r}", hint=f"choose from {', '.join(KNOWN_CPUS)}"
            )
    for key, names in axes:
        if HOST not in names:
            raise UsageError(
                f"{path}: {key}: {HOST!r} is missing",
                hint=f"add {HOST}: it makes the bundles that the other CPUs run",
            )


def _arguments(options: dict[str, Value]) -> Iterator[str]:
    for name, value in options.items():
        if value is True:
            yield f"--{name}"
        elif value is not False:
            for one in value if isinstance(value, list) else [value]:
                yield f"--{name}={one}"


@dataclass(frozen=True)
class Names:
    """Names that globs over models are matched with.

    Attributes:
        models: classification networks, so that `*` means these.
        others: other networks, for a glob that matches none of `models`.
    """

    models: Sequence[str]
    others: Sequence[str] = ()

    def matching(self, pattern: str) -> list[str]:
        for names in (self.models, self.others):
            if found := [name for name in names if fnmatch.fnmatchcase(name, pattern)]:
                return found
        return []


def _names_itself(pattern: str) -> bool:
    """Whether a pattern is a network of a source whose models no list holds."""
    return not source_of(pattern).listed


def _models(patterns: Sequence[str], names: Names, path: Path) -> Iterable[str]:
    """The models that match the patterns, each once, in the patterns' order."""
    found: dict[str, None] = {}
    for pattern in patterns:
        if _names_itself(pattern) and any(sign in pattern for sign in "*?["):
            raise UsageError(
                f"{path}: models: {pattern!r}: globs match torchvision's models only",
                hint="name each network of timm and each of your own",
            )
        matching = [pattern] if _names_itself(pattern) else names.matching(pattern)
        if not matching:
            raise UsageError(
                f"{path}: models: {pattern!r} matches no model",
                hint="see `export-zoo list` for torchvision's; name each network of timm and each of your own",
            )
        found |= dict.fromkeys(matching)
    return found


def cells(
    path: Path,
    given: MatrixFile,
    names: Names,
    check: Callable[[Sequence[str]], object],
    job: str | None = None,
) -> list[Cell]:
    """All cells of a matrix, or of some of its jobs, model by model. Emulated CPUs follow the cell that exports.

    Args:
        path: path of the file, for messages.
        names: names of torchvision's models.
        check: reads the arguments of an `export`; raises UsageError if they are wrong.
        job: a glob over the names of the file's jobs.

    Raises:
        UsageError: a pattern matches no model, the job does not exist, no cell is left, cells of two models would
            have the same name, or `export` does not take the options.
    """
    for rule in (*given.exclude, *given.override, *given.jobs):
        _models([pattern for pattern in rule.models if not _names_itself(pattern)], names, path)
    models = _models(given.models, names, path)
    chosen: Sequence[Job | None] = [None] if job is None else _jobs(given, path, job)
    found: dict[str, Cell] = {}
    for one in chosen:
        for cell in _cells_of(given, models, one):
            if found.setdefault(cell.name, cell).model != cell.model:
                raise UsageError(
                    f"{path}: models: {found[cell.name].model} and {cell.model} would both be called {cell.name}",
                    hint="rename one of the files or functions",
                )
    _check(path, found.values(), check)
    if not found:
        raise UsageError(f"{path}: no cell is left", hint="check models, targets and jobs")
    place = {bundle: index for index, bundle in enumerate(dict.fromkeys(c.bundle for c in found.values()))}
    return sorted(found.values(), key=lambda cell: place[cell.bundle])


def _jobs(given: MatrixFile, path: Path, pattern: str) -> list[Job]:
    found = [job for job in given.jobs if fnmatch.fnmatchcase(job.name, pattern)]
    if not found:
        known = ", ".join(job.name for job in given.jobs) or "none"
        raise UsageError(f"--job {pattern}: {path} has no such job", hint=f"its jobs: {known}")
    return found


def _cells_of(given: MatrixFile, models: Iterable[str], job: Job | None) -> Iterator[Cell]:
    axis = given.cpus if job is None or job.cpus is None else job.cpus
    cpus = sorted(axis, key=lambda cpu: cpu != HOST)
    for model in models:
        for target in given.targets:
            for precision in given.precisions:
                if job is not None and not job.matches(model, target, precision):
                    continue
                options = dict(given.options)
                for override in given.override:
                    if override.matches(model, target, precision):
                        options |= override.options
                if job is not None:
                    options |= job.options
                for cpu in cpus:
                    reasons = [e.reason for e in given.exclude if e.excludes(model, target, precision, cpu)]
                    yield Cell(
                        model,
                        target,
                        precision,
                        tuple(_arguments(options)),
                        reasons[0] if reasons else "",
                        cpu,
                        given.cpu_images,
                        tuple(job.accelerators) if job is not None and cpu == HOST else (),
                    )


_TAKEN = ("--out", "--json", "--precision", "--target", "--quiet", "--verbose", "--help")


def _check(path: Path, found: Iterable[Cell], check: Callable[[Sequence[str]], object]) -> None:
    """Check each command line of `export` before the first cell runs."""
    for cell in found:
        if cell.cpu != HOST:
            continue
        if taken := [a for a in cell.arguments if a.partition("=")[0] in _TAKEN]:
            raise UsageError(
                f"{path}: options: {taken[0]}: the matrix sets this option itself", hint="leave it out"
            )
        try:
            check(cell.command()[1:])
        except UsageError as error:
            raise UsageError(f"{path}: {cell.name}: {error.message}", hint=error.hint) from error


def github(given: MatrixFile, path: Path, job: str | None = None) -> dict[str, Any]:
    """Jobs for `strategy.matrix` of a GitHub workflow: the name of each and the labels of its runner."""
    return {"include": [{"name": one.name, "runs-on": one.runs_on} for one in _jobs(given, path, job or "*")]}
