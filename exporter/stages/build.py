"""Stage: from the simplified graph to the engine files of one target and precision."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from export_zoo.base.graph_io import sha256_of
from export_zoo.base.machine import library_versions
from export_zoo.calibration.ranges import Ranges
from export_zoo.engines.bundle.loading import why_not_here
from export_zoo.engines.bundle.manifest import Plan, Tuning
from export_zoo.engines.precision.fp16.half import to_half
from export_zoo.engines.targets.target import (
    CURRENT,
    DISTRIBUTIONS,
    Precision,
    Target,
    TargetName,
    device_name,
)
from export_zoo.engines.targets.tensorrt.build import build_engine
from export_zoo.engines.targets.tensorrt.worker import TIMING_SUFFIX
from export_zoo.exporter.run.cache import StageResult
from export_zoo.exporter.run.context import Context
from export_zoo.exporter.stages.tuning.int8_parts import Int8Parts
from export_zoo.exporter.stages.tuning.tune import Tuned


@dataclass(frozen=True)
class EngineFiles:
    """An engine that was built, and not yet compared with anything."""

    target: TargetName
    precision: Precision
    file: Path
    graph: Path
    """The precision graph: what TensorRT compiled; for ONNX Runtime, the engine itself."""
    built_by: dict[str, str]
    tuning: Tuning | None = None
    plan: Plan | None = None
    timing_cache: Path | None = None
    """Kernel timings that TensorRT built it with."""

    saturating_cpu_session: dict[str, str] | None = None
    """See `bundle.manifest.Engine`."""

    @property
    def name(self) -> str:
        return f"{self.target}-{self.precision}"

    @property
    def is_graph(self) -> bool:
        """The precision graph is the engine."""
        return self.file == self.graph

    @property
    def runs_here(self) -> bool:
        """Whether the engine itself can be run, or only its graph."""
        return not why_not_here(self.target, self.plan)


def _int8_graph(context: Context, target: str, parts: Int8Parts) -> tuple[Path, bool]:
    """The INT8 graph of a target, and whether it was cached."""

    def make(directory: Path) -> None:
        parts.write(directory / "engine.onnx", target, context.options)

    key = context.key("onnx_ir", "numpy", **parts.key(target, context.options))
    result = context.cache.run("int8", key, make)
    return result.directory / "engine.onnx", result.cached


def _half_graph(context: Context, graph: Path, ranges: Ranges | None) -> tuple[Path, bool]:
    """The FP16 graph, the same for all targets, and whether it was cached."""

    def make(directory: Path) -> None:
        to_half(graph, directory / "engine.onnx", ranges)

    found = ranges.digest() if ranges is not None else None
    key = context.key("onnx_ir", "numpy", graph=sha256_of(graph), ranges=found)
    result = context.cache.run("fp16", key, make)
    return result.directory / "engine.onnx", result.cached


def build(
    context: Context,
    graph: Path,
    target: Target,
    precision: Precision,
    ranges: Ranges | None,
    tuned: Tuned | None,
) -> EngineFiles:
    """Build one engine. For ONNX Runtime the precision graph is the engine; TensorRT compiles it.

    Args:
        tuned: what INT8 is made of.

    Raises:
        ExportDefectError: TensorRT refuses the graph; names node and module.
        EnvironmentFailureError: TensorRT's builder crashed or was killed.
    """
    name = f"{target.name}-{precision}"
    with context.reporter.stage("build") as stage:
        tuning = None
        if precision == "fp32":
            precise, stage.cached = graph, True
        elif precision == "fp16":
            precise, stage.cached = _half_graph(context, graph, ranges)
        else:
            assert tuned is not None
            tuning = tuned.tuning
            precise, stage.cached = _int8_graph(context, target.name, tuned.parts)
        if target.name == "onnxruntime":
            stage.detail = f"{name}: the simplified graph itself" if precision == "fp32" else name
            stage.cached = stage.cached and precision != "fp32"
            built_by = library_versions("onnxruntime", "onnx_ir", "numpy")
            # `quantize` refuses to write an INT8 graph for ONNX Runtime that can saturate.
            return EngineFiles(
                target.name, precision, precise, precise, built_by, tuning, saturating_cpu_session={}
            )
        compiled = _compile(context, precise, target)
        stage.cached, warnings = compiled.cached, compiled.data["warnings"]
        stage.detail = name
        if warnings:
            stage.detail += f"; {sum(warnings.values())} warnings by TensorRT (-v shows them)"
    built_by = library_versions(DISTRIBUTIONS[target.name], "onnx_ir", "numpy")
    plan = Plan.model_validate(compiled.data["plan"])
    file = compiled.directory / "engine.plan"
    timings = file.with_suffix(TIMING_SUFFIX)
    return EngineFiles(
        target.name, precision, file, precise, built_by, tuning, plan, timings if timings.is_file() else None
    )


def _compile(context: Context, graph: Path, target: Target) -> StageResult:
    """TensorRT's `engine.plan` of a precision graph, and the builder's warnings."""
    batch, sizes = context.options.batch, context.options.dynamic_size
    build_options = context.options.build.of(target.name)
    described = {name: value for name, value in asdict(build_options).items() if name != "timing_cache"}
    timings = build_options.timing_cache

    def make(directory: Path) -> dict[str, Any]:
        with context.reporter.bar("build", None) as advance:
            built = build_engine(
                graph,
                directory / "engine.plan",
                target=target.name,
                batch=(batch.min, batch.opt, batch.max),
                sizes=(sizes.min, sizes.opt, sizes.max) if sizes is not None else None,
                options=build_options,
                steps=lambda done, total: advance(1, total),
            )
        known = {"version": built.version, "compute_capabilities": built.compute_capabilities}
        return {"warnings": built.warnings, "plan": {**described, **known}}

    key = context.key(
        graph=sha256_of(graph),
        target=target.name,
        versions=library_versions(DISTRIBUTIONS[target.name]),
        batch=[batch.min, batch.opt, batch.max],
        sizes=str(sizes),
        options=described,
        timing_cache=sha256_of(timings) if timings is not None else None,
        # Its kernels are chosen on the GPU that is here; TensorRT-RTX chooses when it runs, unless built for this one.
        gpu=device_name()
        if target.name == "tensorrt" or CURRENT in build_options.compute_capabilities
        else None,
    )
    return context.cache.run("tensorrt", key, make)
