"""The main job: runs the stages in order and publishes the bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export_zoo.base import graph_io
from export_zoo.base.errors import EnvironmentFailureError, ExportZooError, ParityError, StateNotReachedError
from export_zoo.base.machine import instruction_set
from export_zoo.base.package import __version__
from export_zoo.calibration.images import check_folder
from export_zoo.calibration.ranges import Ranges
from export_zoo.engines.bundle import manifest
from export_zoo.engines.bundle.manifest import Engine
from export_zoo.engines.bundle.reader import HeldOut
from export_zoo.engines.precision.registry import BASELINE
from export_zoo.engines.targets import registry
from export_zoo.exporter import publish
from export_zoo.exporter.options import ExportOptions
from export_zoo.exporter.run.cache import StageCache, StageResult, default_root
from export_zoo.exporter.run.context import Context
from export_zoo.exporter.run.report import Reporter
from export_zoo.exporter.stages import network
from export_zoo.exporter.stages import ranges as ranges_stage
from export_zoo.exporter.stages.build import EngineFiles, build
from export_zoo.exporter.stages.images import ChosenImages, choose_images
from export_zoo.exporter.stages.tuning.tune import Tuned, tune
from export_zoo.exporter.stages.verify import judge_engines, time_engines

if TYPE_CHECKING:
    from export_zoo.exporter.models.spec import ModelSpec

MAX_HELD_OUT = 512
"""Maximum number of held-out inputs in a bundle (77 MB at 224x224)."""


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


@dataclass
class _Contents:
    """Files of the future bundle: maps each bundle path to the file that now holds its bytes."""

    sources: dict[str, Path] = field(default_factory=dict)

    def add(self, path: Path, stem: str = "") -> manifest.File:
        file = publish.describe(path, stem)
        self.sources[file.path] = path
        return file


def _recipe(
    context: Context,
    spec: ModelSpec,
    chosen: ChosenImages,
    exported: StageResult,
    simplified: StageResult,
    calibrated: tuple[Path, Ranges] | None,
    tuned: Mapping[str, Tuned],
    contents: _Contents,
) -> manifest.Recipe:
    p, batch, sizes = spec.preprocess, context.options.batch, spec.sizes
    height, width = ("height", "width") if sizes is not None else (p.crop_height, p.crop_width)
    graph = simplified.directory / "graph.onnx"
    calibration = None
    if calibrated is not None:
        path, ranges = calibrated
        untuned = {found.parts.method for found in tuned.values() if found.tuning is None}
        method = untuned.pop() if untuned else context.options.method
        calibration = manifest.Calibration(
            method=method,
            images=len(ranges.image_sha256),
            synthetic=context.options.calib is None and context.options.ranges is None,
            unreadable=ranges.unreadable,
            ranges=contents.add(path, "ranges"),
        )
    outputs = [
        manifest.Port(
            name=output.name,
            dtype="float32",
            shape=["batch", *output.shape]
            if sizes is None or len(output.shape) == 1
            else ["batch", output.shape[0], "height", "width"],
            layout="NCHW" if len(output.shape) > 1 else "NC",
        )
        for output in spec.outputs
    ]
    return manifest.Recipe(
        source=manifest.Source(
            zoo=spec.zoo,
            name=spec.name,
            factory=spec.factory,
            num_classes=spec.num_classes,
            transform_input=spec.transform_input,
            arguments=dict(spec.model_args),
            fully_convolutional=spec.fully_convolutional,
            weights=manifest.Weights(
                kind=spec.weights_kind,
                name=spec.weights_name,
                sha256=spec.weights_sha256,
                random=spec.weights_kind == "random",
                initialized=exported.data["initialized"],
                entry=exported.data["entry"],
                skipped=exported.data["skipped"],
                seed=spec.seed,
            ),
        ),
        input=manifest.Port(name="input", dtype="float32", shape=["batch", 3, height, width], layout="NCHW"),
        output=outputs[0],
        further_outputs=outputs[1:],
        batch=manifest.Batch(min=batch.min, opt=batch.opt, max=batch.max),
        input_size=manifest.SizeRange(min=sizes.min, opt=sizes.opt, max=sizes.max)
        if sizes is not None
        else None,
        preprocess=p,
        labels=list(chosen.categories),
        graph=contents.add(graph, spec.name),
        external_data=[contents.add(path) for path in graph_io.external_files(graph)],
        simplified=simplified.data["summary"],
        calibration=calibration,
        keep_float=list(context.options.keep_float),
        instruction_set=instruction_set(),
        versions=context.versions,
    )


def _engine(
    built: EngineFiles,
    gate: manifest.Gate,
    latency: manifest.Latency | None,
    model: str,
    contents: _Contents,
) -> manifest.Engine:
    graph_weights = [contents.add(path) for path in graph_io.external_files(built.graph)]
    stem = model if built.precision == BASELINE.name else f"{model}-{built.name}"
    graph = contents.add(built.graph, stem)
    return manifest.Engine(
        name=built.name,
        target=built.target,
        precision=built.precision,
        file=graph if built.is_graph else contents.add(built.file, f"{model}-{built.name}"),
        external_data=graph_weights if built.is_graph else [],
        graph=None if built.is_graph else graph,
        tuning=built.tuning,
        plan=built.plan,
        timing_cache=contents.add(built.timing_cache, f"{model}-{built.name}")
        if built.timing_cache
        else None,
        graph_external_data=[] if built.is_graph else graph_weights,
        state=manifest.state_after(gate),
        built_by=built.built_by,
        instruction_set=instruction_set(),
        gate=gate,
        latency=latency,
        saturating_cpu_session=built.saturating_cpu_session,
    )


def _held_out_size(
    reference: StageResult, spec: ModelSpec, held: HeldOut, contents: _Contents
) -> manifest.HeldOutSize:
    count, height, width, _ = held.pixels.shape
    inputs, logits, *further = (
        contents.add(reference.directory / f"{what}-{height}x{width}.npy", f"{what}-{height}x{width}")
        for what in ("inputs", *network.reference_files(spec))
    )
    return manifest.HeldOutSize(
        height=height, width=width, inputs=inputs, logits=logits, further=further, count=count
    )


def _held_out(
    reference: StageResult, spec: ModelSpec, held: HeldOut, chosen: ChosenImages, contents: _Contents
) -> manifest.HeldOut:
    """The reference's files, cut to the first MAX_HELD_OUT images if there are more."""
    files = {}
    for name in ("inputs", *network.reference_files(spec)):
        path = reference.directory / f"{name}.npy"
        array = np.load(path, mmap_mode="r")
        if len(array) > MAX_HELD_OUT:
            path = reference.directory / f"held-out-{name}.npy"
            np.save(path, array[:MAX_HELD_OUT])
        files[name] = contents.add(path, name)
    inputs, logits, *further = files.values()
    return manifest.HeldOut(
        inputs=inputs,
        logits=logits,
        further=further,
        count=min(len(held.pixels), MAX_HELD_OUT),
        synthetic=chosen.synthetic,
        labels=held.labels[:MAX_HELD_OUT] if held.labels is not None else None,
        image_sha256=reference.data["sha256"][:MAX_HELD_OUT],
        sizes=[_held_out_size(reference, spec, part, contents) for part in held.sizes],
    )


