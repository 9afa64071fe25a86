"""TensorRT and TensorRT-RTX as targets: engines are plans that their builders compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from export_zoo.base.cuda import device_capability, device_name, driver_version, has_cuda_device
from export_zoo.base.errors import TargetUnavailableError
from export_zoo.base.machine import library_versions
from export_zoo.engines.targets.base import BuildRequest, OpenEngine, Opening, Target, TritonBackend
from export_zoo.engines.targets.options import CURRENT, BuildOptions

if TYPE_CHECKING:
    from export_zoo.engines.precision.base import Precision
    from export_zoo.engines.precision.int8.rules import Int8Rules
    from export_zoo.engines.targets.plan import Compiled, Plan

CUDA = 13
"""Major version of CUDA that the driver must support: since TensorRT 11 and TensorRT-RTX 1.7."""


def driver_too_old() -> str:
    """Why the driver cannot run TensorRT; empty if it can, or if there is no driver."""
    version = driver_version()
    if version is None or version[0] >= CUDA:
        return ""
    return f"the NVIDIA driver supports CUDA {version[0]}.{version[1]}, {CUDA}.0 is needed"


def _recorded(options: BuildOptions) -> dict[str, Any]:
    """Options as the manifest and the stage cache record them. The timing cache is a file of its own."""
    return {name: value for name, value in asdict(options).items() if name != "timing_cache"}


class _Plans(Target):
    """Base class of both targets."""

    device: Literal["cpu", "gpu"] = "gpu"
    compiled = may_refuse = True

    @property
    def int8(self) -> Int8Rules:
        from export_zoo.engines.targets.tensorrt.placement import INT8_RULES

        return INT8_RULES

    def why_not_run(self, precision: Precision, plan: Plan | None) -> str:
        assert plan is not None
        if absent := super().why_not_run(precision, plan):
            return absent
        package, version = self.distribution, self.version
        if version != plan.version and not plan.version_compatible:
            return f"built by {package} {plan.version}, this is {version}"
        here = device_capability()
        if here is None:
            return "there is no CUDA device here"
        if reason := driver_too_old():
            return reason
        if here not in plan.compute_capabilities and not plan.hardware_compatible:
            return f"built for compute capability {', '.join(plan.compute_capabilities)}, this GPU has {here}"
        return ""

    def open(self, opening: Opening) -> OpenEngine:
        from export_zoo.engines.targets.tensorrt.engine import TensorRTEngine

        assert opening.plan is not None
        return TensorRTEngine(
            opening.file,
            target=self.name,
            weights=opening.graph if opening.plan.strip_weights else None,
            runtime_cache=opening.runtime_cache,
            host_code=opening.plan.version_compatible,
        )

    def _gpu(self, options: BuildOptions) -> str | None:
        """The GPU on which kernels are chosen during the build; None if they are chosen when the engine runs."""
        del options
        return device_name()

    def check_graph(self, graph: Path) -> None:
        from export_zoo.engines.targets.tensorrt.build import check_graph

        check_graph(graph, self.name)

    def build_key(self, request: BuildRequest) -> dict[str, Any]:
        from export_zoo.base.graph_io import sha256_of

        options = self.own_options(request.options)
        timings = options.timing_cache
        return {
            "versions": library_versions(self.distribution),
            "options": _recorded(options),
            "timing_cache": sha256_of(timings) if timings is not None else None,
            "gpu": self._gpu(options),
        }

    def build(self, request: BuildRequest, folder: Path, steps: Callable[[int, int], None]) -> Compiled:
        from export_zoo.engines.targets.plan import Compiled, Plan
        from export_zoo.engines.targets.tensorrt.build import build_engine
        from export_zoo.engines.targets.tensorrt.worker import TIMING_SUFFIX

        options = self.own_options(request.options)
        engine = folder / "engine.plan"
        built = build_engine(
            request.graph,
            engine,
            target=self.name,
            batch=request.batch,
            sizes=request.sizes,
            options=options,
            steps=steps,
        )
        known = {"version": built.version, "compute_capabilities": built.compute_capabilities}
        timings = engine.with_suffix(TIMING_SUFFIX)
        return Compiled(
            engine.name,
            Plan.model_validate({**_recorded(options), **known}),
            built.warnings,
            timings.name if timings.is_file() else None,
        )


class TensorRT(_Plans):
    """TensorRT: builds only on the GPU that it builds for."""

    name = distribution = "tensorrt"
    install = "install it with `pip install 'export-zoo[tensorrt]'`"
    build_options = frozenset(
        "workspace_mb refittable strip_weights hardware_compatible version_compatible timing_cache".split()
    )
    triton = TritonBackend("tensorrt_plan", "model.plan", "KIND_GPU")

    @property
    def unavailable(self) -> str:
        if reason := super().unavailable:
            return reason
        if not has_cuda_device():
            return "it builds only on the GPU that the engine is for, and there is no CUDA device here"
        return driver_too_old()


class TensorRTRTX(_Plans):
    """TensorRT-RTX: builds without the GPU that it builds for, and compiles kernels when the engine runs."""

    name = distribution = "tensorrt-rtx"
    install = "install it with `pip install 'export-zoo[tensorrt-rtx]'`"
    build_options = frozenset("workspace_mb refittable strip_weights compute_capabilities".split())
    preferred = "tensorrt"

    def check(self, options: BuildOptions) -> None:
        if (options.refittable or options.strip_weights) and not has_cuda_device():
            # Without a GPU, its builder fails with an internal error (1.7.1, any convolution).
            raise TargetUnavailableError(
                "--refittable and --strip-weights: tensorrt-rtx needs a GPU in this machine for them",
                hint="leave them out, or build on a machine with a GPU",
            )
        if CURRENT in options.compute_capabilities and not has_cuda_device():
            raise TargetUnavailableError(
                f"--compute-capability {CURRENT}: there is no CUDA device here",
                hint="give the compute capability, for example 8.9, or build on the machine with the GPU",
            )
        if options.compute_capabilities:
            from export_zoo.engines.targets.tensorrt.build import check_capabilities

            check_capabilities(options)

    def own_options(self, options: BuildOptions) -> BuildOptions:
        options = super().own_options(options)
        return replace(options, compute_capabilities=tuple(dict.fromkeys(options.compute_capabilities)))

    def _gpu(self, options: BuildOptions) -> str | None:
        return device_name() if CURRENT in options.compute_capabilities else None
