"""Stage: run every engine through the parity gate, and time them in turn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from calibration.graph_io import sha256_of
from calibration.machine import cpu_model, instruction_set
from calibration.preprocess import normalize
from engines import bench
from engines.bundle import HeldOut, judge_engine
from engines.gate import MIN_LABELLED, images_compared
from engines.manifest import Gate, Latency, Recipe
from engines.onnxruntime_engine import OnnxRuntimeEngine
from engines.parity import DEFAULT_TOLERANCES
from engines.target import Precision
from exporter.context import Context
from exporter.stage_cache import StageResult

TARGET = "onnxruntime"


def tolerances_for(context: Context, precision: str, *, unfused: bool, labelled: int) -> dict[str, float]:
    """Default limits of a precision, overridden by --tolerance.

    Args:
        unfused: gated against the unfused graph, which brings its own default.
        labelled: verify images with a label; too few leave the accuracy's default limit out.
    """
    chosen = {} if unfused else dict(DEFAULT_TOLERANCES[precision])
    if labelled < MIN_LABELLED:
        chosen.pop("accuracy_drop", None)
    # The general first, so that the specific has the last word, whatever their order.
    for tolerance in sorted(context.options.tolerances, key=lambda t: t.specificity):
        if tolerance.applies_to(TARGET, precision):
            chosen[tolerance.metric] = tolerance.value
    return chosen


def judge_engines(
    context: Context, files: Mapping[Precision, Path], recipe: Recipe, held: HeldOut, reference: StageResult
) -> dict[Precision, Gate]:
    """The gate of each engine file, by precision. A gate that does not hold is returned, not raised."""
    for tolerance in context.options.tolerances:
        if not any(tolerance.applies_to(TARGET, precision) for precision in files):
            context.reporter.warn(
                f"--tolerance {tolerance.selector}:{tolerance.metric}: no such engine in this run"
            )
    if context.options.reduce_range and "int8" not in files:
        context.reporter.warn("--reduce-range has no effect without --precision int8")
    return {
        precision: _judge(context, precision, path, recipe, held, reference)
        for precision, path in files.items()
    }


def _judge(
    context: Context, precision: str, path: Path, recipe: Recipe, held: HeldOut, reference: StageResult
) -> Gate:
    unfused = recipe.source.weights.random and precision != "fp32"
    labelled = len(held.labels) if held.labels is not None else 0
    tolerances = tolerances_for(context, precision, unfused=unfused, labelled=labelled)

    def make(_: Path) -> dict[str, Any]:
        with context.reporter.bar("verify", images_compared(len(held.pixels), recipe.batch)) as progress:
            gate = judge_engine(
                path,
                precision=precision,
                unfused=unfused,
                recipe=recipe,
                held=held,
                tolerances=tolerances,
                progress=progress,
            )
        return gate.model_dump(mode="json")

    with context.reporter.stage("verify") as stage:
        key = context.key(
            "onnxruntime",
            "numpy",
            engine=sha256_of(path),
            reference=reference.key,
            labels=held.labels,
            batch=recipe.batch.model_dump(),
            tolerances=tolerances,
            unfused=unfused,
            isa=instruction_set(),
        )
        result = context.cache.run("verify", key, make)
        gate = Gate.model_validate(result.data)
        stage.cached = result.cached
        stage.detail = f"{TARGET}-{precision}: {describe_gate(gate)}"
    return gate


def describe_gate(gate: Gate) -> str:
    """One line for people."""
    sqnr, top1 = gate.eager_metrics["sqnr"] or 0.0, gate.eager_metrics["top1"] or 0.0
    text = (
        f"{'FAILED' if gate.failures else 'ok'}, SQNR {sqnr:.1f} dB, top-1 agreement {100 * top1:.1f} % on "
        f"{gate.metrics['images']} images, batches {', '.join(map(str, gate.batches))}"
    )
    if gate.reference != "eager":
        text += f"; gated against its unfused graph, {gate.metrics['sqnr'] or 0.0:.1f} dB"
    return text


def time_engines(
    context: Context, files: Mapping[Precision, Path], fp32: Path, recipe: Recipe, held: HeldOut
) -> dict[str, Latency]:
    """Latency of each engine at batch OPT, in turn with FP32; warns where lower precision is slower."""
    timed: dict[Precision, Path] = {"fp32": fp32, **files}

    def make(_: Path) -> dict[str, Any]:
        engines = {str(p): OnnxRuntimeEngine(path, half=p == "fp16") for p, path in timed.items()}
        index = np.arange(recipe.batch.opt) % len(held.pixels)
        batch = normalize(held.pixels[index], recipe.preprocess)
        found = bench.measure(engines, batch, baseline="fp32", machine=cpu_model())
        return {name: latency.model_dump(mode="json") for name, latency in found.items()}

    with context.reporter.stage("bench") as stage:
        hashes = {precision: sha256_of(path) for precision, path in timed.items()}
        key = context.key("onnxruntime", engines=hashes, batch=recipe.batch.opt, machine=cpu_model())
        result = context.cache.run("bench", key, make)
        stage.cached = result.cached
        stage.detail = f"{len(timed)} engine(s) in turn at batch {recipe.batch.opt}"
    latencies = {name: Latency.model_validate(data) for name, data in result.data.items()}
    for precision in files:
        latency = latencies[precision]
        if precision != "fp32" and latency.speedup < 1.0:
            context.reporter.warn(
                f"{TARGET}-{precision} is slower than FP32 here ({latency.speedup:.2f}x at batch {latency.batch})"
            )
    return latencies
