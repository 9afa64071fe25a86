"""Base class of targets: the interface that the rest of the program uses."""

from __future__ import annotations

import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from export_zoo.base.machine import library_versions
from export_zoo.engines.precision.base import Precision
from export_zoo.engines.targets.options import BuildOptions

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx_ir as ir

    from export_zoo.engines.parity.checked_sizes import Size
    from export_zoo.engines.precision.int8.rules import Int8Rules
    from export_zoo.engines.targets.float_for_speed import FloatForSpeed
    from export_zoo.engines.targets.plan import Compiled, Plan

MAX_BATCH = 4096
"""Maximum batch size. Engines are run and compared at their largest batch: 2.5 GB of input at 224x224."""


class Runner(Protocol):
    """Runs a batch, float32 [N, 3, H, W], and returns all outputs, float32."""

    def run_all(self, batch: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], ...]: ...


class OpenEngine(Runner, Protocol):
    """An engine file that a target opened."""

    output_names: list[str]


@dataclass(frozen=True)
class Opening:
    """An engine file and the options for opening it."""

    file: Path
    precision: Precision
    plan: Plan | None = None
    graph: Path | None = None
    """The precision graph that was compiled. An engine without weights gets its weights from it."""
    threads: int = 0
    """Number of threads of each stream; 0 for all cores, shared by the streams."""
    streams: int = 1
    """Number of batches that ONNX Runtime and OpenVINO compute at the same time."""
    runtime_cache: Path | None = None
    """File for kernels that are compiled at run time."""
    saturating_session: Mapping[str, str] = field(default_factory=dict)
    """Session configuration of ONNX Runtime on CPUs where INT8 sums saturate; see `bundle.manifest.Engine`."""


@dataclass(frozen=True)
class Worker:
    """A class that opens an engine in a process that has few packages, on one thread: `engines.emulation.worker`."""

    engine: str
    """The class, as `module:Class`. Its first argument is the engine's file."""
    arguments: Mapping[str, Any]
    """Further arguments, as JSON can hold them."""
    distribution: str
    """The package that runs the engine."""


@dataclass(frozen=True)
class BuildRequest:
    """A request to compile an engine. Batch and sizes are (min, opt, max). `sizes` is None if the graph fixes them."""

    graph: Path
    batch: tuple[int, int, int]
    sizes: tuple[Size, Size, Size] | None
    options: BuildOptions


@dataclass(frozen=True)
class TritonBackend:
    """How Triton Inference Server runs a target's engines."""

    platform: str
    file: str
    """Name of the engine's file in a model's folder."""
    kind: Literal["KIND_CPU", "KIND_GPU"]


class Target(ABC):
    """A backend that builds and runs engines. Each target has one instance, in `targets.registry`.

    Importing targets loads no heavy libraries. Methods import what they need.
    """

    name: str
    """Name in `--target` and in the names of engines."""
    distribution: str
    """The package that builds its engines."""
    install: str
    """How to install the package, for messages."""
    device: Literal["cpu", "gpu"]
    compiled: bool = False
    """Whether an engine is a file compiled from its precision graph. Otherwise, that graph is the engine."""
    may_refuse: bool = False
    """Whether there are FP32 graphs that it does not take: `check_graph` finds out."""
    build_options: frozenset[str] = frozenset()
    """Fields of BuildOptions that the target supports."""
    preferred: str | None = None
    """Target that `auto` chooses instead, if it is available."""
    unsupported: Mapping[str, str] = {}
    """Precisions that the target cannot build, each with the reason."""
    emulated: frozenset[str] = frozenset()
    """Machines, `x86_64` or `aarch64`, whose CPUs can be emulated to run its engines."""
    saturating_session: Mapping[str, str] | None = None
    """Session configuration in a new engine's manifest, for CPUs where sums saturate; None if there are no sessions."""
    triton: TritonBackend | None = None
    ovms: bool = False
    """Whether OpenVINO Model Server can run its engines."""

    @property
    def unavailable(self) -> str:
        """Why this machine cannot build for the target; empty if it can."""
        return self.install if self.version == "absent" else ""

    @property
    def version(self) -> str:
        """Version of the installed distribution; "absent" if it is not installed."""
        return library_versions(self.distribution)[self.distribution]

    @property
    @abstractmethod
    def int8(self) -> Int8Rules: ...

    def takes_costs(self, path: Path) -> bool:
        """Whether the target uses a cost file. Raises BadInputError if it does, and this is not one."""
        del path
        return False

    def float_for_speed(self, graph: ir.Graph, kept: Set[str], costs: Path | None) -> FloatForSpeed | None:
        """Layers of an FP32 graph that INT8 leaves float because that is faster; None if the target has no cost file.

        Args:
            kept: names of layers that stay float anyway.
            costs: the cost file; None for the target's own.

        Raises:
            BadInputError: not a cost file.
        """
        del graph, kept, costs
        return None

    def check(self, options: BuildOptions) -> None:
        """Check that this machine supports the build options. Raises UsageError or TargetUnavailableError."""
        del options

    def own_options(self, options: BuildOptions) -> BuildOptions:
        """The build options that the target supports, with the others at their default."""
        return options.only(self.build_options)

    def why_not_run(self, precision: Precision, plan: Plan | None) -> str:
        """Why an engine cannot run on this machine, judged by its description alone; empty if it can."""
        del plan
        if self.version == "absent":
            return f"the package {self.distribution} is not installed"
        return self.why_not_on(platform.machine(), precision)

    def why_not_on(self, machine: str, precision: Precision) -> str:
        """Why engines of a precision do not run on CPUs of a machine, `x86_64` or `aarch64`; empty if they do."""
        del machine, precision
        return ""

    @abstractmethod
    def open(self, opening: Opening) -> OpenEngine:
        """Open an engine.

        Raises:
            BadInputError: not an engine of this target.
            TargetUnavailableError: this machine cannot load it, or cannot run it exactly.
            EnvironmentFailureError: the device reports an error.
        """

    def worker(self, opening: Opening) -> Worker:
        """The class that opens an engine on an emulated CPU. Only for targets that can be `emulated`."""
        raise NotImplementedError(self.name)

    def node_times(self, opening: Opening, batch: npt.NDArray[np.float32]) -> Mapping[str, float]:
        """Time of each node of an engine, in milliseconds for one batch; {} if the target cannot tell."""
        del opening, batch
        return {}

    def check_graph(self, graph: Path) -> None:
        """Find out quickly whether the target takes an FP32 graph, before INT8 is tuned. Only where it `may_refuse`.

        Raises:
            TargetRefusalError: it does not; the message names node and module.
        """
        raise NotImplementedError(self.name)

    def build_key(self, request: BuildRequest) -> dict[str, Any]:
        """Inputs of a compiled engine besides its graph, for the stage cache. Only for `compiled` targets."""
        raise NotImplementedError(self.name)

    def build(self, request: BuildRequest, folder: Path, steps: Callable[[int, int], None]) -> Compiled:
        """Compile an engine. Only for `compiled` targets.

        Args:
            folder: where to write the engine's files.
            steps: called with the number of finished steps and their total.

        Raises:
            UsageError: options, batch or sizes do not fit.
            TargetRefusalError: the graph is rejected; the message names node and module.
            EnvironmentFailureError: the builder crashed or was killed.
        """
        raise NotImplementedError(self.name)

    def __repr__(self) -> str:
        return f"<target {self.name}>"
