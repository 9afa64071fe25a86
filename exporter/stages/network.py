"""The stages from a model to its simplified graph and reference outputs, through the cache."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from export_zoo.base.errors import BadInputError
from export_zoo.base.machine import instruction_set
from export_zoo.calibration import images, synthetic
from export_zoo.calibration.images import ImageStream
from export_zoo.calibration.preprocess import normalize
from export_zoo.engines.bundle.reader import HeldOut
from export_zoo.engines.parity.checked_sizes import Size, sizes_to_check
from export_zoo.engines.parity.metrics import check_reference
from export_zoo.engines.parity.outputs import as_rows
from export_zoo.engines.verification import gate
from export_zoo.exporter.run.cache import StageResult
from export_zoo.exporter.run.context import IMAGE_BATCH, Context
from export_zoo.exporter.stages.images import MAX_HELD_OUT, SYNTHETIC_IMAGES, ChosenImages

if TYPE_CHECKING:
    from torch import nn

    from export_zoo.exporter.models.spec import ModelSpec
    from export_zoo.exporter.models.weights.state_dicts import LoadReport


@dataclass(frozen=True)
class Exported:
    """The exported graph, checked against eager."""

    GRAPH: ClassVar[str] = "model.onnx"
    initialized: list[str]
    """Parameters left at random values."""
    skipped: list[str]
    """Names of the weights file that were left out."""
    entry: str
    """Entry of the checkpoint that was read; empty if it has none."""
    others: list[str]
    """Its other entries."""
    error: float
    """Largest difference to eager's logits, relative to their largest."""
    opset: int
    warning: str
    """Warning that the graph differs from eager on test patterns, or that the optimizer was left out; empty if none."""


@dataclass(frozen=True)
class Simplified:
    """The simplified graph: the FP32 graph of the bundle."""

    GRAPH: ClassVar[str] = "graph.onnx"
    summary: str
    warning: str


@dataclass(frozen=True)
class Reference:
    """The verify images, and eager's outputs of them; files are named by `file`."""

    PATTERNS: ClassVar[str] = "-patterns"
    """Suffix of the names of the test patterns' files."""
    sha256: list[str]
    """Hashes of the image files, in order; empty for synthetic images."""
    unreadable: list[tuple[str, str]]
    """Names of images that were left out, with reasons."""
    largest: int = 0
    """Largest value of images of 16 bits that were cut to 8; 0 if there are none."""

    @staticmethod
    def file(name: str, size: Size | None = None) -> str:
        """File name of `inputs` or of an output (`reference_files`), at a further size (height, width)."""
        return f"{name}.npy" if size is None else f"{name}-{size[0]}x{size[1]}.npy"


_SIXTEEN_BITS = 2**14
"""Images of 16 bits whose values are all below it probably have 10, 12 or 14 bits."""


_NEARLY_BLACK = 4
"""Images whose largest value is less than this part of the scale are nearly black."""


