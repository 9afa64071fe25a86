"""Stage: run every engine through the parity gate, and time them in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export_zoo.base.cuda import device_name
from export_zoo.base.graph_io import sha256_of
from export_zoo.base.machine import cpu_model, instruction_set
from export_zoo.calibration.preprocess import normalize
from export_zoo.engines.bundle.manifest import Gate, Latency, Recipe
from export_zoo.engines.bundle.reader import HeldOut
from export_zoo.engines.parity.intervals import accuracy, described, unsettled
from export_zoo.engines.parity.limits import MIN_UNFUSED_COSINE, Limit, fitting
from export_zoo.engines.parity.metrics import relative_errors
from export_zoo.engines.parity.outputs import sampled
from export_zoo.engines.parity.sums import Sums
from export_zoo.engines.parity.tasks import Head, headline
from export_zoo.engines.precision.fp16.precision import FP16
from export_zoo.engines.precision.registry import BASELINE, PRECISIONS, QUANTIZED
from export_zoo.engines.targets.base import Opening
from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine
from export_zoo.engines.targets.registry import TARGETS
from export_zoo.engines.verification.gate import MIN_LABELLED, images_compared
from export_zoo.engines.verification.latency import TimedEngine, measure_latencies
from export_zoo.engines.verification.verify import judge_engine
from export_zoo.exporter.option_values import Tolerance
from export_zoo.exporter.run.cache import StageResult
from export_zoo.exporter.run.context import Context
from export_zoo.exporter.stages.build import EngineFiles
from export_zoo.exporter.stages.network import EagerModel, Reference

if TYPE_CHECKING:
    from export_zoo.exporter.models.spec import ModelSpec


def limits_for(
    given: Sequence[Tolerance], target: str, precision: str, head: Head, labelled: int
) -> dict[str, float]:
    """Limits of an engine of trained weights: the defaults with --tolerance applied.

    Args:
        head: what the first output means. Default limits are on its metrics.
        labelled: number of images with a label. If too few, the accuracy has no default limit.
    """
    chosen = fitting(PRECISIONS[precision].tolerances, head)
    if labelled < MIN_LABELLED:
        chosen.pop("accuracy_drop", None)
    return chosen | _given_limits(given, target, precision)


def _given_limits(given: Sequence[Tolerance], target: str, precision: str) -> dict[str, float]:
    """Limits of --tolerance for an engine. Specific ones override general ones, whatever their order."""
    found = sorted((t for t in given if t.applies_to(target, precision)), key=lambda t: t.specificity)
    return {tolerance.metric: tolerance.value for tolerance in found}


def tolerances_for(
    context: Context, engine: EngineFiles, *, random: bool, labelled: int, head: Head
) -> tuple[dict[str, float], bool]:
    """Limits of an engine, and whether it is gated against its unfused graph.

    Args:
        random: whether the weights are random.
        labelled, head: see `limits_for`.
    """
    given, target, precision = context.options.tolerances, engine.target, engine.precision
    if not random or precision == BASELINE.name:
        return limits_for(given, target, precision, head, labelled), False
    # The unfused graph has its own limits.
    defaults = {} if engine.is_graph else {"cosine": MIN_UNFUSED_COSINE}
    return defaults | _given_limits(given, target, precision), engine.is_graph


def judge_engines(
    context: Context,
    engines: Sequence[EngineFiles],
    recipe: Recipe,
    held: HeldOut,
    reference: StageResult[Reference],
    whole: Mapping[str, Mapping[str, Sums]],
) -> dict[str, Gate]:
    """The gate of each engine, by name. A failed gate is returned, not raised.

    Args:
        whole: sums over more images than are held out, by engine and output; see `evaluate`.
    """
    for tolerance in context.options.tolerances:
        if not any(tolerance.applies_to(engine.target, engine.precision) for engine in engines):
            context.reporter.warn(
                f"--tolerance {tolerance.selector}:{tolerance.metric}: no such engine in this run"
            )
    if context.options.keep_float and not context.options.quantizes:
        context.reporter.warn(f"--keep-float has no effect without --precision {QUANTIZED}")
    if context.options.keep_float_fp16 and FP16.name not in context.options.precisions:
        context.reporter.warn(f"--keep-float-fp16 has no effect without --precision {FP16.name}")
    return {
        engine.name: _judge(context, engine, recipe, held, reference, whole.get(engine.name, {}))
        for engine in engines
    }


def _judge(
    context: Context,
    engine: EngineFiles,
    recipe: Recipe,
    held: HeldOut,
    reference: StageResult[Reference],
    whole: Mapping[str, Sums],
) -> Gate:
    labelled = len(held.labels) if held.labels is not None else 0
    tolerances, unfused = tolerances_for(
        context, engine, random=recipe.source.weights.random, labelled=labelled, head=recipe.output.head
    )

    def make(_: Path) -> Gate:
        further = sum(len(part.pixels) for part in held.sizes)
        patterns = len(held.patterns.pixels) if held.patterns is not None else 0
        total = images_compared(len(held.pixels), recipe.batch, further, patterns)
        with context.reporter.bar("verify", total) as progress:
            return judge_engine(
                engine.file,
                engine.graph,
                target=engine.target,
                precision=engine.precision,
                plan=engine.plan,
                saturating_session=engine.saturating_cpu_session or {},
                unfused=unfused,
                recipe=recipe,
                held=held,
                tolerances=tolerances,
                whole=whole,
                progress=progress,
            )

    with context.reporter.stage("verify") as stage:
        key = context.key(
            "onnxruntime",
            "numpy",
            engine=sha256_of(engine.file if engine.runs_here else engine.graph),
            target=engine.target,  # two targets may run the same file
            version=TARGETS[engine.target].version,
            precision=engine.precision,
            only_graph=not engine.runs_here,
            reference=reference.key,
            labels=held.labels,
            batch=recipe.batch.model_dump(),
            tolerances=tolerances,
            heads=[asdict(head) for head in recipe.heads.values()],
            unfused=unfused,
            whole={name: sums.digest() for name, sums in whole.items()},
            isa=instruction_set(),
        )
        result = context.cache.run("verify", key, make, Gate)
        gate = result.data
        for text in unsettled(gate.metrics, gate.tolerances):
            context.reporter.warn(f"{engine.name}: {text}")
        stage.cached = result.cached
        stage.detail = f"{engine.name}: {describe_gate(gate)}"
    return gate


_ROUNDING = 1e-5
"""Difference of a module's output, relative to its largest value, that rounding alone amounts to."""

