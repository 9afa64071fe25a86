"""The main job: runs the stages in order and publishes the bundle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from export_zoo.base.errors import (
    BuilderCrashError,
    EnvironmentFailureError,
    ExportZooError,
    ParityError,
    StateNotReachedError,
    TargetRefusalError,
    UsageError,
)
from export_zoo.base.files import cache_directory
from export_zoo.base.graph_io import quick_collections
from export_zoo.base.package import __version__
from export_zoo.calibration.images import check_folder
from export_zoo.calibration.ranges import Ranges
from export_zoo.engines.bundle import manifest
from export_zoo.engines.bundle.manifest import Engine
from export_zoo.engines.bundle.reader import HeldOut
from export_zoo.engines.precision.registry import BASELINE, PRECISIONS
from export_zoo.engines.targets import registry
from export_zoo.engines.targets.base import Target
from export_zoo.exporter import publish
from export_zoo.exporter.cluster.ray_cluster import RayCluster
from export_zoo.exporter.contents import Contents, describe_engine, describe_held_out, describe_recipe
from export_zoo.exporter.models.spec import ModelSpec
from export_zoo.exporter.options import ExportOptions, keep_float_option
from export_zoo.exporter.run.cache import StageCache, StageResult
from export_zoo.exporter.run.context import Context
from export_zoo.exporter.run.report import Reporter
from export_zoo.exporter.stages import network
from export_zoo.exporter.stages import ranges as ranges_stage
from export_zoo.exporter.stages.aim import HalfGraphs, Int8Graphs, Rounded, aim, check_aim
from export_zoo.exporter.stages.build import build, check_graph, float32_nodes
from export_zoo.exporter.stages.evaluate import evaluate
from export_zoo.exporter.stages.images import ChosenImages, choose_images
from export_zoo.exporter.stages.network import Exported, Reference, Simplified
from export_zoo.exporter.stages.shards import Workers, workers_on
from export_zoo.exporter.stages.tuning.tune import Tuned, tune
from export_zoo.exporter.stages.verify import confirm_aim, judge_engines, name_modules, time_engines


@dataclass(frozen=True)
class ExportResult:
    """A published bundle."""

    bundle: Path
    manifest: manifest.Manifest

    @property
    def engines(self) -> Sequence[Engine]:
        return self.manifest.artifacts.engines


class KeptError(ExportZooError):
    """The run failed after engines were built; `result` is the bundle kept under `OUT.failed/`."""

    def __init__(self, message: str, *, hint: str, result: ExportResult) -> None:
        super().__init__(message, hint=hint)
        self.result = result


class GateFailedError(KeptError, ParityError):
    """Engines are outside their tolerance."""


class RequirementMissedError(KeptError, StateNotReachedError):
    """Engines did not reach the state that `--require` asks for."""


class EnginesRefusedError(KeptError, TargetRefusalError):
    """A target that was asked for refused to build engines; others were built."""


class _Refusals:
    """Engines that could not be built, and why. Other engines are built nevertheless."""

    def __init__(self, precisions: Sequence[str]) -> None:
        self._precisions = precisions
        self._errors: list[ExportZooError] = []
        self.engines: list[manifest.Refused] = []
        self.targets: set[str] = set()
        """Names of targets none of whose engines can be built."""

    @property
    def first(self) -> ExportZooError:
        return self._errors[0]

    def texts(self, what: str) -> list[str]:
        """Texts that name the engines, one for each reason."""
        reasons = dict.fromkeys(refused.reason for refused in self.engines)
        names = {reason: [r.name for r in self.engines if r.reason == reason] for reason in reasons}
        return [f"{', '.join(found)}: {what}: {reason}" for reason, found in names.items()]

    @contextmanager
    def noting(self, target: Target, precision: str | None = None) -> Iterator[None]:
        """Note that a target refuses a precision, or the graph itself, and go on."""
        try:
            yield
        except (TargetRefusalError, BuilderCrashError) as error:
            self._errors.append(error)
            refused = self._precisions if precision is None else [precision]
            if precision is None:
                self.targets.add(target.name)
            self.engines += [
                manifest.Refused(name=f"{target.name}-{name}", reason=error.message) for name in refused
            ]


def _advice(engines: Sequence[Engine]) -> str:
    """Advice after a failed gate. It follows from the most exact precision that failed."""
    failed = {engine.precision for engine in engines if engine.gate.failures}
    exact = next(name for name in PRECISIONS if name in failed)
    texts = [text for engine in engines if engine.precision == exact for text in engine.gate.failures]
    if all(text.startswith("--aim ") for text in texts):
        return "ask for less with --aim, give more --aim-seconds, or more --calib images"
    if all("accuracy is" in text for text in texts) and not PRECISIONS[exact].quantized:
        return "give a limit that eager PyTorch itself reaches: the logits are as close to eager's as they should be"
    if exact == BASELINE.name:
        return (
            "look at the network: FP32 does not depend on calibration, so it amplifies rounding (a division by "
            "almost 0, a logarithm near 0), or a kernel is wrong; --target shows whether one target alone fails"
        )
    if not PRECISIONS[exact].quantized:
        return f"try another --precision, or a --tolerance that you can accept: calibration does not help {exact}"
    return "try more --calib images, --keep-float, another --precision or a --tolerance that you can accept"


def _mending(context: Context, place: Path, result: manifest.Manifest) -> str:
    """What would mend the worst engine that failed its gate, for its error message; empty if nothing can be said.

    With random weights, errors say nothing about layers. --aim has chosen layers by itself.
    """
    rounded = [
        e
        for e in result.artifacts.engines
        if e.gate.failures and e.precision != BASELINE.name and e.aim is None
    ]
    if not rounded or result.recipe.source.weights.random:
        return ""
    from export_zoo.engines.diagnosis.mend import mending

    engine = min(rounded, key=lambda e: e.gate.eager_metrics["sqnr"] or 0.0)
    with context.reporter.stage("diagnose") as stage:
        try:
            with context.reporter.bar("layers", None) as advance:
                found = mending(place, engine.name, engine.gate.tolerances, progress=advance)
        except ExportZooError as error:  # the gate's failure matters more
            stage.detail = f"{engine.name}: {error.message}"
            return ""
        worst = ", ".join(found.worst[:3])
        stage.detail = f"{engine.name}: worst layers {worst}"
    text = f"the worst layers of {engine.name} are {worst}"
    if found.layers is None:
        text += "; no choice of layers in float would mend it"
    elif found.layers > 0:
        text += (
            f"; about {found.layers} of its {found.total} layers in float would mend it (as {found.images} verify "
            "images say)"
        )
        if found.layers <= MOST_NAMED:
            option = keep_float_option(quantized=PRECISIONS[engine.precision].quantized)
            text += ": " + " ".join(f"{option} {layer}" for layer in found.worst[: found.layers])
    return f"{text}; `export-zoo diagnose {place}` says more; "


MOST_NAMED = 8
"""Largest number of layers that the message of a failed gate gives as options."""


def _refuse_overlap(ranges: Ranges, reference: StageResult[Reference], chosen: ChosenImages) -> None:
    verified = {*reference.data.sha256, *(image.sha256 for image in chosen.splits["verify"])}
    shared = verified & set(ranges.image_sha256)
    if shared:
        raise ParityError(
            f"{len(shared)} verify images are also in the calibration set: the comparison would prove nothing",
            hint="this is a defect of the splits; please report it",
        )


class _Prepared(NamedTuple):
    """The network's graph, and eager PyTorch's outputs, which engines are compared with."""

    spec: ModelSpec
    images: ChosenImages
    targets: list[Target]
    exported: StageResult[Exported]
    simplified: StageResult[Simplified]
    reference: StageResult[Reference]
    held: HeldOut


def _prepare(context: Context) -> _Prepared:
    options = context.options
    publish.check_destination(options.out_dir)
    chosen_targets = registry.choose_for(options.targets, options.build, options.precisions)
    if options.ranges is not None:
        Ranges.read(options.ranges)  # a wrong file is refused before any work
    if options.costs is not None:
        used = [target for target in chosen_targets if target.takes_costs(options.costs)]
        if not used or not options.quantizes:  # a matrix may give all cells the same options
            what = ", ".join(options.precisions if used else (target.name for target in chosen_targets))
            context.reporter.warn(f"--costs has no effect on {what}")
    for option, folder in (("--calib", options.calib), ("--verify", options.verify)):
        if folder is not None:
            check_folder(folder, option)  # before weights are downloaded
    spec = network.resolve_model(context)
    if options.out is None:
        named = {"zoo": spec.zoo, "name": spec.name, "factory": spec.factory}
        publish.check_same_network(options.out_dir, named)
    model = network.EagerModel(spec)
    chosen = choose_images(context, spec)
    if context.options.aim is not None:
        if spec.weights_kind == "random":
            raise UsageError(
                "--aim: random weights have no accuracy", hint="give trained weights, or leave --aim out"
            )
        check_aim(context.options.aim, spec.head, chosen)
    exported = network.export_graph(context, spec, model)
    simplified = network.simplify_graph(context, spec, exported)
    reference, held = network.run_reference(context, spec, model, chosen)
    return _Prepared(spec, chosen, chosen_targets, exported, simplified, reference, held)


def _aims(
    context: Context,
    spec: ModelSpec,
    graph: Path,
    chosen: ChosenImages,
    targets: Sequence[Target],
    ranges: Ranges | None,
    tuned: Mapping[str, Tuned],
) -> dict[tuple[str, str], manifest.Aim]:
    """The layers that --aim leaves float, by target and precision."""
    found = {}
    for target in targets:
        for name in context.options.unique_precisions():
            precision = PRECISIONS[name]
            if precision is BASELINE or registry.why_not(target, name):
                continue
            graphs: Rounded = (
                Int8Graphs(context.options, target, tuned[target.name])
                if precision.quantized
                else HalfGraphs(graph, ranges, float32_nodes(graph, context.options))
            )
            found[target.name, name] = aim(context, graph, chosen, spec.preprocess, spec.head, target, graphs)
    return found


def _make_bundle(
    context: Context, prepared: _Prepared, workers: Workers | None, *, explain: bool
) -> ExportResult:
    options = context.options
    spec, chosen, chosen_targets, exported, simplified, reference, held = prepared
    graph = simplified.file(Simplified.GRAPH)
    calibrated: tuple[Path, Ranges] | None = None
    if options.uses_ranges:
        if options.ranges is not None:
            calibrated = ranges_stage.read_ranges(context, spec, graph, chosen)
        else:
            most = workers.shards if workers is not None else 1
            count = max(1, min(len(chosen.splits["calibrate"]), most))
            shards = [(index, count) for index in range(1, count + 1)]
            calibrated = ranges_stage.calibrate(context, spec, graph, chosen, shards, workers)
        _refuse_overlap(calibrated[1], reference, chosen)
    ranges = calibrated[1] if calibrated is not None else None
    tuned: dict[str, Tuned] = {}
    refusals = _Refusals(options.unique_precisions())
    for chosen_target in chosen_targets:
        if chosen_target.may_refuse:  # tuning takes minutes
            with refusals.noting(chosen_target):
                check_graph(context, graph, chosen_target)
    chosen_targets = [target for target in chosen_targets if target.name not in refusals.targets]
    if not chosen_targets:
        raise refusals.first
    if ranges is not None and options.quantizes:
        random = spec.weights_kind == "random"
        tuned = tune(context, graph, ranges, chosen, spec.preprocess, chosen_targets, random=random)
    aims = (
        _aims(context, spec, graph, chosen, chosen_targets, ranges, tuned) if options.aim is not None else {}
    )
    built = []
    for chosen_target in chosen_targets:
        for precision in options.unique_precisions():
            with refusals.noting(chosen_target, precision):
                built.append(
                    build(
                        context,
                        graph,
                        chosen_target,
                        precision,
                        ranges,
                        tuned.get(chosen_target.name),
                        aims.get((chosen_target.name, precision)),
                    )
                )
    if not built:
        raise refusals.first
    for text in refusals.texts("left out"):
        context.reporter.warn(text)
    contents = Contents()
    recipe = describe_recipe(context, spec, chosen, exported, simplified, calibrated, tuned, contents)
    latencies = time_engines(context, built, graph, recipe, held)
    whole = evaluate(context, spec, chosen, built, recipe, held, workers)
    gates = judge_engines(context, built, recipe, held, reference, whole)
    gates = confirm_aim(context, gates, built)
    gates = name_modules(spec, exported.file(Exported.GRAPH), recipe, held, built, gates)
    engines = [describe_engine(b, gates[b.name], latencies.get(b.name), spec.name, contents) for b in built]
    held_out = describe_held_out(reference, spec, held, chosen, contents)
    failed = [f"{e.name}: {text}" for e in engines for text in e.gate.failures]
    enough = manifest.STATES.index("verified" if options.require == "verified" else "graph verified")
    short = [e.name for e in engines if manifest.STATES.index(e.state) < enough]
    demanded = bool(refusals.engines) and (options.strict or registry.AUTO not in options.targets)
    result = manifest.Manifest(
        schema_version=manifest.SCHEMA_VERSION,
        tool=f"export-zoo {__version__}",
        status="failed" if failed or short or demanded else "ok",
        warnings=context.reporter.warnings,
        recipe=recipe,
        artifacts=manifest.Artifacts(
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            engines=engines,
            refused=refusals.engines,
            held_out=held_out,
        ),
    )
    out = options.out_dir
    place = publish.failed_place(out) if failed or short or demanded else out
    with context.reporter.stage("bundle") as stage:
        try:
            publish.publish(place, result, contents.sources)
        except OSError as error:
            raise EnvironmentFailureError(
                f"--out {place}: cannot be written: {error.strerror or error}",
                hint="check free space and permissions there, or give another --out; finished stages are cached",
            ) from error
        stage.detail = str(place)
    if failed:
        cause = _mending(context, place, result) if explain else ""
        raise GateFailedError(
            f"parity gate failed: {'; '.join(failed)}",
            hint=f"everything is kept in {place}; {cause}see `export-zoo inspect {place}`, "
            f"then {_advice(engines)}",
            result=ExportResult(place, result),
        )
    if short:
        raise RequirementMissedError(
            f"--require {options.require}: {', '.join(short)} did not reach the required state",
            hint=f"everything is kept in {place}; export on a machine that can run the engines",
            result=ExportResult(place, result),
        )
    if demanded:
        advice = "leave out this target, or use --target auto, which leaves out what cannot be built"
        raise EnginesRefusedError(
            "; ".join(refusals.texts("refused")),
            hint=f"the other engines are kept in {place}; "
            + ("leave out --strict to accept them" if registry.AUTO in options.targets else advice),
            result=ExportResult(place, result),
        )
    return ExportResult(out, result)


def export(
    options: ExportOptions,
    *,
    reporter: Reporter | None = None,
    cluster: RayCluster | None = None,
    explain: bool = True,
) -> ExportResult:
    """Run the main job: zoo model to verified bundle.

    Args:
        options: what to do; see `ExportOptions`.
        reporter: receives stages, progress and warnings; silent by default.
        cluster: calibrates, and compares engines on verify images beyond those of the bundle, in shards; by default
            this machine does.
        explain: whether the worst layers are looked for after a failed gate, for a minute at most.

    Raises:
        ExportZooError: see `base.errors` for its kinds and exit codes.
    """
    root = cache_directory() if options.cache else None
    reporter = reporter or Reporter()
    with reporter.library_warnings(), StageCache(root) as cache:
        context = Context(options, reporter, cache)
        prepared = _prepare(context)  # without the eager network: the next stages need its gigabytes
        workers = workers_on(cluster, prepared.spec, options) if cluster is not None else None
        with nullcontext() if prepared.exported.cached else quick_collections():
            return _make_bundle(context, prepared, workers, explain=explain)
