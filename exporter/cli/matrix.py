"""`export-zoo matrix FILE`: many models, precisions, targets and CPUs in one run."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from export_zoo.base.errors import ExportZooError, ParityError, UsageError
from export_zoo.exporter.cli import outcome
from export_zoo.exporter.cli.common_options import (
    EXIT_CODES,
    LOCAL,
    connector,
    json_option,
    on_option,
    quiet_option,
    verbose_option,
)
from export_zoo.exporter.cli.export import read_arguments
from export_zoo.exporter.run.at_once import CORES_EACH

if TYPE_CHECKING:
    from collections.abc import Callable

    from export_zoo.exporter.matrix.place import Place
    from export_zoo.exporter.matrix.plan import Cell


class CellsFailedError(ExportZooError):
    """Cells of a matrix failed, but no parity gate failed."""

    exit_code = 5
    kind = "matrix"


def _place(text: str, jobs: str | None) -> Callable[[], Place]:
    """Makes the place of --on and --jobs, which are checked before any work."""
    connect = connector(text)
    if connect is None:
        at_once = _jobs("1" if jobs is None else jobs)

        def machine() -> Place:
            from export_zoo.exporter.matrix.machine import Machine

            return Machine(at_once)

        return machine
    if jobs is not None:
        raise UsageError(
            f"--jobs has no effect with --on {text}", hint="leave it out: the cluster's size decides"
        )

    def cluster() -> Place:
        from export_zoo.exporter.matrix.cluster_place import ClusterPlace

        return ClusterPlace(connect(), cores=CORES_EACH)

    return cluster


def _jobs(text: str) -> int:
    from export_zoo.exporter.matrix.machine import automatic_jobs

    if text == "auto":
        return automatic_jobs()
    if not re.fullmatch("[1-9][0-9]{0,3}", text):
        raise UsageError(f"--jobs {text}: not a number of cells, or auto", hint="for example --jobs 2")
    return int(text)


def _expected(cell: Cell) -> int:
    from export_zoo.exporter.matrix.expected_memory import expected_memory
    from export_zoo.exporter.matrix.plan import HOST
    from export_zoo.exporter.models.memory import UNKNOWN

    return expected_memory(read_arguments(cell.command()[1:])) if cell.cpu == HOST else UNKNOWN


@click.command(epilog=EXIT_CODES)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("matrix"),
    show_default=True,
    metavar="DIR",
    help="Directory for results and bundles. A second run continues where the first ended.",
)
@click.option(
    "--job",
    metavar="GLOB",
    help="Run only the cells of this job of the file, or of the jobs that a glob matches.",
)
@on_option("cells")
@click.option(
    "--jobs",
    metavar="N|auto",
    help="With --on local: number of cells that run at once, if their memory allows; each gets its part of the cores. "
    "auto: one for each two cores. Latencies are disturbed then. Default: 1.",
)
@click.option("--again", is_flag=True, help="Re-run finished cells.")
@click.option(
    "--stored",
    is_flag=True,
    help="Run nothing: report the results in --out, whatever versions they were made with.",
)
@click.option("--no-bundles", is_flag=True, help="Delete each bundle when its result is recorded.")
@click.option(
    "--storage",
    "uri",
    metavar="URI",
    help="Copy results and bundles there, too, as they come, and use the results that are there: s3://BUCKET/FOLDER, "
    "or any other URI that fsspec knows.",
)
@click.option(
    "--junit", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write JUnit XML here."
)
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write an HTML page here."
)
@click.option(
    "--markdown",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write a Markdown page here.",
)
@click.option("--github", is_flag=True, help="Run nothing: print the jobs as JSON for `strategy.matrix`.")
@click.option(
    "--slurm",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Run nothing: write an array script for Slurm's sbatch here, with a task for each bundle.",
)
@click.option(
    "--part",
    type=click.IntRange(0),
    metavar="N",
    help="Run only the cells of the N-th bundle, counted from 0, as a task of that script does.",
)
@click.option("--dry-run", is_flag=True, help="Run nothing: print the cells' command lines.")
@json_option
@quiet_option
@verbose_option
def matrix(
    file: Path,
    out: Path,
    job: str | None,
    place: str,
    jobs: str | None,
    again: bool,
    stored: bool,
    no_bundles: bool,
    uri: str | None,
    junit: Path | None,
    html: Path | None,
    markdown: Path | None,
    github: bool,
    slurm: Path | None,
    part: int | None,
    dry_run: bool,
    json_path: Path | None,
    quiet: bool,
    verbose: bool,
) -> None:
    """Export each cell of the matrix in FILE (models x precisions x targets x CPUs).

    A failing cell does not stop the others. Exit code 3 if any parity gate failed, else 5 if any cell failed.
    """
    del json_path, verbose
    from export_zoo.exporter.matrix import BUNDLES, RESULTS, plan, report, run
    from export_zoo.exporter.matrix import slurm as slurm_script
    from export_zoo.exporter.matrix.cell import arguments
    from export_zoo.exporter.matrix.results import CellResult
    from export_zoo.exporter.matrix.results import stored as stored_results
    from export_zoo.exporter.matrix.storage import Storage
    from export_zoo.exporter.models.sources import torchvision_zoo
    from export_zoo.exporter.page.files import write

    if slurm is not None:
        for option, given_too in (
            ("--part", part is not None),
            ("--jobs", jobs is not None),
            ("--on", place != LOCAL),
        ):
            if given_too:
                raise UsageError(
                    f"--slurm excludes {option}", hint="leave it out: each task of the array is a part"
                )
    chosen, storage = _place(place, jobs), Storage(uri) if uri is not None else None
    given = plan.read(file)
    names = plan.Names(torchvision_zoo.model_names(), torchvision_zoo.segmentation_names())
    cells = plan.cells(file, given, names, read_arguments, job)
    if part is not None:
        cells = slurm_script.part_of(cells, part)
    if slurm is not None:
        options = [f"--job={job}"] * (job is not None) + [f"--storage={uri}"] * (uri is not None)
        options += ["--again"] * again + ["--no-bundles"] * no_bundles
        array = slurm_script.script(
            cells,
            file,
            out,
            options=options,
            seconds=given.timeout,
            memory=given.memory,
            cores=CORES_EACH,
            expected=_expected,
        )
        run.make_folders(out)  # Slurm opens the log there before a task begins
        write(slurm, array, "--slurm")
        if not quiet:
            click.echo(f"{slurm}: {len(plan.by_bundle(cells))} task(s); next: sbatch {slurm}")
        return
    if github:
        click.echo(json.dumps(plan.github(given, file, job)))
        return
    if dry_run:
        for cell in cells:
            left_out = run.left_out(cell)
            if left_out.reason:
                click.echo(f"{left_out.status}: {cell.name}: {left_out.reason}")
            else:
                bundle = out / BUNDLES / cell.bundle
                click.echo(shlex.join(["export-zoo", *arguments(cell, bundle)]))
        return
    shown = 0

    def done(result: CellResult, cached: bool) -> None:
        nonlocal shown
        shown += 1
        if not quiet:
            click.echo(report.line(result, shown, len(cells), cached), err=True)

    if stored:
        if storage is not None:
            run.make_folders(out)
            storage.fetch_results(out / RESULTS)
        known = stored_results(out / RESULTS)
        found = [
            run.left_out(cell) if cell.excluded or cell.skipped else known.get(cell.name) for cell in cells
        ]
        results = [result for result in found if result is not None]
        if all(result.status in ("excluded", "skipped") for result in results):
            raise UsageError(
                f"--stored: {out / 'results'} has no results for these cells", hint="run them first"
            )
    else:
        results = run.run(
            cells,
            out,
            seconds=given.timeout,
            memory=given.memory,
            place=chosen(),
            expected=_expected,
            again=again,
            keep_bundles=not no_bundles,
            storage=storage,
            done=done,
        )
    lines = {cell.name: tuple(cell.command()) for cell in cells}
    others = [result.name for result in results if result.command != lines[result.name]]
    title = f"Matrix {file.name}" + (f", job {job}" if job else "")
    missing = len(cells) - len(results)
    about = (
        f"Made by `export-zoo matrix {file}` from the results in `{out / 'results'}`, one JSON file per cell."
    )
    if others:
        about += f" Made with other options than the file has now: {', '.join(others)}."
        click.echo(
            f"warning: {len(others)} result(s) were made with other options than {file} has now", err=True
        )
    outcome.current().document |= {"out": str(out), "cells": [asdict(result) for result in results]}
    for option, path, text in (
        ("--junit", junit, report.junit),
        ("--html", html, lambda found: report.html(found, title)),
        ("--markdown", markdown, lambda found: report.markdown(found, title, missing, about)),
    ):
        if path is not None:
            write(path, text(results), option)
    if not quiet:
        with outcome.printing():
            report.print_summary(results)
            click.echo(report.totals(results) + (f", {missing} not run" if missing else ""))
    if failed := [result for result in results if result.status == "failed"]:
        gates = [result.name for result in failed if result.gate]
        hint = f"the reasons are above and in {out / 'results'}; bundles of failed gates in {out / BUNDLES}"
        if gates:
            raise ParityError(f"{file}: parity gate failed: {', '.join(gates)}", hint=hint)
        missed = ", ".join(result.name for result in failed)
        raise CellsFailedError(f"{file}: {len(failed)} of {len(results)} cells failed: {missed}", hint=hint)
