"""Stage: how INT8 of each target is made best, tried on the *select* images, which neither calibrate nor verify."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from calibration import graph_io
from calibration.collect import channel_magnitudes, collect
from calibration.images import ImageStream
from calibration.machine import instruction_set
from calibration.means import layer_means
from calibration.methods import METHODS
from calibration.preprocess import Preprocess, UInt8Array
from calibration.ranges import Ranges
from engines.equalize import STRENGTHS, equalize, observed
from engines.gate import Runnable, run_in_batches
from engines.keep_float import kept_float
from engines.manifest import Tuning, TuningStep
from engines.onnxruntime_engine import OnnxRuntimeEngine
from engines.parity import compare
from engines.placement import quantized_tensors, weight_of
from engines.precision import quantize
from engines.target import Target
from engines.twin import write_twin
from exporter.context import IMAGE_BATCH, Context
from exporter.image_stage import ChosenImages

MIN_GAIN = {"equalize": 1.0, "bias": 0.3, "method": 1.0}
"""Decibels that a step must bring on the select images. Other ranges round other values up and down, and so a decibel
more on some images may be as much less on others; correcting a bias takes a known error away."""

MIN_SELECT, MAX_SELECT, MAX_PIXELS = 32, 128, 128 * 64 * 64
"""Images that candidates are tried on: fewer where they are large, for TensorRT's graphs run unfused here."""

FEW_IMAGES = 64
"""Images that channels' magnitudes and layers' mean inputs are taken from."""

OFF, ON = "off", "on"


@dataclass(frozen=True)
class Tuned:
    """What INT8 of one target is made of."""

    graph: Path
    ranges: Ranges
    method: str
    tuning: Tuning | None
    means: Path | None = None
    """Mean inputs of layers, .safetensors by node name, where biases are corrected."""


Means = Mapping[str, npt.NDArray[np.float64]]


def read_means(path: Path | None) -> Means | None:
    return load_file(path) if path is not None else None


class _Bench:
    """Tries candidates: quantizes a graph and compares its logits with the FP32 graph's, in dB."""

    def __init__(self, context: Context, fp32: Path, pixels: UInt8Array, preprocess: Preprocess) -> None:
        self._options, self._pixels, self._preprocess = context.options, pixels, preprocess
        self._reference = self._run(OnnxRuntimeEngine(fp32))
        self._known: dict[tuple[Path, str, str, bool], float] = {}

    def _run(self, engine: Runnable) -> Any:
        return run_in_batches(engine, self._pixels, self._preprocess, IMAGE_BATCH)

    def sqnr(
        self, graph: Path, ranges: Ranges, target: str, method: str, means: Means | None = None
    ) -> float:
        """SQNR of one candidate on the select images."""
        key = (graph, target, method, means is not None)
        if key not in self._known:
            self._known[key] = self._measured(graph, ranges, target, method, means)
        return self._known[key]

    def _measured(self, graph: Path, ranges: Ranges, target: str, method: str, means: Means | None) -> float:
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
                means=means,
            )
            if target == "onnxruntime":
                return compare(self._reference, self._run(OnnxRuntimeEngine(out))).sqnr
            write_twin(out, twin)
            return compare(self._reference, self._run(OnnxRuntimeEngine(twin, fused=False))).sqnr


def _step(name: Literal["equalize", "bias", "method"], figures: dict[str, float], default: str) -> TuningStep:
    """The best candidate where it is better than the default by more than luck, else the default."""
    best = max(figures, key=lambda candidate: figures[candidate])
    chosen = best if figures[best] >= figures[default] + MIN_GAIN[name] else default
    return TuningStep(name=name, chosen=chosen, sqnr=figures)


