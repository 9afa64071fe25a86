"""`export-zoo diagnose`: which layers cost an engine its accuracy. Imports PyTorch only to export a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from export_zoo.base.errors import BadInputError, UsageError
from export_zoo.engines.precision.registry import BASELINE, PRECISIONS
from export_zoo.exporter.cli import outcome
from export_zoo.exporter.cli.common_options import (
    EXIT_CODES,
    given_options,
    html_option,
    json_option,
    option_name,
    quiet_option,
    verbose_option,
)
from export_zoo.exporter.cli.option_table import OPTIONS, SectionedCommand, add, export_options
from export_zoo.exporter.options import keep_float_option
from export_zoo.exporter.run.report import ConsoleReporter, make_console, show_log

if TYPE_CHECKING:
    from export_zoo.engines.diagnosis.diagnose import Diagnosis
    from export_zoo.exporter.options import ExportOptions

SHOWN = 10
"""Number of layers in the table."""


@click.command(cls=SectionedCommand, epilog=EXIT_CODES)
@click.argument("what", metavar="BUNDLE|MODEL")
@click.option(
    "--engine",
    metavar="NAME",
    help="Engine to diagnose. Default: the one with the lowest SQNR that is not FP32.",
)
@click.option(
    "--images",
    type=click.IntRange(4),
    default=32,
    show_default=True,
    metavar="N",
    help="Held-out images to judge layers on.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0),
    default=600,
    show_default=True,
    metavar="S",
    help="Use fewer images if it would take longer, 4 at least.",
)
@html_option("Write a page with plots and the images that go wrong")
@add(OPTIONS)
@json_option
@quiet_option
@verbose_option
def diagnose(
    what: str,
    engine: str | None,
    images: int,
    seconds: float,
    html: Path | None,
    json_path: Path | None,
    quiet: bool,
    verbose: bool,
    **given: Any,
) -> None:
    """Say which layers cost an INT8 or FP16 engine its accuracy, and why.

    Rounds one layer at a time and measures what that does to the outputs. Takes a bundle, also one that failed its gate
    (OUT.failed), without PyTorch; or MODEL with options of `export`, which is exported first.
    """
    if verbose:
        show_log()
    now = outcome.current()
    now.reporter = reporter = ConsoleReporter(quiet=quiet)
    from export_zoo.engines.bundle.reader import read_manifest
    from export_zoo.engines.diagnosis.diagnose import diagnose as run
    from export_zoo.exporter.page import diagnosis as page
    from export_zoo.exporter.page import plots
    from export_zoo.exporter.page.files import check_writable, write

    of_export = sorted(given_options() & given.keys())
    bundle = Path(what)
    if of_export and bundle.is_dir():
        raise UsageError(
            f"{', '.join(map(option_name, of_export))}: no effect on {what}, which is exported already",
            hint="leave it out, or give the model",
        )
    if not of_export and not bundle.exists():
        raise BadInputError(
            f"{what}: there is no such bundle", hint="to diagnose a model, add --precision int8 --calib DIR"
        )
    chosen = export_options(what, given) if of_export else None
    if html is not None:
        plots.check()
        check_writable(html, "--html", chosen.out_dir if chosen is not None else bundle, [json_path])
    if chosen is not None:
        bundle = _exported(chosen, reporter)
    if read_manifest(bundle).recipe.source.weights.random:
        raise _random(str(bundle))
    with reporter.stage("diagnose") as stage, reporter.bar(f"layers of {bundle.name}", None) as advance:
        found = run(bundle, engine, images=images, seconds=seconds, progress=advance)
        stage.detail = f"{found.engine}: {len(found.layers)} layers on {found.images} images"
    if found.images < images and given_options() & {"images", "seconds"}:
        reporter.warn(
            f"{found.images} images are used: --seconds and the bundle's held-out images allow no more"
        )
    now.document |= {"diagnosis": found.model_dump(mode="json")}
    if html is not None:
        write(html, page.html(found, bundle), "--html")
        now.document |= {"html": str(html)}
    if not quiet:
        with outcome.printing():
            _print(found)


def _exported(chosen: ExportOptions, reporter: ConsoleReporter) -> Path:
    """The bundle of an export, whether its gates pass or not. Raises ExportZooError if there is none."""
    if all(PRECISIONS[name] is BASELINE for name in chosen.precisions):
        raise UsageError(
            f"{', '.join(chosen.precisions)}: rounds nothing", hint="add --precision int8 or --precision fp16"
        )
    if chosen.weights == "none":
        raise _random(chosen.model)
    from export_zoo.exporter import pipeline

    try:
        return pipeline.export(chosen, reporter=reporter, explain=False).bundle
    except pipeline.KeptError as error:  # the diagnosis says why
        reporter.warn(error.message)
        return error.result.bundle


def _random(what: str) -> UsageError:
    return UsageError(
        f"{what}: has random weights, whose errors say nothing about layers",
        hint="export trained weights, and diagnose that bundle",
    )


def _print(found: Diagnosis) -> None:
    from rich.table import Table

    from export_zoo.exporter.page.templates import decibels

    layers = {layer.name: layer for layer in found.layers}
    table = Table(box=None, header_style="bold")
    table.add_column("layer", overflow="fold")
    for title in (
        "alone dB",
        "share %",
        "weights dB",
        "clipping dB",
        "rounding dB",
        "so far dB",
        "size %",
        "time %",
    ):
        table.add_column(title, justify="right")
    for name in found.worst[:SHOWN]:
        layer = layers[name]
        time = None if layer.ms is None or not found.ms else 100 * layer.ms / found.ms
        table.add_row(
            f"{layer.module} ({layer.operator})",
            decibels(layer.sqnr),
            f"{100 * layer.share:.1f}",
            *map(decibels, (layer.weights, layer.clipping, layer.rounding, layer.along)),
            f"{100 * layer.bytes / found.bytes:.1f}",
            "-" if time is None else f"{time:.1f}",
        )
    make_console().print(table)
    limit = f" (limit {found.limit:g})" if found.limit is not None else ""
    click.echo(f"{found.engine}: {found.sqnr:.1f} dB on {found.images} images{limit}")
    curve = ", ".join(f"{step.layers}: {step.sqnr:.1f} dB" for step in found.mended[1:-1])
    if curve:
        click.echo(f"with the first of these layers in float: {curve}")
    option = keep_float_option(quantized=found.quantized)
    click.echo(f"to leave the first one float, too: {option} {layers[found.worst[0]].module}")
    click.echo("to leave float as many as an accuracy needs: export-zoo ... --aim METRIC=VALUE")