_IMAGES_TO_LOOK_AT = 8
"""Number of verify images, beside the test patterns, among which the one with the largest error is looked for."""


def name_modules(
    spec: ModelSpec,
    graph: Path,
    recipe: Recipe,
    held: HeldOut,
    engines: Sequence[EngineFiles],
    gates: Mapping[str, Gate],
) -> dict[str, Gate]:
    """The gates; failures of FP32 name the first module whose output differs from eager's.

    FP16 and INT8 differ from eager everywhere, by design: their failures stay as they are.

    Args:
        graph: the exported graph. In the simplified one, nodes have taken in their neighbours.
    """
    failed = {
        engine.name
        for engine in engines
        if engine.precision == BASELINE.name
        and any("accuracy is" not in text for text in gates[engine.name].failures)
    }
    if not failed:
        return dict(gates)
    from export_zoo.exporter.graph.culprit import MIN_DIFFERENCE, first_different_module

    parts = [(held.pixels[:_IMAGES_TO_LOOK_AT], held.logits[:_IMAGES_TO_LOOK_AT])]
    if held.patterns is not None:
        parts.append((held.patterns.pixels, held.patterns.logits))
    engine = OnnxRuntimeEngine(graph, fused=False)
    found = []
    for pixels, logits in parts:  # batches as eager ran them: rounding may depend on the batch
        inputs = normalize(pixels, recipe.preprocess)
        found.append((max(relative_errors(logits, sampled(engine.run_all(inputs)[0]))), inputs))
    largest, inputs = max(found, key=lambda part: part[0])
    least = float(np.clip(largest / 3, _ROUNDING, MIN_DIFFERENCE))  # most of the error is there
    module = first_different_module(graph, EagerModel(spec).built[0], inputs, least)
    where = (
        f"first seen in the output of module {module}" if module else "seen in the engine's own kernels only"
    )

    def named(gate: Gate) -> Gate:
        return gate.model_copy(update={"failures": [f"{text} ({where})" for text in gate.failures]})

    return {name: named(gate) if name in failed else gate for name, gate in gates.items()}