def _variants(
    context: Context,
    graph: Path,
    chosen: ChosenImages,
    preprocess: Preprocess,
    some: UInt8Array,
    directory: Path,
) -> dict[str, tuple[Path, Ranges]]:
    """Equalized graphs and their ranges, by strength; none where no layer can be scaled."""
    files, root = chosen.splits["calibrate"], context.options.calib
    assert root is not None
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
            kept = kept_float(model.graph, context.options.keep_float)
            wanted = quantized_tensors(model.graph, kept)
            ranges = collect(path, stream, histograms=wanted, progress=progress)
        ranges.write(path.with_suffix(".json"))
        found[str(strength)] = path, ranges
    return found


def _tune(
    bench: _Bench,
    target: str,
    base: tuple[Path, Ranges],
    variants: Mapping[str, tuple[Path, Ranges]],
    means_of: Callable[[str, Path], Means] | None,
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
        steps.append(_step("equalize", figures, OFF))
        strength = steps[-1].chosen
    graph, ranges = candidates[strength]
    means: Means | None = None
    if means_of is not None:
        found = means_of(strength, graph)
        figures = {
            OFF: bench.sqnr(graph, ranges, target, first),
            ON: bench.sqnr(graph, ranges, target, first, found),
        }
        steps.append(_step("bias", figures, OFF))
        means = found if steps[-1].chosen == ON else None
    if method == "auto":
        figures = {name: bench.sqnr(graph, ranges, target, name, means) for name in METHODS}
        steps.append(_step("method", figures, "minmax"))
        first = steps[-1].chosen
    return {
        "strength": strength,
        "means": means is not None,
        "method": first,
        "steps": [step.model_dump() for step in steps],
    }


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
    wanted = options.steps or options.method == "auto"
    if random or not wanted or options.calib is None:
        method = "minmax" if options.method == "auto" else options.method
        return {target.name: Tuned(graph, ranges, method, None) for target in targets}
    affordable = MAX_PIXELS // (preprocess.crop_height * preprocess.crop_width)
    files = chosen.splits["select"][: min(MAX_SELECT, max(MIN_SELECT, affordable))]

    def make(directory: Path) -> dict[str, Any]:
        assert options.calib is not None
        pixels = ImageStream(files, preprocess, IMAGE_BATCH, options.calib).all()
        some = ImageStream(
            chosen.splits["calibrate"][:FEW_IMAGES], preprocess, IMAGE_BATCH, options.calib
        ).all()
        variants = {}
        if "equalize" in options.steps:
            variants = _variants(context, graph, chosen, preprocess, some, directory)

        def means_of(strength: str, variant: Path) -> Means:
            path = directory / f"means-{strength}.safetensors"
            if not path.exists():
                nodes = graph_io.load(variant).graph
                layers = [str(node.name) for node in nodes if weight_of(node) is not None]
                save_file(layer_means(variant, some, preprocess, layers), path)
            return read_means(path) or {}

        bench = _Bench(context, graph, pixels, preprocess)
        found = {
            target.name: _tune(
                bench,
                target.name,
                (graph, ranges),
                variants,
                means_of if "bias" in options.steps else None,
                options.method,
            )
            for target in targets
        }
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
            means = result.directory / f"means-{data['strength']}.safetensors" if data["means"] else None
            if data["strength"] == OFF:
                tuned[name] = Tuned(graph, ranges, data["method"], tuning, means)
            else:
                path = result.directory / f"equalized-{data['strength']}.onnx"
                equalized = Ranges.read(path.with_suffix(".json"))
                tuned[name] = Tuned(path, equalized, data["method"], tuning, means)
        stage.detail = "; ".join(f"{name}-int8 {_describe(found)}" for name, found in tuned.items())
        stage.detail += f", on {result.data['images']} images"
    return tuned


def _describe(tuned: Tuned) -> str:
    assert tuned.tuning is not None
    parts = []
    for step in tuned.tuning.steps:
        default = "minmax" if step.name == "method" else OFF
        what = {"equalize": f"equalized {step.chosen}", "bias": "biases corrected", "method": step.chosen}
        if step.chosen != default:
            parts.append(f"{what[step.name]} {step.sqnr[step.chosen] - step.sqnr[default]:+.1f} dB")
        elif step.name == "method":
            parts.append(step.chosen)
    return ", ".join(parts)
