"""`export-zoo export MODEL`, the main command. Imports PyTorch only when it runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from export_zoo.base.errors import UsageError
from export_zoo.exporter.cli import outcome
from export_zoo.exporter.cli.common_options import (
    EXIT_CODES,
    connector,
    given_options,
    json_option,
    on_option,
    option_name,
    quiet_option,
    verbose_option,
)
from export_zoo.exporter.cli.option_table import OPTIONS, SectionedCommand, add, export_options
from export_zoo.exporter.run.report import ConsoleReporter, show_log

if TYPE_CHECKING:
    from export_zoo.exporter.options import ExportOptions
    from export_zoo.exporter.pipeline import ExportResult


@click.command(cls=SectionedCommand, epilog=EXIT_CODES)
@click.argument("model")
@add(OPTIONS)
@on_option("shards of images")
@json_option
@quiet_option
@verbose_option
def export(model: str, place: str, json_path: Path | None, quiet: bool, verbose: bool, **given: Any) -> None:
    """Export MODEL, build its engines, and check their logits against eager PyTorch."""
    if verbose:
        show_log()
    from export_zoo.engines.precision.registry import QUANTIZED
    from export_zoo.engines.targets import registry

    chosen, connect = export_options(model, given), connector(place)
    if json_path is not None and chosen.out_dir.resolve() in json_path.resolve().parents:
        raise UsageError(f"--json {json_path}: lies inside the bundle", hint="write it beside --out")
    now = outcome.current()
    now.reporter = ConsoleReporter(quiet=quiet)
    if not chosen.quantizes:
        for name in sorted(
            given_options() & {"method", "steps", "effort"}
        ):  # the pipeline cannot tell them from their defaults
            now.reporter.warn(f"{option_name(name)} has no effect without --precision {QUANTIZED}")
    registry.choose_for(chosen.targets, chosen.build, chosen.precisions)  # before PyTorch is loaded
    from export_zoo.exporter import pipeline

    cluster = connect() if connect is not None else None
    try:
        result = pipeline.export(chosen, reporter=now.reporter, cluster=cluster)
    except pipeline.KeptError as error:
        now.document |= _described(error.result.bundle, error.result.manifest)
        if not quiet:
            with outcome.printing():
                _print(error.result)
        raise
    now.document |= _described(result.bundle, result.manifest)
    if not quiet:
        _print(result)
    del json_path


def _print(result: ExportResult) -> None:
    from export_zoo.exporter.run.report import print_table

    artifacts, random = result.manifest.artifacts, result.manifest.recipe.source.weights.random
    print_table(artifacts.engines, artifacts.refused, random=random)


def _described(bundle: Path, manifest: Any) -> dict[str, Any]:
    document = manifest.model_dump(mode="json")
    artifacts = document["artifacts"]
    return {
        "bundle": str(bundle),
        "engines": artifacts["engines"],
        "refused": artifacts["refused"],
        "recipe": document["recipe"],
    }


def read_arguments(arguments: Sequence[str]) -> ExportOptions:
    """The options of a command line of `export-zoo export`, which is not run. Raises UsageError if it is wrong."""
    try:
        context = export.make_context("export", list(arguments))
    except click.UsageError as error:
        raise UsageError(
            error.format_message(), hint="`export-zoo export --help` shows the options"
        ) from error
    return export_options(context.params["model"], context.params)