def confirm_aim(
    context: Context, gates: Mapping[str, Gate], engines: Sequence[EngineFiles]
) -> dict[str, Gate]:
    """The gates; those of engines that miss `--aim` on the verify images have failed."""
    wanted, found = context.options.aim, dict(gates)
    for engine in engines:
        gate = gates[engine.name]
        value = gate.eager_metrics.get(wanted.metric) if wanted is not None else None
        if wanted is None or engine.aim is None or value is None:
            continue
        limit = Limit(wanted.metric, wanted.value)
        if value < limit.value if limit.at_least else value > limit.value:
            text = f"--aim {wanted}: {wanted.metric} is {value:.6g} on the verify images"
            found[engine.name] = gate.model_copy(update={"failures": [*gate.failures, text]})
    return found


def describe_gate(gate: Gate) -> str:
    """A summary of a gate in one line."""
    sqnr, (title, share) = gate.eager_metrics["sqnr"] or 0.0, headline(gate.eager_metrics)
    share += described(gate.eager_metrics)
    ran = "" if gate.ran == "engine" else "precision graph "
    text = (
        f"{ran}{'FAILED' if gate.failures else 'ok'}, SQNR {sqnr:.1f} dB, {title} {share} on "
        f"{gate.metrics['images']} images"
        + "".join(
            f" ({gate.metrics[parts]} {parts})" for parts in ("pixels", "tokens") if parts in gate.metrics
        )
        + f", batches {', '.join(map(str, gate.batches))}"
    )
    if right := accuracy(gate.eager_metrics):
        text += f"; accuracy {right}"
    for name, figures in gate.further.items():
        text += f"; output {name} {figures.eager_metrics['sqnr'] or 0.0:.1f} dB"
    if gate.sizes:
        text += f"; further sizes {', '.join(f'{height}x{width}' for height, width in gate.sizes)}"
    if gate.patterns:
        worst = min(gate.patterns, key=lambda name: gate.patterns[name])
        text += f"; {gate.patterns[worst]:.1f} dB at worst on test patterns ({worst})"
    if gate.reference != "eager":
        text += f"; gated against its unfused graph, {gate.metrics['sqnr'] or 0.0:.1f} dB"
    return text


def time_engines(
    context: Context, engines: Sequence[EngineFiles], fp32: Path, recipe: Recipe, held: HeldOut
) -> dict[str, Latency]:
    """Latency at batch OPT of each engine that runs here, by name, in turn with FP32; warns about slower engines."""
    timed = {engine.name: engine for engine in engines if engine.runs_here}
    if not timed:
        return {}

    def make(_: Path) -> dict[str, Latency]:
        engines_to_time = {
            name: TimedEngine(
                engine.target,
                Opening(
                    engine.file,
                    PRECISIONS[engine.precision],
                    engine.plan,
                    engine.graph,
                    saturating_session=engine.saturating_cpu_session or {},
                ),
            )
            for name, engine in timed.items()
        }
        return measure_latencies(engines_to_time, fp32, recipe, held.pixels)

    with context.reporter.stage("bench") as stage:
        hashes = {
            BASELINE.name: sha256_of(fp32),
            **{name: sha256_of(engine.file) for name, engine in timed.items()},
        }
        key = context.key(
            "onnxruntime",
            engines=hashes,
            versions={engine.target: TARGETS[engine.target].version for engine in timed.values()},
            batch=recipe.batch.opt,
            machine=[cpu_model(), device_name()],
        )
        result = context.cache.run("bench", key, make, dict[str, Latency])
        stage.cached = result.cached
        stage.detail = f"{len(timed)} engine(s) in turn with FP32 at batch {recipe.batch.opt}"
    for name, latency in result.data.items():
        if timed[name].precision != BASELINE.name and latency.speedup < 1.0:
            context.reporter.warn(
                f"{name} is slower than FP32 here ({latency.speedup:.2f}x at batch {latency.batch})"
                + (
                    ": use the FP32 engine on this machine, or try `export-zoo costs BUNDLE` and --costs"
                    if timed[name].float_for_speed is not None and recipe.input_size is None
                    else ""
                )
            )
    return result.data
