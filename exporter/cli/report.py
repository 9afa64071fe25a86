"""`export-zoo report`: what a bundle or a matrix run is and measured, as a page or as Markdown. Runs nothing."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from export_zoo.exporter.cli import outcome
from export_zoo.exporter.cli.common_options import (
    EXIT_CODES,
    html_option,
    json_option,
    quiet_option,
    verbose_option,
)
from export_zoo.exporter.run.report import ConsoleReporter


@click.command(epilog=EXIT_CODES)
@click.argument("place", type=click.Path(path_type=Path), metavar="BUNDLE|MATRIX")
@html_option("Write a page with pictures and plots")
@click.option(
    "--markdown",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write Markdown, a model card, here. Without --html and --markdown, it is printed.",
)
@json_option
@quiet_option
@verbose_option
def report(
    place: Path, html: Path | None, markdown: Path | None, json_path: Path | None, quiet: bool, verbose: bool
) -> None:
    """Say what BUNDLE is: preprocessing, parity, speed, size, tuning and attestations; or the results of MATRIX.

    MATRIX is the directory that `export-zoo matrix --out` wrote. Needs no PyTorch.
    """
    del verbose
    now = outcome.current()
    now.reporter = reporter = ConsoleReporter(quiet=quiet)
    from export_zoo.base.errors import BadInputError
    from export_zoo.exporter.matrix import BUNDLES, RESULTS
    from export_zoo.exporter.page import card as page
    from export_zoo.exporter.page import plots
    from export_zoo.exporter.page.files import check_writable, write

    is_matrix = (place / RESULTS).is_dir()
    for option, path in (("--html", html), ("--markdown", markdown)):
        for kept in (place / RESULTS, place / BUNDLES) if is_matrix else (place,):
            if path is not None:
                check_writable(path, option, kept, [json_path, markdown if path is html else None])
    if is_matrix:
        from export_zoo.exporter.matrix import report as matrix_report
        from export_zoo.exporter.matrix.results import stored, unreadable

        read = stored(place / RESULTS)
        for name in unreadable(place / RESULTS, read):
            reporter.warn(f"{place / RESULTS / name}: cannot be read, and is left out")
        if not read:
            raise BadInputError(f"{place / RESULTS}: has no results", hint="run `export-zoo matrix` first")
        results, title = list(read.values()), f"Matrix {place.resolve().name}"
        now.document |= {"matrix": str(place), "cells": [asdict(result) for result in results]}
        text = matrix_report.markdown(results, title)
        whole = matrix_report.html(results, title) if html is not None else ""
    else:
        if not (place / "manifest.json").is_file():
            raise BadInputError(
                f"{place}: neither a bundle nor the results of a matrix",
                hint="pass the directory that `export-zoo export` or `export-zoo matrix --out` wrote",
            )
        if html is not None:
            plots.check()
        card = page.card_of(place)
        now.document |= {"bundle": str(place), "card": asdict(card)}
        text = page.markdown(card)
        whole = page.html(card, place) if html is not None else ""
    if html is not None:
        write(html, whole, "--html")
        now.document |= {"html": str(html)}
    if markdown is not None:
        write(markdown, text, "--markdown")
        now.document |= {"markdown": str(markdown)}
    if html is None and markdown is None and not quiet:
        click.echo(text, nl=False)
