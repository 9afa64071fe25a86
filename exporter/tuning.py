"""Stage: how INT8 of each target is made best, tried on the *select* images, which neither calibrate nor verify."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration import graph_io
from calibration.collect import channel_magnitudes, collect
from calibration.images import ImageStream
from calibration.machine import instruction_set
from calibration.methods import METHODS
from calibration.preprocess import Preprocess, UInt8Array
from calibration.ranges import Ranges
from engines.equalize import STRENGTHS, equalize, observed
from engines.gate import Runnable, run_in_batches
from engines.manifest import Tuning, TuningStep
from engines.onnxruntime_engine import OnnxRuntimeEngine
from engines.parity import compare
from engines.placement import quantized_tensors
from engines.precision import quantize
from engines.target import Target
from engines.twin import write_twin
from exporter.context import IMAGE_BATCH, Context
from exporter.image_stage import ChosenImages

MIN_GAIN = 0.3
"""Decibels that a step must bring on the select images: less is luck."""

MAX_SELECT = 128
"""Images that candidates are tried on, at most."""

MAGNITUDE_IMAGES = 64
"""Images that channels' magnitudes are taken from: equalization only needs to know about how large they are."""

OFF = "off"


@dataclass(frozen=True)
class Tuned:
    """What INT8 of one target is made of."""

    graph: Path
    ranges: Ranges
    method: str
    tuning: Tuning | None


class _Bench:
    """Tries candidates: quantizes a graph and compares its logits with the FP32 graph's, in dB."""

    def __init__(self, context: Context, fp32: Path, pixels: UInt8Array, preprocess: Preprocess) -> None:
        self._options, self._pixels, self._preprocess = context.options, pixels, preprocess
        self._reference = self._run(OnnxRuntimeEngine(fp32))

    def _run(self, engine: Runnable) -> Any:
        return run_in_batches(engine, self._pixels, self._preprocess, IMAGE_BATCH)

    def sqnr(self, graph: Path, ranges: Ranges, target: str, method: str) -> float:
        """SQNR of one candidate on the select images."""
        with tempfile.TemporaryDirectory(prefix="export-zoo-") as directory:
            out, twin = Path(directory) / "candidate.onnx", Path(directory) / "twin.onnx"
            quantize(
                graph,
                ranges,
                out,
                target=target,
                reduce_range=self._options.reduce_range,
                keep_float=self._options.keep_float,
                method=method,
            )
            if target == "onnxruntime":
                return compare(self._reference, self._run(OnnxRuntimeEngine(out))).sqnr
            write_twin(out, twin)
            return compare(self._reference, self._run(OnnxRuntimeEngine(twin, fused=False))).sqnr


def _chosen(figures: Mapping[str, float], default: str) -> str:
    """The best candidate where it is better than the default by more than luck, else the default."""
    best = max(figures, key=lambda name: figures[name])
    return best if figures[best] >= figures[default] + MIN_GAIN else default


def _variants(
    context: Context, graph: Path, chosen: ChosenImages, preprocess: Preprocess, directory: Path
) -> dict[str, tuple[Path, Ranges]]:
    """Equalized graphs and their ranges, by strength; none where no layer can be scaled."""
    files, root = chosen.splits["calibrate"], context.options.calib
    assert root is not None
    some = ImageStream(files[:MAGNITUDE_IMAGES], preprocess, IMAGE_BATCH, root).all()
    names = observed(graph_io.load(graph).graph)
    if not names:
        return {}
    magnitudes = channel_magnitudes(graph, some, preprocess, names)
    found = {}
    for strength in STRENGTHS:
        model = graph_io.load(graph)
        if not equalize(model.graph, magnitudes, strength):
            continue
        path = directory / f"equalized-{strength}.onnx"
        graph_io.save(model, path)
        stream = ImageStream(files, preprocess, IMAGE_BATCH, root)
        with context.reporter.bar(f"tune {strength}", len(files)) as progress:
            ranges = collect(path, stream, histograms=quantized_tensors(model.graph), progress=progress)
        ranges.write(path.with_suffix(".json"))
        found[str(strength)] = path, ranges
    return found


