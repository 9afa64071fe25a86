"""The main job: runs the stages in order and publishes the bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from export_zoo.base.errors import EnvironmentFailureError, ExportZooError, ParityError, StateNotReachedError
from export_zoo.base.files import cache_directory
from export_zoo.base.package import __version__
from export_zoo.calibration.images import check_folder
from export_zoo.calibration.ranges import Ranges
from export_zoo.engines.bundle import manifest
from export_zoo.engines.bundle.manifest import Engine
from export_zoo.engines.targets import registry
from export_zoo.exporter import publish
from export_zoo.exporter.contents import Contents, describe_engine, describe_held_out, describe_recipe
from export_zoo.exporter.options import ExportOptions
from export_zoo.exporter.run.cache import StageCache, StageResult
from export_zoo.exporter.run.context import Context
from export_zoo.exporter.run.report import Reporter
from export_zoo.exporter.stages import network
from export_zoo.exporter.stages import ranges as ranges_stage
from export_zoo.exporter.stages.build import build
from export_zoo.exporter.stages.images import choose_images
from export_zoo.exporter.stages.network import Reference, Simplified
from export_zoo.exporter.stages.tuning.tune import Tuned, tune
from export_zoo.exporter.stages.verify import judge_engines, time_engines

if TYPE_CHECKING:
    pass


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


def _refuse_overlap(ranges: Ranges, reference: StageResult[Reference]) -> None:
    shared = set(ranges.image_sha256) & set(reference.data.sha256)
    if shared:
        raise ParityError(
            f"{len(shared)} verify images are also in the calibration set: the comparison would prove nothing",
            hint="this is a defect of the splits; please report it",
        )


def _run(context: Context) -> ExportResult:
    options = context.options
    publish.check_destination(options.out_dir)
    chosen_targets = registry.choose_for(options.targets, options.build, options.precisions)
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
    graph = simplified.file(Simplified.GRAPH)
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
    contents = Contents()
    recipe = describe_recipe(context, spec, chosen, exported, simplified, calibrated, tuned, contents)
    latencies = time_engines(context, built, graph, recipe, held)
    gates = judge_engines(context, built, recipe, held, reference)
    engines = [describe_engine(b, gates[b.name], latencies.get(b.name), spec.name, contents) for b in built]
    held_out = describe_held_out(context, reference, spec, held, chosen, contents)
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
    root = cache_directory() if options.cache else None
    with StageCache(root) as cache:
        return _run(Context(options, reporter or Reporter(), cache))