class EagerModel:
    """The eager model of a spec. It is built once, and only if a stage is not cached."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec

    @cached_property
    def built(self) -> tuple[nn.Module, LoadReport]:
        """The module, and what was loaded into it."""
        from export_zoo.exporter.models import zoo

        return zoo.build(self._spec)


def resolve_model(context: Context) -> ModelSpec:
    """Find the model and its weights (downloads them); see `models.zoo.resolve` for the errors."""
    with context.reporter.stage("weights") as stage:
        from export_zoo.exporter.models import zoo

        if context.options.memory_check and (untrained := zoo.resolve_before_download(context.options)):
            _check_memory(context, untrained)
        spec = zoo.resolve(context.options)
        p = spec.preprocess
        stage.detail = (
            f"{spec.name}, {spec.weights_name}, input {spec.sizes or f'{p.crop_height}x{p.crop_width}'}, "
            f"resize {p.resize_size} {p.interpolation}, {spec.head.described}"
        )
        if len(spec.outputs) > 1:
            stage.detail += f", outputs {', '.join(f'{o.name} ({o.head.described})' for o in spec.outputs)}"
        if spec.transform_input is not None:
            stage.detail += f", transform_input={spec.transform_input}"
        stage.detail += "".join(f", {key}={text}" for key, text in spec.model_args)
        stage.detail += ", fully convolutional" if spec.fully_convolutional else ""
    if context.options.memory_check:
        _check_memory(context, spec)
    if p.resize_size < (min if p.crop_mode == "squash" else max)(p.crop_height, p.crop_width):
        context.reporter.warn(
            f"the resize to {p.resize_size} is smaller than the input {p.crop_height}x{p.crop_width}: "
            "images get a black border"
        )
    for note in spec.notes:
        context.reporter.warn(note)
    if spec.reading.allow_pickle:
        context.reporter.warn(f"--allow-pickle: code in {spec.weights_path} is run")
    if spec.weights_kind == "random":
        context.reporter.warn(
            "random weights (--weights none): engines are compared, but this says nothing about accuracy"
        )
    return spec


def _check_memory(context: Context, spec: ModelSpec) -> None:
    from export_zoo.exporter.models import memory, zoo

    expected = zoo.expected_memory(spec, context.options)
    if expected is not None:
        memory.check(spec.name, expected)


def _further_sizes(spec: ModelSpec) -> list[Size]:
    """Input sizes that are checked in addition to that of the preprocessing; empty if the size is fixed."""
    sizes = spec.sizes
    return sizes_to_check(sizes.min, sizes.opt, sizes.max) if sizes is not None else []


def _all_sizes(spec: ModelSpec) -> list[Size]:
    return [(spec.preprocess.crop_height, spec.preprocess.crop_width), *_further_sizes(spec)]


def _synthetic(spec: ModelSpec, count: int, seed: int) -> Iterator[npt.NDArray[np.float32]]:
    """Synthetic inputs, float32 [count, channels, H, W], of every size that is checked."""
    for size in _all_sizes(spec):
        there = spec.preprocess.at_size(*size)
        yield normalize(synthetic.synthetic_images(count, there, seed), there)


def _test_patterns(spec: ModelSpec) -> Iterator[npt.NDArray[np.float32]]:
    """The test patterns as inputs, float32 [6, channels, H, W], of every size that is checked."""
    for size in _all_sizes(spec):
        there = spec.preprocess.at_size(*size)
        yield normalize(synthetic.test_patterns(there), there)


def export_graph(context: Context, spec: ModelSpec, model: EagerModel) -> StageResult[Exported]:
    """Export the eager model, and check it against eager at two batches of every size."""

    def make(directory: Path) -> Exported:
        from export_zoo.exporter.graph import against_eager, to_onnx

        module, report = model.built
        p = spec.preprocess
        path = directory / Exported.GRAPH
        names = [output.name for output in spec.outputs]
        own = spec.zoo == "python"

        size = (p.crop_height, p.crop_width)

        def export_to(out: Path, *, optimize: bool) -> str:
            to_onnx.export(
                module,
                *size,
                out,
                optimize=optimize,
                outputs=names,
                sizes=spec.sizes,
                own=own,
                channels=p.channels,
            )
            patterns = (
                against_eager.difference_on_test_patterns(out, module, part) for part in _test_patterns(spec)
            )
            return next(filter(None, patterns), "")

        warning = export_to(path, optimize=True)
        if warning:
            plain = directory / "plain.onnx"
            if not export_to(plain, optimize=False):
                warning = f"the exporter's optimizer is left out: with it, {warning}"
                plain.replace(path)
            plain.unlink(missing_ok=True)
        error = 0.0
        for inputs in _synthetic(spec, max(against_eager.CHECK_BATCHES), spec.seed):
            follows = spec.sizes is not None
            error = max(error, against_eager.check_batches(path, module, inputs, follows=follows))
        return Exported(**asdict(report), error=error, opset=to_onnx.OPSET, warning=warning)

    with context.reporter.stage("export") as stage:
        libraries = ("torch", "torchvision", "onnx", "onnxscript", "onnx_ir")
        result = context.cache.run("export", context.key(*libraries, spec=spec.key()), make, Exported)
        stage.cached = result.cached
        stage.detail = (
            f"ONNX opset {result.data.opset}, dynamic batch{', height and width' if spec.sizes else ''}; "
            f"eager's logits within {result.data.error:.0e} at batches 1 and 3"
        )
        if spec.sizes is not None:
            stage.detail += f" of {', '.join(f'{height}x{width}' for height, width in _all_sizes(spec))}"
        if entry := result.data.entry:
            stage.detail += f"; weights: {entry} of the checkpoint"
    if others := result.data.others:
        context.reporter.warn(
            f"--weights: read {result.data.entry}; the file also has {', '.join(others)}: --weights-key selects it"
        )
    if skipped := result.data.skipped:
        context.reporter.warn(f"--skip-weights: left out of the file: {', '.join(skipped)}")
    if warning := result.data.warning:
        context.reporter.warn(warning)
    if names := result.data.initialized:
        context.reporter.warn(f"initialized at random: {', '.join(names)}: accuracy figures mean nothing")
    return result


def simplify_graph(
    context: Context, spec: ModelSpec, exported: StageResult[Exported]
) -> StageResult[Simplified]:
    """Simplify the exported graph, and prove that the logits did not change."""

    def make(directory: Path) -> Simplified:
        from export_zoo.exporter.graph import simplify

        inputs = [*_synthetic(spec, 3, spec.seed + 1), *_test_patterns(spec)]
        done = simplify.simplify(exported.file(Exported.GRAPH), directory, *inputs)
        return Simplified(done.summary, done.warning)

    with context.reporter.stage("simplify") as stage:
        key = context.key("onnx", "onnx_ir", "onnxsim", "onnxruntime", graph=exported.key)
        result = context.cache.run("simplify", key, make, Simplified)
        stage.cached, stage.detail = result.cached, result.data.summary
    if result.data.warning:
        context.reporter.warn(result.data.warning)
    return result


def run_reference(
    context: Context, spec: ModelSpec, model: EagerModel, chosen: ChosenImages
) -> tuple[StageResult[Reference], HeldOut]:
    """Decode the verify set, or its first MAX_HELD_OUT images, and run eager PyTorch on them.

    If the input size is dynamic, the first images also run at further sizes.

    Raises:
        BadInputError: too many images cannot be decoded, or too few are left.
        ParityError: the logits are not usable as a reference.
    """
    p = spec.preprocess
    files = (*chosen.splits["verify"][:MAX_HELD_OUT], *chosen.splits["spare"])
    identity = ["synthetic", SYNTHETIC_IMAGES] if chosen.synthetic else [i.sha256 for i in files]

    def make(directory: Path) -> Reference:
        from export_zoo.exporter.graph.reference import eager_outputs

        stream = None
        if chosen.synthetic:
            # Not the seed of the images that make random weights usable.
            pixels = synthetic.synthetic_images(SYNTHETIC_IMAGES, p, spec.seed + 2)
        else:
            assert chosen.verify_root is not None
            wanted = min(len(chosen.splits["verify"]), MAX_HELD_OUT)
            stream = ImageStream(files, p, IMAGE_BATCH, chosen.verify_root, wanted)
            pixels = stream.all()
            # As many may be unreadable as in a folder.
            if len(pixels) < math.ceil((1 - images.MAX_UNREADABLE_SHARE) * images.MIN_VERIFY):
                raise BadInputError(
                    f"{chosen.verify_root}: {len(pixels)} verify images can be decoded, at least "
                    f"{images.MIN_VERIFY} are needed; not decoded: {images.describe(stream.unreadable)}",
                    hint="repair or replace them, or add images",
                )
        with context.reporter.bar("reference", len(pixels)) as progress:
            outputs = eager_outputs(model.built[0], pixels, p, progress)
        np.save(directory / Reference.file("inputs"), pixels)
        for name, output in zip(reference_files(spec), outputs, strict=True):
            check_reference(as_rows(output), "" if name == "logits" else f"{name}: ")
            np.save(directory / Reference.file(name), output)
        for height, width in _further_sizes(spec):
            there = p.at_size(height, width)
            if stream is None:
                pixels = synthetic.synthetic_images(gate.SUBSET, there, spec.seed + 2)
            else:
                pixels = ImageStream(stream.images[: gate.SUBSET], there, IMAGE_BATCH, stream.root).all()
            np.save(directory / Reference.file("inputs", (height, width)), pixels)
            outputs = eager_outputs(model.built[0], pixels, there)
            for name, output in zip(reference_files(spec), outputs, strict=True):
                check_reference(as_rows(output), f"at {height}x{width}, ")
                np.save(directory / Reference.file(name, (height, width)), output)
        pixels = synthetic.test_patterns(p)
        np.save(directory / Reference.file("inputs" + Reference.PATTERNS), pixels)
        outputs = eager_outputs(model.built[0], pixels, p)
        for name, output in zip(reference_files(spec), outputs, strict=True):
            np.save(directory / Reference.file(name + Reference.PATTERNS), output)
        if stream is None:
            return Reference([], [])
        return Reference(
            [i.sha256 for i in stream.images],
            [(u.name, u.reason) for u in stream.unreadable],
            stream.largest,
        )

    with context.reporter.stage("reference") as stage:
        libraries = ("torch", "torchvision", "numpy", "pillow")
        key = context.key(*libraries, spec=spec.key(), images=identity, isa=instruction_set())
        result = context.cache.run("reference", key, make, Reference)

        def held(size: Size | None = None, suffix: str = "", names: tuple[str, ...] = ()) -> HeldOut:
            inputs, logits, *further = (
                np.load(result.file(Reference.file(name + suffix, size)))
                for name in ("inputs", *reference_files(spec))
            )
            return HeldOut(inputs, logits, None, tuple(further), names=names)

        whole = held()
        sizes = tuple(held(size) for size in _further_sizes(spec))
        kind = "synthetic images" if chosen.synthetic else "images"
        stage.cached, stage.detail = result.cached, f"eager PyTorch FP32 on {len(whole.pixels)} {kind}"
        for part in sizes:
            stage.detail += f", {len(part.pixels)} at {part.pixels.shape[1]}x{part.pixels.shape[2]}"
    context.warn_unreadable(chosen.verify_root, result.data.unreadable)
    if 0 < result.data.largest < _SIXTEEN_BITS:
        bits = max(9, result.data.largest.bit_length())
        context.reporter.warn(
            f"{chosen.verify_root}: the largest value of its 16-bit images is {result.data.largest}, as of {bits} "
            f"bits; cut to 8 bits, they are nearly black: give `scale: {2**bits - 1}` in a --preprocess file"
        )
    largest = float(whole.pixels.max())
    if p.keeps_values and not chosen.synthetic and 0 < largest < p.scale / _NEARLY_BLACK:
        context.reporter.warn(
            f"{chosen.verify_root}: the largest value of its images is {largest:g}, and `scale` is {p.scale:g}: they "
            "are nearly black; give the value that counts as 1"
        )
    labels = None
    if chosen.labels is not None:
        labelled = (*chosen.splits["verify"], *chosen.splits["spare"])
        by_hash = dict(zip((i.sha256 for i in labelled), chosen.labels, strict=True))
        labels = [by_hash[sha256] for sha256 in result.data.sha256]
    patterns = held(suffix=Reference.PATTERNS, names=synthetic.TEST_PATTERNS)
    return result, dataclasses.replace(whole, labels=labels, sizes=sizes, patterns=patterns)


def reference_files(spec: ModelSpec) -> list[str]:
    """File name stems of the reference outputs, one for each output."""
    return ["logits", *(f"output-{index}" for index in range(1, len(spec.outputs)))]