def _tune(
    bench: _Bench,
    target: str,
    base: tuple[Path, Ranges],
    variants: Mapping[str, tuple[Path, Ranges]],
    method: str,
) -> dict[str, Any]:
    """The choices for one target, step by step, each with the figures of its candidates."""
    steps = []
    first = "minmax" if method == "auto" else method
    candidates = {OFF: base, **variants}
    strength = OFF
    if variants:
        figures = {
            name: bench.sqnr(graph, ranges, target, first) for name, (graph, ranges) in candidates.items()
        }
        strength = _chosen(figures, OFF)
        steps.append(TuningStep(name="equalize", chosen=strength, sqnr=figures))
    if method == "auto":
        graph, ranges = candidates[strength]
        figures = {name: bench.sqnr(graph, ranges, target, name) for name in METHODS}
        first = _chosen(figures, "minmax")
        steps.append(TuningStep(name="method", chosen=first, sqnr=figures))
    return {"strength": strength, "method": first, "steps": [step.model_dump() for step in steps]}


def tune(
    context: Context,
    graph: Path,
    ranges: Ranges,
    chosen: ChosenImages,
    preprocess: Preprocess,
    targets: Sequence[Target],
    *,
    random: bool,
) -> dict[str, Tuned]:
    """What INT8 of each target is made of, by target.

    With random weights nothing is tried: figures would be of rounding errors in chaotic networks.
    """
    options = context.options
    wanted = "equalize" in options.steps or options.method == "auto"
    if random or not wanted or options.calib is None:
        method = "minmax" if options.method == "auto" else options.method
        return {target.name: Tuned(graph, ranges, method, None) for target in targets}
    files = chosen.splits["select"][:MAX_SELECT]

    def make(directory: Path) -> dict[str, Any]:
        assert options.calib is not None
        pixels = ImageStream(files, preprocess, IMAGE_BATCH, options.calib).all()
        variants = {}
        if "equalize" in options.steps:
            variants = _variants(context, graph, chosen, preprocess, directory)
        bench = _Bench(context, graph, pixels, preprocess)
        found = {t.name: _tune(bench, t.name, (graph, ranges), variants, options.method) for t in targets}
        for strength in variants.keys() - {data["strength"] for data in found.values()}:
            (directory / f"equalized-{strength}.json").unlink()
            (directory / f"equalized-{strength}.onnx").unlink()
        return {"images": len(pixels), "targets": found}

    with context.reporter.stage("tune") as stage:
        key = context.key(
            "onnxruntime",
            "onnx_ir",
            "numpy",
            "pillow",
            graph=graph_io.sha256_of(graph),
            ranges=ranges.digest(),
            calibrate=[file.sha256 for file in chosen.splits["calibrate"]],
            select=[file.sha256 for file in files],
            targets=[target.name for target in targets],
            options=[options.steps, options.method, options.reduce_range, options.keep_float],
            isa=instruction_set(),
        )
        result = context.cache.run("tune", key, make)
        stage.cached = result.cached
        tuned = {}
        for name, data in result.data["targets"].items():
            steps = [TuningStep.model_validate(step) for step in data["steps"]]
            tuning = Tuning(images=result.data["images"], steps=steps)
            if data["strength"] == OFF:
                tuned[name] = Tuned(graph, ranges, data["method"], tuning)
            else:
                path = result.directory / f"equalized-{data['strength']}.onnx"
                tuned[name] = Tuned(path, Ranges.read(path.with_suffix(".json")), data["method"], tuning)
        stage.detail = "; ".join(f"{name}-int8 {_describe(found)}" for name, found in tuned.items())
        stage.detail += f", on {result.data['images']} images"
    return tuned


def _describe(tuned: Tuned) -> str:
    assert tuned.tuning is not None
    parts = []
    for step in tuned.tuning.steps:
        default = OFF if step.name == "equalize" else "minmax"
        what = {"equalize": f"equalized {step.chosen}", "method": step.chosen}[step.name]
        if step.chosen == default:
            parts.append("not equalized" if step.name == "equalize" else "minmax")
        else:
            parts.append(f"{what} {step.sqnr[step.chosen] - step.sqnr[default]:+.1f} dB")
    return ", ".join(parts)
