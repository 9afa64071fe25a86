"""`export-zoo bench`: latency and throughput of a bundle's engines on this machine. Never imports PyTorch."""

from __future__ import annotations

import math
from pathlib import Path

import click

from export_zoo.base.errors import UsageError
from export_zoo.exporter.cli import outcome
from export_zoo.exporter.cli.common_options import (
    EXIT_CODES,
    html_option,
    json_option,
    quiet_option,
    verbose_option,
)
from export_zoo.exporter.run.report import ConsoleReporter, make_console

_COUNT, _COPIES = click.IntRange(1, 4096), click.IntRange(1, 256)


@click.command(epilog=EXIT_CODES)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--engine", "engines", multiple=True, metavar="NAME", help="Engine to run. Repeatable. Default: all."
)
@click.option(
    "--batch",
    "batches",
    type=_COUNT,
    multiple=True,
    metavar="N",
    help="Batch size. Repeatable. Default: the bundle's MIN, OPT and MAX.",
)
@click.option(
    "--threads",
    type=_COPIES,
    multiple=True,
    metavar="N",
    help="Threads of each stream. Repeatable. Default: 1, and the number of cores.",
)
@click.option(
    "--streams",
    type=_COPIES,
    multiple=True,
    metavar="N",
    help="Copies of an engine that run at once. Repeatable. Default: 1, and as many as use all cores.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.05, 3600),
    default=2.0,
    show_default=True,
    metavar="S",
    help="Time for each engine in each setting.",
)
@html_option("Write a page with a plot")
@json_option
@quiet_option
@verbose_option
def bench(
    bundle: Path,
    engines: tuple[str, ...],
    batches: tuple[int, ...],
    threads: tuple[int, ...],
    streams: tuple[int, ...],
    seconds: float,
    html: Path | None,
    json_path: Path | None,
    quiet: bool,
    verbose: bool,
) -> None:
    """Measure latency and throughput of a bundle's engines over batch sizes, threads and streams.

    All run in turn with FP32 of ONNX Runtime, on the bundle's held-out images. Let nothing else run. Needs no PyTorch.
    """
    del verbose
    now = outcome.current()
    now.reporter = reporter = ConsoleReporter(quiet=quiet)
    from export_zoo.engines.bundle.reader import read_manifest
    from export_zoo.engines.verification.throughput import measure, settings
    from export_zoo.exporter.page import plots
    from export_zoo.exporter.page import throughput as page
    from export_zoo.exporter.page.files import check_writable, write

    if html is not None:
        plots.check()
        check_writable(html, "--html", bundle, [json_path])
    manifest = read_manifest(bundle)
    if not math.isfinite(seconds):  # click takes nan
        raise UsageError(f"--seconds {seconds}: not a finite number", hint="for example 2")
    allowed = manifest.recipe.batch
    for size in batches:
        if not allowed.min <= size <= allowed.max:
            raise UsageError(
                f"--batch {size}: the bundle takes {allowed.min} to {allowed.max}",
                hint="give another, or export with a wider --batch MIN:OPT:MAX",
            )
    chosen = settings(allowed, batches, threads, streams)
    with reporter.stage("bench") as stage, reporter.bar(f"settings of {bundle.name}", len(chosen)) as advance:
        found = measure(bundle, chosen, engines=engines, seconds=seconds, progress=advance)
        stage.detail = f"{len(chosen)} setting{'s' if len(chosen) != 1 else ''} on {found.machine}"
    failed = [engine.name for engine in manifest.artifacts.engines if engine.gate.failures]
    if failed:
        reporter.warn(f"{', '.join(failed)}: outside the tolerance when it was exported: do not use it")
    for name, why in found.left_out.items():
        reporter.warn(f"{name} does not run here: {why}")
    now.document |= {"throughput": found.model_dump(mode="json")}
    if html is not None:
        write(html, page.html(found, f"{manifest.recipe.source.name}: latency and throughput"), "--html")
        now.document |= {"html": str(html)}
    if not quiet:
        from rich.table import Table

        with outcome.printing():
            table = Table(box=None, header_style="bold")
            for column in ("engine", *page.COLUMNS):
                table.add_column(column, justify="left" if column == "engine" else "right")
            for point in found.points:
                table.add_row(*page.row(point))
            make_console().print(table)
            for text in page.answers(found):
                click.echo(text)
