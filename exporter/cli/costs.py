"""`export-zoo costs`: measures which regions of networks are faster in float than in 8 bits. Never imports PyTorch."""

from __future__ import annotations

import os
from pathlib import Path

import click

from export_zoo.base.errors import BadInputError, EnvironmentFailureError, UsageError
from export_zoo.exporter.cli import outcome
from export_zoo.exporter.cli.common_options import EXIT_CODES, json_option, quiet_option, verbose_option
from export_zoo.exporter.run.report import ConsoleReporter


@click.command(epilog=EXIT_CODES)
@click.argument("bundles", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="BUNDLE...")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    metavar="FILE",
    help="Cost file to write, for `export --costs`.",
)
@json_option
@quiet_option
@verbose_option
def costs(bundles: tuple[Path, ...], out: Path, json_path: Path | None, quiet: bool, verbose: bool) -> None:
    """Measure which regions of the networks in BUNDLEs take longer in 8 bits than in float on this machine's CPU.

    `export --costs FILE` leaves them float. Takes about a minute a network, on one thread; let nothing else run.
    The bundles need INT8 engines, or at least ranges. Needs no PyTorch.
    """
    del verbose
    now = outcome.current()
    now.reporter = reporter = ConsoleReporter(quiet=quiet)
    from export_zoo.engines.targets.onnxruntime.costs import Costs
    from export_zoo.engines.verification.region_costs import check, measure

    _check_out(out, json_path)
    for bundle in bundles:  # before a minute is spent on the first
        check(bundle)
    found: list[Costs] = []
    for bundle in bundles:
        with reporter.stage("costs") as stage, reporter.bar(f"costs of {bundle.name}", None) as advance:
            found.append(measure(bundle, advance))
            count = len(found[-1].regions)
            stage.detail = f"{bundle}: {count} region{'s' if count != 1 else ''} faster in float"
    merged = found[0].model_copy(
        update={"regions": {key: times for costs in found for key, times in sorted(costs.regions.items())}}
    )
    try:
        merged.write(out)
    except OSError as error:
        raise EnvironmentFailureError(
            f"--out {out}: cannot be written: {error.strerror or error}", hint="give another --out"
        ) from error
    now.document |= {"costs": str(out), "regions": len(merged.regions)}
    if not quiet:
        for signature, times in merged.regions.items():
            shown = ", ".join(f"batch {n}: {t.int8:.2f} -> {t.float32:.2f} ms" for n, t in times.items())
            click.echo(f"{shown}: {signature}")
        count = len(merged.regions)
        click.echo(
            f"{out}: {count} region{'s' if count != 1 else ''} that stay{'s' if count == 1 else ''} float"
        )


def _check_out(out: Path, json_path: Path | None) -> None:
    """Refuse a file that cannot be written, or that is no cost file, before anything is measured."""
    from export_zoo.engines.targets.onnxruntime.costs import Costs

    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise UsageError(
            f"--out {out}: its directory does not exist or cannot be written to", hint="give another file"
        )
    if json_path is not None and json_path.resolve() == out.resolve():
        raise UsageError(f"--json {json_path}: is the file of --out", hint="give another file")
    if out.exists():
        try:
            Costs.read(out)
        except BadInputError as error:
            raise UsageError(
                f"--out {out}: exists, and is not a cost file", hint="give another file"
            ) from error
