"""The card of a bundle: what it is and what was measured, as a page or as Markdown. Runs nothing.

Its contents follow Mitchell et al. 2019, "Model Cards for Model Reporting" (arXiv 1810.03993).
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from export_zoo.calibration.preprocess import Preprocess, read_pixels
from export_zoo.engines.bundle import reader
from export_zoo.engines.bundle.manifest import Attestation, Engine, Gate, Latency, Manifest
from export_zoo.engines.parity.intervals import described, interval
from export_zoo.engines.parity.limits import limits_of
from export_zoo.engines.parity.tasks import headline
from export_zoo.exporter.page import plots
from export_zoo.exporter.page.templates import render, thumbnail
from export_zoo.exporter.run.report import RANDOM

PICTURES = 6
"""Number of held-out images on the page."""

_PICTURE = 224
"""Length of the longer side of pictures of the preprocessing, in pixels."""


@dataclass(frozen=True)
class Table:
    """A table of texts; the first `names` columns are names, the others figures."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    names: int = 1


@dataclass(frozen=True)
class Card:
    """What a bundle is, in texts."""

    title: str
    facts: dict[str, str]
    warnings: list[str]
    preprocessing: list[str]
    tables: list[Table]


def facts(bundle: Path, manifest: Manifest) -> dict[str, str]:
    """What a bundle holds, by the name of each fact."""
    recipe, p = manifest.recipe, manifest.recipe.preprocess
    trained, held = recipe.source.weights, manifest.artifacts.held_out
    found = {
        "bundle": f"{bundle} ({manifest.status}, by {manifest.tool}, {manifest.artifacts.created})",
        "model": f"{recipe.source.name}, {recipe.output.head.described}",
        "weights": trained.name + (f" (SHA-256 {trained.sha256[:16]}...)" if trained.sha256 else ""),
        "input": f"{recipe.input.name}: float32 {recipe.input.shape} {recipe.input.layout}",
        "output": "; ".join(
            f"{port.name}: float32 {port.shape}, {port.head.task}"
            + (f" ({port.head.scores})" if port.head.scores != "values" else "")
            for port in recipe.outputs
        ),
        "batch": f"{recipe.batch.min} to {recipe.batch.max}, best at {recipe.batch.opt}",
        "preprocess": f"{p.mode}, resize {p.resize_size} {p.interpolation} antialiased"
        f"{' to the proportions of the crop' if p.crop_mode == 'squash' else ''}, "
        f"crop {p.crop_height}x{p.crop_width}, /{p.scale:g}, mean {list(p.mean)}, std {list(p.std)} ({p.source})",
        "labels": f"{len(recipe.labels)} names" if recipe.labels else "not known",
        "calibration": f"{recipe.calibration.method}, {recipe.calibration.images} images"
        if recipe.calibration
        else "none",
        "held out": f"{held.count} {'synthetic ' if held.synthetic else ''}images with eager logits",
        "machine": recipe.instruction_set,
    }
    if (sizes := recipe.input_size) is not None:
        low, opt, high = (f"{height}x{width}" for height, width in (sizes.min, sizes.opt, sizes.max))
        found["input"] += f", {low} to {high}, best at {opt}"
        found["held out"] += "".join(f", {part.count} at {part.height}x{part.width}" for part in held.sizes)
    for engine in manifest.artifacts.engines:
        if engine.float_for_speed is not None and engine.float_for_speed.layers:
            found["float"] = f"{', '.join(engine.float_for_speed.layers)} ({engine.name}: faster in float)"
    return found


def card_of(bundle: Path) -> Card:
    """The card of a bundle.

    Raises:
        BadInputError: not a bundle.
    """
    manifest = reader.read_manifest(bundle)
    attested = reader.attestations(bundle)
    recipe, engines = manifest.recipe, manifest.artifacts.engines
    warnings = [RANDOM] if recipe.source.weights.random else []
    warnings += manifest.warnings
    warnings += [f"{refused.name}: not built: {refused.reason}" for refused in manifest.artifacts.refused]
    warnings += [f"{name}: this version does not know it" for name in manifest.unknown_engines]
    tables = [
        _parity(engines),
        _speed(engines, attested.by_file),
        _layers_in_float(engines),
        _tuning(engines),
        *_aims(engines),
        _attestations(attested.by_file),
        Table(
            "Versions",
            "Of the libraries that made it.",
            ("library", "version"),
            sorted(recipe.versions.items()),
        ),
    ]
    return Card(
        title=f"{recipe.source.name}, {recipe.output.head.task}",
        facts=facts(bundle, manifest),
        warnings=warnings,
        preprocessing=_steps(recipe.preprocess),
        tables=[table for table in tables if table.rows],
    )


