"""The card of a bundle: what it is and what was measured, as a page or as Markdown. Runs nothing.

Its contents follow Mitchell et al. 2019, "Model Cards for Model Reporting" (arXiv 1810.03993).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export_zoo.engines.bundle import reader
from export_zoo.engines.bundle.manifest import Attestation, Engine, Latency, Manifest
from export_zoo.engines.parity.intervals import accuracy, described
from export_zoo.engines.parity.limits import limits_of
from export_zoo.engines.parity.tasks import headline
from export_zoo.engines.precision.registry import BASELINE, PRECISIONS
from export_zoo.exporter.options import keep_float_option
from export_zoo.exporter.page import plots, preprocessing
from export_zoo.exporter.page.facts import facts, results
from export_zoo.exporter.page.templates import render, thumbnail
from export_zoo.exporter.run.report import RANDOM

PICTURES = 6
"""Number of held-out images on the page."""


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
    """The contents of a card, as texts."""

    title: str
    facts: dict[str, str]
    warnings: list[str]
    usage: dict[str, str]
    """Code that loads it and runs an image, by language."""
    preprocessing: list[str]
    tables: list[Table]


def card_of(bundle: Path) -> Card:
    """The card of a bundle.

    Raises:
        BadInputError: not a bundle, or damaged.
    """
    manifest = reader.read_manifest(bundle)
    reader.check_files(bundle, manifest)  # a page that says "verified" should not be of a damaged file
    attested = reader.attestations(bundle)
    recipe, engines = manifest.recipe, manifest.artifacts.engines
    warnings = [] if manifest.status == "ok" else ["failed when it was exported: do not use it"]
    warnings += [f"{engine.name}: {text}" for engine in engines for text in engine.gate.failures]
    warnings += [RANDOM] if recipe.source.weights.random else []
    warnings += manifest.warnings
    warnings += [f"{refused.name}: not built: {refused.reason}" for refused in manifest.artifacts.refused]
    warnings += [f"{name}: this version does not know it" for name in manifest.unknown_engines]
    warnings += [f"{name}: cannot be read, and is left out" for name in attested.unreadable]
    tables = [
        _parity(manifest),
        _gates(engines),
        _speed(manifest, attested.by_file),
        _layers_in_float(manifest),
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
        warnings=list(dict.fromkeys(warnings)),
        usage=_usage(bundle, manifest),
        preprocessing=preprocessing.steps(recipe.preprocess),
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
        stages=preprocessing.pictures(manifest.recipe.preprocess),
        images=[
            (thumbnail(pixels), _answer(logits, manifest))
            for pixels, logits in zip(held.pixels[:PICTURES], held.logits[:PICTURES], strict=True)
        ],
    )


def markdown(card: Card) -> str:
    """The card as Markdown."""
    return render("card.md.jinja", title=card.title, card=card)


def _usage(bundle: Path, manifest: Manifest) -> dict[str, str]:
    place, p = json.dumps(bundle.resolve().name, ensure_ascii=False), manifest.recipe.preprocess
    failed = manifest.status != "ok"
    what = "failed: for inspection only" if failed else "the fastest verified engine"
    python = [
        "import export_zoo",
        "",
        f"engine = export_zoo.load({place}{', allow_failed=True' if failed else ''})  # {what}",
        f'logits = engine.run(engine.preprocess(["{"image.tif" if p.keeps_values else "image.jpg"}"]))',
    ]
    found = {"python": "\n".join(python)}
    if not failed and not p.keeps_values:
        found["cpp"] = f"const auto engine = export_zoo::Engine::load({place});"
    return found


def _parity(manifest: Manifest) -> Table:
    engines, held = manifest.artifacts.engines, manifest.artifacts.held_out
    title, shares = headline(engines[0].gate.eager_metrics)[0], described(engines[0].gate.eager_metrics)
    random = manifest.recipe.source.weights.random
    images = int(engines[0].gate.metrics.get("images") or held.count)
    return Table(
        "Parity with eager PyTorch",
        f"On {images} {'synthetic' if held.synthetic else 'held-out'} images."
        + (" Shares have their 95 % interval (Wilson 1927)." if shares else ""),
        ("engine", "state", "SQNR dB", title, "accuracy", "worst test pattern dB"),
        [
            (
                engine.name,
                "FAILED" if engine.gate.failures else engine.state,
                _figure(engine.gate.eager_metrics.get("sqnr"), ".1f"),
                headline(engine.gate.eager_metrics)[1] + described(engine.gate.eager_metrics),
                accuracy(engine.gate.eager_metrics) or "-",
                "-" if random else _figure(min(engine.gate.patterns.values(), default=None), ".1f"),
            )
            for engine in engines
        ],
        names=2,
    )


def _gates(engines: Sequence[Engine]) -> Table:
    return Table(
        "Gates",
        "What each engine was compared with, and the limits that it had to keep.",
        ("engine", "ran", "compared with", "limits", "batches", "further sizes"),
        [
            (
                engine.name,
                engine.gate.ran,
                engine.gate.reference,
                ", ".join(map(str, limits_of(engine.gate.tolerances))),
                ", ".join(map(str, engine.gate.batches)),
                ", ".join(f"{height}x{width}" for height, width in engine.gate.sizes) or "-",
            )
            for engine in engines
        ],
        names=6,
    )


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _speed(manifest: Manifest, attested: dict[str, Attestation]) -> Table:
    def row(name: str, latency: Latency, when: str) -> tuple[str, ...]:
        figures = (f"{latency.median_ms:.2f}", f"{latency.fp32_median_ms:.2f}", f"{latency.speedup:.2f}x")
        return (name, latency.machine, when[:10], str(latency.batch), *figures)

    made, engines = manifest.artifacts.created, manifest.artifacts.engines
    rows = [row(engine.name, engine.latency, made) for engine in engines if engine.latency is not None]
    rows += [
        row(name, found, one.created) for one in attested.values() for name, found in one.latencies.items()
    ]
    return Table(
        "Speed",
        "Median latency of a batch, in turn with the FP32 graph in ONNX Runtime, on all threads: at the export, and by "
        "export-zoo verify. Engines that did not run there have none. export-zoo bench measures more on your machine.",
        ("engine", "machine", "when", "batch", "ms", "FP32 ms", "vs FP32"),
        rows,
        names=3,
    )


def _layers_in_float(manifest: Manifest) -> Table:
    recipe, engines = manifest.recipe, manifest.artifacts.engines

    def reasons(engine: Engine) -> Iterator[tuple[str, Sequence[str]]]:
        if engine.precision != BASELINE.name:
            quantized = PRECISIONS[engine.precision].quantized
            patterns = recipe.keep_float if quantized else recipe.keep_float_fp16
            yield f"asked for ({keep_float_option(quantized=quantized)})", patterns
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
        "Choices, in this order, on images that are used neither to calibrate nor to verify. A gain over the default "
        "counts if it is more than chance. Methods are tried again where other steps have changed the graph.",
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
                results(one),
            )
            for one in attested.values()
        ],
        names=4,
    )


def _answer(logits: np.ndarray, manifest: Manifest) -> str:
    """Eager PyTorch's answer to an image, if it is a class."""
    head, labels = manifest.recipe.output.head, manifest.recipe.labels
    if head.task != "classification" or logits.ndim != 1:
        return ""
    best = int(logits.argmax())
    return labels[best] if best < len(labels) else f"class {best}"
