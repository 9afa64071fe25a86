"""`export-zoo export MODEL`, the main command. Imports PyTorch only when it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from export_zoo.base.errors import UsageError
from export_zoo.exporter import options
from export_zoo.exporter.cli import outcome
from export_zoo.exporter.cli.common_options import (
    EXIT_CODES,
    given_options,
    json_option,
    keep_float_option,
    model_options,
    option_name,
    quiet_option,
    verbose_option,
)
from export_zoo.exporter.run.report import ConsoleReporter, show_log


def chosen_options(given: Mapping[str, Any]) -> options.ExportOptions:
    """Make `ExportOptions` from the command's parameters. Raises UsageError."""
    from export_zoo.engines.targets.options import BuildOptions

    return options.ExportOptions(
        model=given["model"],
        precisions=tuple(given["precisions"]) or ("fp32",),
        targets=tuple(given["targets"]) or ("auto",),
        **options.model_options(given),
        ranges=given["ranges"],
        batch=options.BatchRange.parse(given["batch"]),
        tolerances=tuple(options.Tolerance.parse(text) for text in given["tolerances"]),
        require=given["require"],
        method=given["method"],
        steps=options.parse_steps(given["steps"]),
        keep_float=tuple(given["keep_float"]),
        build=BuildOptions(
            workspace_mb=given["workspace_mb"],
            refittable=given["refittable"],
            strip_weights=given["strip_weights"],
            hardware_compatible=given["hardware_compatible"],
            version_compatible=given["version_compatible"],
            compute_capabilities=tuple(given["compute_capabilities"]),
            timing_cache=given["timing_cache"],
        ),
        out=given["out"],
    )


@click.command(epilog=EXIT_CODES)
@click.argument("model")
@click.option(
    "--precision", "precisions", multiple=True, metavar="fp32|fp16|int8", help="Repeatable. Default: fp32."
)
@model_options
@click.option(
    "--ranges",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Ranges file of `export-zoo calibrate`, used instead of calibrating.",
)
@click.option(
    "--batch",
    default=options.DEFAULT_BATCH,
    show_default=True,
    metavar="MIN:OPT:MAX",
    help="Batch sizes to accept; engines are tuned and timed at OPT.",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="NAME",
    help="onnxruntime, tensorrt, tensorrt-rtx or auto. Repeatable. Default: auto, all that is available here.",
)
@click.option(
    "--tolerance",
    "tolerances",
    multiple=True,
    metavar="[TARGET:]METRIC=VALUE",
    help="Limit of the parity gate. Repeatable. Defaults by precision: docs/parity.md.",
)
@click.option(
    "--require",
    default="graph",
    show_default=True,
    metavar="graph|verified",
    help="State that every engine must reach.",
)
@click.option(
    "--method",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="Method for INT8 ranges: minmax, percentile, entropy, mse, or auto (the best of them on the select images).",
)
@click.option(
    "--steps",
    default=",".join(options.STEPS),
    show_default=True,
    metavar="NAMES",
    help="Steps to try to improve INT8: names separated by commas, or none.",
)
@keep_float_option
@click.option(
    "--workspace",
    "workspace_mb",
    type=int,
    metavar="MIB",
    help="TensorRT: maximum scratch memory on the device, in MiB. Default: all of it.",
)
@click.option("--refittable", is_flag=True, help="TensorRT: weights can be replaced later.")
@click.option("--strip-weights", is_flag=True, help="TensorRT: plan without weights, to be refitted.")
@click.option("--hardware-compatible", is_flag=True, help="tensorrt: runs on GPUs from Ampere on.")
@click.option("--version-compatible", is_flag=True, help="tensorrt: runs with later versions, too.")
@click.option(
    "--compute-capability",
    "compute_capabilities",
    multiple=True,
    metavar="X.Y",
    help="tensorrt-rtx: GPUs to build for; `current`: this one. Repeatable. Default: 8.0, 8.6, 8.9 and 12.0.",
)
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="tensorrt: `.timing` file of an earlier bundle, to choose the same kernels again.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Directory of the bundle. Default: ./MODEL.bundle.",
)
@json_option
@quiet_option
@verbose_option
def export(model: str, json_path: Path | None, quiet: bool, verbose: bool, **given: Any) -> None:
    """Export MODEL, build its engines, and check their logits against eager PyTorch."""
    if verbose:
        show_log()
    from export_zoo.engines.targets import registry

    chosen = chosen_options({"model": model, **given})
    if json_path is not None and chosen.out_dir.resolve() in json_path.resolve().parents:
        raise UsageError(f"--json {json_path}: lies inside the bundle", hint="write it beside --out")
    now = outcome.current()
    now.reporter = ConsoleReporter(quiet=quiet)
    if "int8" not in given["precisions"]:
        for name in sorted(
            given_options() & {"method", "steps"}
        ):  # the pipeline cannot tell them from their defaults
            now.reporter.warn(f"{option_name(name)} has no effect without --precision int8")
    chosen_targets = registry.choose(chosen.targets)
    registry.check_options(chosen.build, chosen_targets)  # before PyTorch is loaded
    registry.check_precisions(chosen.precisions, chosen_targets)
    from export_zoo.exporter import pipeline
    from export_zoo.exporter.run.report import print_table

    try:
        result = pipeline.export(chosen, reporter=now.reporter)
    except pipeline.KeptError as error:
        now.document |= _described(error.result.bundle, error.result.manifest)
        if not quiet:
            with outcome.printing():
                print_table(error.result.engines, random=error.result.manifest.recipe.source.weights.random)
        raise
    now.document |= _described(result.bundle, result.manifest)
    if not quiet:
        print_table(result.engines, random=result.manifest.recipe.source.weights.random)
    del json_path


def _described(bundle: Path, manifest: Any) -> dict[str, Any]:
    document = manifest.model_dump(mode="json")
    return {"bundle": str(bundle), "engines": document["artifacts"]["engines"], "recipe": document["recipe"]}


def check_arguments(arguments: Sequence[str]) -> None:
    """Read a command line of `export-zoo export`, without running it. Raises UsageError if it is wrong."""
    try:
        context = export.make_context("export", list(arguments))
    except click.UsageError as error:
        raise UsageError(
            error.format_message(), hint="`export-zoo export --help` shows the options"
        ) from error
    chosen_options(context.params)