def html(card: Card, bundle: Path) -> str:
    """The card as a page, with pictures and plots.

    Raises:
        BadInputError: the bundle is damaged.
        EnvironmentFailureError: matplotlib is not installed.
    """
    plots.check()
    manifest = reader.read_manifest(bundle)
    engines = manifest.artifacts.engines
    held = reader.held_out(bundle, manifest)
    return render(
        "card.html.jinja",
        title=card.title,
        card=card,
        bundle=bundle.name,
        sizes=plots.bars(
            {engine.name: engine.size_bytes / 1e6 for engine in engines}, "MB", "size of the engines"
        ),
        speeds=plots.bars(
            {engine.name: engine.latency.speedup for engine in engines if engine.latency is not None},
            "times the speed of FP32",
            "speed of the engines",
        ),
        curves=[
            (engine.name, plots.accuracy_over_speed(engine.aim))
            for engine in engines
            if engine.aim is not None
        ],
        stages=_pictures(manifest.recipe.preprocess),
        images=[
            (thumbnail(pixels), _answer(logits, manifest))
            for pixels, logits in zip(held.pixels[:PICTURES], held.logits[:PICTURES], strict=True)
        ],
    )


def markdown(card: Card, bundle: Path) -> str:
    """The card as Markdown."""
    return render("card.md.jinja", title=card.title, card=card, bundle=bundle.name)


def _parity(engines: Sequence[Engine]) -> Table:
    title = headline(engines[0].gate.eager_metrics)[0]
    return Table(
        "Parity with eager PyTorch",
        "On the held-out images. Shares have their 95 % interval (Wilson 1927).",
        ("engine", "state", "limits", "batches", "SQNR dB", title, "accuracy", "worst test pattern dB"),
        [
            (
                engine.name,
                "FAILED" if engine.gate.failures else engine.state,
                ", ".join(map(str, limits_of(engine.gate.tolerances))),
                ", ".join(map(str, engine.gate.batches)),
                _figure(engine.gate.eager_metrics.get("sqnr"), ".1f"),
                headline(engine.gate.eager_metrics)[1] + described(engine.gate.eager_metrics),
                _accuracy(engine.gate),
                _figure(min(engine.gate.patterns.values(), default=None), ".1f"),
            )
            for engine in engines
        ],
        names=4,
    )


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _accuracy(gate: Gate) -> str:
    metrics = gate.eager_metrics
    accuracy, drop = metrics.get("accuracy"), metrics.get("accuracy_drop") or 0.0
    if accuracy is None:
        return "-"
    low, high = interval(float(accuracy), int(metrics.get("images") or 1))
    return f"{100 * accuracy:.1f} % ({100 * low:.1f} to {100 * high:.1f}), {0.0 - 100 * drop:+.1f} to eager"


def _speed(engines: Sequence[Engine], attested: dict[str, Attestation]) -> Table:
    def row(name: str, latency: Latency) -> tuple[str, ...]:
        figures = (f"{latency.median_ms:.2f}", f"{latency.fp32_median_ms:.2f}", f"{latency.speedup:.2f}x")
        return (name, latency.machine, str(latency.batch), *figures)

    rows = [row(engine.name, engine.latency) for engine in engines if engine.latency is not None]
    rows += [row(name, found) for one in attested.values() for name, found in one.latencies.items()]
    return Table(
        "Speed",
        "Median latency of a batch, in turn with the FP32 graph in ONNX Runtime, on all threads. "
        "export-zoo bench measures more on your machine.",
        ("engine", "machine", "batch", "ms", "FP32 ms", "vs FP32"),
        rows,
        names=2,
    )


def _layers_in_float(engines: Sequence[Engine]) -> Table:
    def reasons(engine: Engine) -> Iterator[tuple[str, Sequence[str]]]:
        if engine.float_for_speed is not None:
            yield "faster in float", engine.float_for_speed.layers
        for step in engine.tuning.steps if engine.tuning is not None else []:
            if step.name == "float":
                yield "more exact (tuning)", step.names
        if engine.aim is not None:
            yield f"for the aim {engine.aim.metric}={engine.aim.value:g}", engine.aim.modules

    return Table(
        "Layers in float",
        "Layers that the engine's precision leaves float, and why.",
        ("engine", "why", "layers"),
        [
            (engine.name, why, ", ".join(layers))
            for engine in engines
            for why, layers in reasons(engine)
            if layers
        ],
        names=3,
    )


