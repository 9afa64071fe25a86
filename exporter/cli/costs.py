"""`export-zoo costs`: measures which regions of networks are faster in float than in 8 bits. Never imports PyTorch."""

from __future__ import annotations

from pathlib import Path

import click

from export_zoo.base.errors import EnvironmentFailureError, UsageError
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
    del json_path, verbose
    now = outcome.current()
    now.reporter = reporter = ConsoleReporter(quiet=quiet)
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: its directory does not exist", hint="create it, or give another file")
    from export_zoo.engines.targets.onnxruntime.costs import Costs
    from export_zoo.engines.verification.region_costs import measure

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
        click.echo(f"{out}: {len(merged.regions)} regions that stay float")
