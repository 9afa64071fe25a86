"""Stage: build the engine files of one target and precision from the simplified graph."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from export_zoo.base import graph_io
from export_zoo.base.errors import TargetRefusalError
from export_zoo.base.graph_io import sha256_of
from export_zoo.base.machine import library_versions
from export_zoo.calibration.ranges import Ranges
from export_zoo.engines.bundle.manifest import Aim, Tuning
from export_zoo.engines.precision.base import Precision
from export_zoo.engines.precision.patterns import nodes_named
from export_zoo.engines.precision.registry import BASELINE, PRECISIONS
from export_zoo.engines.targets.base import BuildRequest, Target
from export_zoo.engines.targets.float_for_speed import FloatForSpeed
from export_zoo.engines.targets.plan import Compiled, Plan
from export_zoo.engines.targets.registry import BASELINE_TARGET, TARGETS
from export_zoo.exporter.options import ExportOptions, keep_float_option
from export_zoo.exporter.run.cache import StageResult
from export_zoo.exporter.run.context import Context
from export_zoo.exporter.stages.tuning.tune import Tuned

GRAPH = "engine.onnx"
"""File name of a precision graph in its stage."""


@dataclass(frozen=True)
class EngineFiles:
    """An engine that was built and not yet verified."""

    target: str
    precision: str
    file: Path
    graph: Path
    """The precision graph: what TensorRT compiled; for ONNX Runtime, the engine itself."""
    built_by: dict[str, str]
    tuning: Tuning | None = None
    plan: Plan | None = None
    timing_cache: Path | None = None
    """Kernel timings that TensorRT used for the build."""

    float_for_speed: FloatForSpeed | None = None
    aim: Aim | None = None
    saturating_cpu_session: dict[str, str] | None = None
    """See `bundle.manifest.Engine`."""

    @property
    def name(self) -> str:
        return f"{self.target}-{self.precision}"

    @property
    def is_graph(self) -> bool:
        """Whether the precision graph is the engine."""
        return self.file == self.graph

    @property
    def runs_here(self) -> bool:
        """Whether the engine itself can be run, or only its graph."""
        return not TARGETS[self.target].why_not_run(PRECISIONS[self.precision], self.plan)


def float32_nodes(graph: Path, options: ExportOptions) -> frozenset[str]:
    """Names of the nodes of an FP32 graph that --keep-float-fp16 names. Raises UsageError."""
    if not options.keep_float_fp16:  # large graphs take seconds to load
        return frozenset()
    return nodes_named(
        graph_io.load(graph).graph, options.keep_float_fp16, keep_float_option(quantized=False)
    )


def _precision_graph(
    context: Context,
    graph: Path,
    target: Target,
    precision: Precision,
    ranges: Ranges | None,
    tuned: Tuned | None,
    aim: Aim | None,
) -> tuple[Path, bool]:
    """The graph of a precision, and whether it was cached. Only quantized graphs depend on the target."""
    if precision is BASELINE:
        return graph, True
    if precision.quantized:
        assert tuned is not None
        parts = tuned.parts.with_float(aim.layers) if aim is not None else tuned.parts

        def make(directory: Path) -> None:
            parts.write(directory / GRAPH, target, context.options)

        inputs = parts.key(target, context.options)
    else:
        kept = float32_nodes(graph, context.options) | frozenset(aim.layers if aim is not None else ())

        def make(directory: Path) -> None:
            precision.write(graph, directory / GRAPH, ranges, kept)

        digest = ranges.digest() if ranges is not None else None
        inputs = {"graph": sha256_of(graph), "ranges": digest, "kept": sorted(kept)}
    result = context.cache.run(precision.name, context.key("onnx_ir", "numpy", **inputs), make)
    return result.directory / GRAPH, result.cached


def build(
    context: Context,
    graph: Path,
    target: Target,
    precision_name: str,
    ranges: Ranges | None,
    tuned: Tuned | None,
    aim: Aim | None = None,
) -> EngineFiles:
    """Build one engine: write its precision graph, and compile it if the target compiles.

    Args:
        tuned: the parts of a quantized precision, without the layers of `aim`.
        aim: the layers that --aim leaves float.

    Raises:
        TargetRefusalError: the builder refuses the graph; names node and module.
        EnvironmentFailureError: the builder crashed or was killed.
    """
    precision = PRECISIONS[precision_name]
    name = f"{target.name}-{precision.name}"
    found = tuned if precision.quantized else None
    tuning, fast = (found.tuning, found.float_for_speed) if found is not None else (None, None)
    built_by = library_versions(target.distribution, "onnx_ir", "numpy")
    with context.reporter.stage("build") as stage:
        precise, cached = _precision_graph(context, graph, target, precision, ranges, tuned, aim)
        stage.detail = name
        if not target.compiled:
            unchanged = precision is BASELINE
            stage.detail += ": the simplified graph itself" if unchanged else ""
            stage.cached = cached and not unchanged
            session = dict(target.saturating_session) if target.saturating_session is not None else None
            return EngineFiles(
                target.name,
                precision.name,
                precise,
                precise,
                built_by,
                tuning,
                float_for_speed=fast,
                aim=aim,
                saturating_cpu_session=session,
            )
        compiled = _compile(context, precise, target)
        stage.cached, warnings = compiled.cached, compiled.data.warnings
        if warnings:
            stage.detail += f"; {sum(warnings.values())} warnings by {target.distribution} (-v shows them)"
    timings = compiled.data.timing_cache
    return EngineFiles(
        target.name,
        precision.name,
        compiled.file(compiled.data.file),
        precise,
        built_by,
        tuning,
        compiled.data.plan,
        compiled.file(timings) if timings is not None else None,
        fast,
        aim,
    )


def check_graph(context: Context, graph: Path, target: Target) -> None:
    """Let a target's parser read the FP32 graph. Raises TargetRefusalError."""

    def make(_: Path) -> str:
        try:
            target.check_graph(graph)
        except TargetRefusalError as error:
            return error.message
        return ""

    key = context.key(graph=sha256_of(graph), target=target.name, version=target.version)
    with context.reporter.stage("parse") as stage:
        result = context.cache.run("parse", key, make, str)
        stage.cached, stage.detail = result.cached, result.data or f"{target.name} takes the graph"
    if result.data:
        raise TargetRefusalError(result.data, hint=f"use --target {BASELINE_TARGET.name}")


def _compile(context: Context, graph: Path, target: Target) -> StageResult[Compiled]:
    """Compile a precision graph; the result also has the builder's warnings."""
    batch, sizes = context.options.batch, context.options.dynamic_size
    request = BuildRequest(
        graph,
        (batch.min, batch.opt, batch.max),
        (sizes.min, sizes.opt, sizes.max) if sizes is not None else None,
        context.options.build,
    )

    def make(directory: Path) -> Compiled:
        with context.reporter.bar("build", None) as advance:
            return target.build(request, directory, lambda done, total: advance(1, total))

    key = context.key(
        graph=sha256_of(graph),
        target=target.name,
        batch=request.batch,
        sizes=str(sizes),
        **target.build_key(request),
    )
    return context.cache.run(target.name, key, make, Compiled)