def _tuning(engines: Sequence[Engine]) -> Table:
    return Table(
        "Tuning of INT8",
        "Choices on images that are used neither to calibrate nor to verify; a gain counts if it is more than chance.",
        ("engine", "step", "chosen", "best candidate", "gain dB", "standard error", "images"),
        [
            (
                engine.name,
                step.name,
                step.chosen,
                step.best or "-",
                _figure(step.gain, "+.2f"),
                _figure(step.standard_error, ".2f"),
                _figure(step.images, "d"),
            )
            for engine in engines
            if engine.tuning is not None
            for step in engine.tuning.steps
        ],
        names=4,
    )


def _aims(engines: Sequence[Engine]) -> Iterator[Table]:
    for engine in engines:
        if (aim := engine.aim) is not None:
            fp32 = f" FP32 takes {aim.fp32_ms:.2f} ms." if aim.fp32_ms is not None else ""
            yield Table(
                f"Accuracy over speed: {engine.name}",
                f"What --aim {aim.metric}={aim.value:g} tried on {aim.images} select images, without what costs more "
                f"than a better one. Times are of one image on one thread.{fp32}",
                ("layers in float", f"{aim.metric}", "ms", "ms more"),
                [
                    (
                        str(step.layers),
                        f"{step.value:.4g}",
                        _figure(aim.ms_with(step), ".2f"),
                        _figure(step.added_ms, "+.2f"),
                    )
                    for step in aim.curve
                ],
                names=0,
            )


def _attestations(attested: dict[str, Attestation]) -> Table:
    return Table(
        "Attestations",
        "Machines on which export-zoo verify compared the engines again.",
        ("machine", "when", "result", "engines"),
        [
            (
                one.machine,
                one.created,
                one.status,
                ", ".join(
                    f"{name} {'FAILED' if gate.failures else one.states.get(name, 'ok')}"
                    for name, gate in one.engines.items()
                ),
            )
            for one in attested.values()
        ],
        names=4,
    )


def _steps(p: Preprocess) -> list[str]:
    """The preprocessing, step by step."""
    values = ", ".join(
        f"{(0 - mean) / std:.3g} to {(1 - mean) / std:.3g}" for mean, std in zip(p.mean, p.std, strict=True)
    )
    return [
        f"Decode the image as {p.mode}.",
        (
            f"Resize it to the proportions of the crop, its shorter side to {p.resize_size} pixels"
            if p.crop_mode == "squash"
            else f"Resize its shorter side to {p.resize_size} pixels"
        )
        + f": {p.interpolation}, antialiased.",
        f"Crop the centre: {p.crop_height} rows of {p.crop_width} pixels.",
        f"Divide by {p.scale:g}, subtract the mean ({', '.join(f'{m:g}' for m in p.mean)}) and divide by the standard "
        f"deviation ({', '.join(f'{s:g}' for s in p.std)}) of each channel: values are {values}.",
    ]


def _test_card(p: Preprocess) -> Image.Image:
    """A picture whose numbered squares show what a resize and a crop leave of it, 480x360."""
    from PIL import ImageDraw

    image = Image.new("RGB", (480, 360))
    draw = ImageDraw.Draw(image)
    for row in range(6):
        for column in range(8):
            left, top = 60 * column, 60 * row
            colour = (40 + 25 * column, 60 + 30 * row, 200 - 20 * ((row + column) % 5))
            draw.rectangle((left, top, left + 59, top + 59), fill=colour)
            draw.text(
                (left + 18, top + 18), f"{row + 1}{'ABCDEFGH'[column]}", fill=(255, 255, 255), font_size=20
            )
    return image.convert("L" if p.channels == 1 else "RGB")


def _pictures(p: Preprocess) -> list[tuple[str, str]]:
    """A test card before and after resize and crop: PNG, base64, and what it shows; empty for images of bands."""
    if p.keeps_values or p.channels not in (1, 3):
        return []
    before, buffer = _test_card(p), io.BytesIO()
    before.save(buffer, format="PNG")
    after, _ = read_pixels(buffer.getvalue(), p)
    arrays = (np.asarray(before).reshape(before.height, before.width, -1), after)
    texts = (
        f"an image of {before.width}x{before.height} pixels",
        f"as the network gets it, {p.crop_width}x{p.crop_height} pixels",
    )
    return [(thumbnail(array, _PICTURE), text) for array, text in zip(arrays, texts, strict=True)]


def _answer(logits: np.ndarray, manifest: Manifest) -> str:
    """Eager PyTorch's answer to an image, if it is a class."""
    head, labels = manifest.recipe.output.head, manifest.recipe.labels
    if head.task != "classification" or logits.ndim != 1:
        return ""
    best = int(logits.argmax())
    return labels[best] if best < len(labels) else f"class {best}"