def _refuse_overlap(ranges: Ranges, reference: StageResult) -> None:
    shared = set(ranges.image_sha256) & set(reference.data["sha256"])
    if shared:
        raise ParityError(
            f"{len(shared)} verify images are also in the calibration set: the comparison would prove nothing",
            hint="this is a defect of the splits; please report it",
        )


def _run(context: Context) -> ExportResult:
    options = context.options
    publish.check_destination(options.out_dir)
    chosen_targets = registry.choose(options.targets)
    registry.check_options(options.build, chosen_targets)
    registry.check_precisions(options.precisions, chosen_targets)
    if options.ranges is not None:
        Ranges.read(options.ranges)  # a wrong file is refused before any work
    for option, folder in (("--calib", options.calib), ("--verify", options.verify)):
        if folder is not None:
            check_folder(folder, option)  # before weights are downloaded
    spec = network.resolve_model(context)
    if options.out is None:
        named = {"zoo": spec.zoo, "name": spec.name, "factory": spec.factory}
        publish.check_same_network(options.out_dir, named)
    model = network.EagerModel(spec)
    chosen = choose_images(context, spec)
    exported = network.export_graph(context, spec, model)
    simplified = network.simplify_graph(context, spec, exported)
    graph = simplified.directory / "graph.onnx"
    reference, held = network.run_reference(context, spec, model, chosen)
    del model  # frees gigabytes that the sessions of the next stages need
    calibrated: tuple[Path, Ranges] | None = None
    if options.uses_ranges:
        obtain = ranges_stage.calibrate if options.ranges is None else ranges_stage.read_ranges
        calibrated = obtain(context, spec, graph, chosen)
        _refuse_overlap(calibrated[1], reference)
    ranges = calibrated[1] if calibrated is not None else None
    tuned: dict[str, Tuned] = {}
    if ranges is not None and options.quantizes:
        random = spec.weights_kind == "random"
        tuned = tune(context, graph, ranges, chosen, spec.preprocess, chosen_targets, random=random)
    built = [
        build(context, graph, chosen_target, precision, ranges, tuned.get(chosen_target.name))
        for chosen_target in chosen_targets
        for precision in options.unique_precisions()
    ]
    contents = _Contents()
    recipe = _recipe(context, spec, chosen, exported, simplified, calibrated, tuned, contents)
    latencies = time_engines(context, built, graph, recipe, held)
    gates = judge_engines(context, built, recipe, held, reference)
    engines = [_engine(b, gates[b.name], latencies.get(b.name), spec.name, contents) for b in built]
    held_out = _held_out(reference, spec, held, chosen, contents)
    failed = [f"{e.name}: {text}" for e in engines for text in e.gate.failures]
    enough = manifest.STATES.index("verified" if options.require == "verified" else "graph verified")
    short = [e.name for e in engines if manifest.STATES.index(e.state) < enough]
    result = manifest.Manifest(
        schema_version=manifest.SCHEMA_VERSION,
        tool=f"export-zoo {__version__}",
        status="failed" if failed or short else "ok",
        warnings=context.reporter.warnings,
        recipe=recipe,
        artifacts=manifest.Artifacts(
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            engines=engines,
            held_out=held_out,
        ),
    )
    out = options.out_dir
    place = publish.failed_place(out) if failed or short else out
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
        raise GateFailedError(
            f"parity gate failed: {'; '.join(failed)}",
            hint=f"everything is kept in {place}; see `export-zoo inspect {place}`, then try more --calib images, "
            "another --precision or a --tolerance that you can accept",
            result=ExportResult(place, result),
        )
    if short:
        raise RequirementMissedError(
            f"--require {options.require}: {', '.join(short)} did not reach the required state",
            hint=f"everything is kept in {place}; export on a machine that can run the engines",
            result=ExportResult(place, result),
        )
    return ExportResult(out, result)


def export(options: ExportOptions, *, reporter: Reporter | None = None) -> ExportResult:
    """Run the main job: zoo model to verified bundle.

    Args:
        options: what to do; see `ExportOptions`.
        reporter: receives stages, progress and warnings; silent by default.

    Raises:
        ExportZooError: see `base.errors` for its kinds and exit codes.
    """
    root = default_root() if options.cache else None
    with StageCache(root) as cache:
        return _run(Context(options, reporter or Reporter(), cache))
