"""Base class of targets: what a target is to the rest of the program."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from export_zoo.base.machine import library_versions
from export_zoo.engines.precision.base import Precision
from export_zoo.engines.targets.options import BuildOptions

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from export_zoo.engines.precision.int8.rules import Int8Rules
    from export_zoo.engines.targets.plan import Plan

MAX_BATCH = 4096
"""A batch is run and compared at its largest: 2.5 GB of input at 224x224."""

Size = tuple[int, int]


class Runner(Protocol):
    """Runs a batch float32 [N, 3, H, W]; gives all outputs, float32."""

    def run_all(self, batch: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], ...]: ...


class OpenEngine(Runner, Protocol):
    """An engine file that a target opened."""

    output_names: list[str]


@dataclass(frozen=True)
class Opening:
    """An engine file, and how it is to be opened."""

    file: Path
    precision: Precision
    plan: Plan | None = None
    graph: Path | None = None
    """The precision graph that was compiled: an engine without weights gets them from it."""
    threads: int = 0
    """0 for all cores."""
    runtime_cache: Path | None = None
    """Where kernels that are compiled at run time are kept."""
    saturating_session: Mapping[str, str] = field(default_factory=dict)
    """Session configuration of ONNX Runtime where sums of INT8 saturate; see `bundle.manifest.Engine`."""


@dataclass(frozen=True)
class BuildRequest:
    """What to compile. Batch and sizes are (min, opt, max); `sizes` is None where the graph fixes them."""

    graph: Path
    batch: tuple[int, int, int]
    sizes: tuple[Size, Size, Size] | None
    options: BuildOptions


@dataclass(frozen=True)
class Compiled:
    """What compiling came to, beside the file."""

    plan: Plan
    warnings: Mapping[str, int]
    """The builder's, with their number."""


@dataclass(frozen=True)
class TritonBackend:
    """How Triton Inference Server runs a target's engines."""

    platform: str
    file: str
    """Name of the engine's file in a model's folder."""
    kind: Literal["KIND_CPU", "KIND_GPU"]


class Target(ABC):
    """A backend that engines are built for and run by. One instance each, in `targets.registry`.

    Importing them loads nothing heavy; methods import what they need.
    """

    name: str
    """As in `--target` and in engines' names."""
    distribution: str
    """The package that builds its engines."""
    install: str
    """How to install it, for messages."""
    device: Literal["cpu", "gpu"]
    compiled: bool = False
    """An engine is a file compiled from its precision graph; else that graph is the engine."""
    build_options: frozenset[str] = frozenset()
    """Fields of BuildOptions that it has."""
    preferred: str | None = None
    """Target that `auto` takes instead, where that is available."""
    unsupported: Mapping[str, str] = {}
    """Reasons by precision, for those that it cannot build."""
    emulated: bool = False
    """Its engines can be run on an emulated CPU."""
    saturating_session: Mapping[str, str] | None = None
    """What a new engine's manifest says of sessions where sums saturate; None where there are no sessions."""
    triton: TritonBackend | None = None

    @property
    def unavailable(self) -> str:
        """Why nothing can be built for it here; empty where it can."""
        return self.install if self.version == "absent" else ""

    @property
    def version(self) -> str:
        """Of the installed distribution; "absent" without one."""
        return library_versions(self.distribution)[self.distribution]

    @property
    @abstractmethod
    def int8(self) -> Int8Rules: ...

    def check(self, options: BuildOptions) -> None:
        """Refuse build options that cannot be had here. Raises UsageError or TargetUnavailableError."""
        del options

    def own_options(self, options: BuildOptions) -> BuildOptions:
        """The build options that it has, the others at their default."""
        return options.only(self.build_options)

    def why_not_run(self, plan: Plan | None) -> str:
        """Why an engine cannot run on this machine, from its description alone; empty where it can."""
        del plan
        return ""

    @abstractmethod
    def open(self, opening: Opening) -> OpenEngine:
        """Open an engine.

        Raises:
            BadInputError: not an engine of this target.
            TargetUnavailableError: this machine cannot load it, or cannot run it exactly.
            EnvironmentFailureError: the device refuses.
        """

    def build_key(self, request: BuildRequest) -> dict[str, Any]:
        """What a compiled engine depends on beside its graph, for the stage cache; for `compiled` targets."""
        raise NotImplementedError(self.name)

    def build(self, request: BuildRequest, out: Path, steps: Callable[[int, int], None]) -> Compiled:
        """Compile an engine; for `compiled` targets.

        Args:
            out: the engine file to write.
            steps: told how many steps are done, and of how many.

        Raises:
            UsageError: options, batch or sizes do not fit.
            ExportDefectError: the graph is refused; names node and module.
            EnvironmentFailureError: the builder crashed or was killed.
        """
        raise NotImplementedError(self.name)

    def __repr__(self) -> str:
        return f"<target {self.name}>"
