"""Contents of a bundle: the parts of the manifest, and the files that they name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from export_zoo.base import graph_io
from export_zoo.base.machine import instruction_set
from export_zoo.calibration.ranges import Ranges
from export_zoo.engines.bundle import manifest
from export_zoo.engines.bundle.reader import HeldOut
from export_zoo.engines.precision.registry import BASELINE
from export_zoo.exporter import publish
from export_zoo.exporter.run.cache import StageResult
from export_zoo.exporter.run.context import Context
from export_zoo.exporter.stages.build import EngineFiles
from export_zoo.exporter.stages.images import ChosenImages
from export_zoo.exporter.stages.network import Exported, Reference, Simplified, reference_files
from export_zoo.exporter.stages.tuning.tune import Tuned

if TYPE_CHECKING:
    from export_zoo.exporter.models.spec import ModelSpec


@dataclass
class Contents:
    """Files of the future bundle: maps each bundle path to the file that now holds its bytes."""

    sources: dict[str, Path] = field(default_factory=dict)
    _named: dict[str, manifest.File] = field(default_factory=dict)
    """Files that have a stem, by their hash."""

    def add(self, path: Path, stem: str = "") -> manifest.File:
        """Add a file, unless one with the same bytes is there: FP16 graphs of both CPU targets are the same."""
        file = publish.describe(path, stem)
        if stem:  # weight files keep the names by which graphs refer to them
            file = self._named.setdefault(file.sha256, file)
        self.sources[file.path] = path
        return file


def describe_recipe(
    context: Context,
    spec: ModelSpec,
    chosen: ChosenImages,
    exported: StageResult[Exported],
    simplified: StageResult[Simplified],
    calibrated: tuple[Path, Ranges] | None,
    tuned: Mapping[str, Tuned],
    contents: Contents,
) -> manifest.Recipe:
    p, batch, sizes = spec.preprocess, context.options.batch, spec.sizes
    height, width = ("height", "width") if sizes is not None else (p.crop_height, p.crop_width)
    graph = simplified.file(Simplified.GRAPH)
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
        manifest.OutputPort(
            name=output.name,
            dtype="float32",
            shape=["batch", *output.shape]
            if sizes is None or len(output.shape) < 3
            else ["batch", output.shape[0], "height", "width"],
            layout=("N", "NC", "NTC", "NCHW")[len(output.shape)],
            task=output.task,
            scores=output.scores,
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
                initialized=exported.data.initialized,
                entry=exported.data.entry,
                skipped=exported.data.skipped,
                seed=spec.seed,
            ),
        ),
        input=manifest.Port(
            name="input", dtype="float32", shape=["batch", p.channels, height, width], layout="NCHW"
        ),
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
        simplified=simplified.data.summary,
        calibration=calibration,
        keep_float=list(context.options.keep_float),
        keep_float_fp16=list(context.options.keep_float_fp16),
        instruction_set=instruction_set(),
        versions=context.versions,
    )


def describe_engine(
    built: EngineFiles,
    gate: manifest.Gate,
    latency: manifest.Latency | None,
    model: str,
    contents: Contents,
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
        float_for_speed=built.float_for_speed,
        aim=built.aim,
        saturating_cpu_session=built.saturating_cpu_session,
    )


def _held_out_size(
    reference: StageResult[Reference], spec: ModelSpec, held: HeldOut, contents: Contents
) -> manifest.HeldOutSize:
    count, height, width, _ = held.pixels.shape
    inputs, logits, *further = (
        contents.add(reference.file(Reference.file(what, (height, width))), f"{what}-{height}x{width}")
        for what in ("inputs", *reference_files(spec))
    )
    return manifest.HeldOutSize(
        height=height, width=width, inputs=inputs, logits=logits, further=further, count=count
    )


def describe_held_out(
    reference: StageResult[Reference],
    spec: ModelSpec,
    held: HeldOut,
    chosen: ChosenImages,
    contents: Contents,
) -> manifest.HeldOut:
    """The reference's files."""
    inputs, logits, *further = (
        contents.add(reference.file(Reference.file(name)), name)
        for name in ("inputs", *reference_files(spec))
    )
    assert held.patterns is not None
    pattern_inputs, pattern_logits, *pattern_further = (
        contents.add(reference.file(Reference.file(name + Reference.PATTERNS)), f"{name}-patterns")
        for name in ("inputs", *reference_files(spec))
    )
    return manifest.HeldOut(
        inputs=inputs,
        logits=logits,
        further=further,
        count=len(held.pixels),
        synthetic=chosen.synthetic,
        labels=held.labels,
        image_sha256=reference.data.sha256,
        sizes=[_held_out_size(reference, spec, part, contents) for part in held.sizes],
        patterns=manifest.HeldOutPatterns(
            inputs=pattern_inputs,
            logits=pattern_logits,
            further=pattern_further,
            count=len(held.patterns.pixels),
            names=list(held.patterns.names),
        ),
    )
