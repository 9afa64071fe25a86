"""The command line. Imports PyTorch and ONNX Runtime only inside the commands that need them."""

from __future__ import annotations

import difflib
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from export_zoo.base.errors import UsageError
from export_zoo.base.package import __version__
from export_zoo.exporter.cli import outcome
from export_zoo.exporter.cli.bench import bench
from export_zoo.exporter.cli.bundles import inspect, ovms, triton, verify
from export_zoo.exporter.cli.calibrate import calibrate
from export_zoo.exporter.cli.common_options import EXIT_CODES, json_option, quiet_option, verbose_option
from export_zoo.exporter.cli.costs import costs
from export_zoo.exporter.cli.diagnose import diagnose
from export_zoo.exporter.cli.export import export
from export_zoo.exporter.cli.matrix import matrix
from export_zoo.exporter.cli.report import report


class _Group(click.Group):
    """`export-zoo MODEL ...` is `export-zoo export MODEL ...`. A mistyped command gets a suggestion."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        group_options = {"--help", "-h", "--version"}
        flags = _leading_flags(args)
        args = [*args[len(flags) : len(flags) + 1], *flags, *args[len(flags) + 1 :]]
        if args and args[0] not in self.commands and args[0] not in group_options:
            _refuse_mistyped(args[0], list(self.commands))
            args = ["export", *args]
        return super().parse_args(ctx, args)


def _leading_flags(args: Sequence[str]) -> list[str]:
    """Options common to all commands that stand before the command: `export-zoo --json out.json list`."""
    taken = 0
    while taken < len(args):
        if args[taken] == "--json" and taken + 1 < len(args):
            taken += 2
        elif args[taken] in ("-q", "--quiet", "-v", "--verbose") or args[taken].startswith("--json="):
            taken += 1
        else:
            break
    return list(args[:taken])


def _refuse_mistyped(word: str, commands: Sequence[str]) -> None:
    """Refuse a word that resembles a command and is not the name of a model."""
    near = difflib.get_close_matches(word.lower(), commands, n=1, cutoff=0.6)
    if word.startswith("-") or not near or ":" in word or "/" in word:
        return
    from export_zoo.exporter.models.sources.torchvision_zoo import model_names

    if word not in model_names():
        raise UsageError(f"no command or model {word!r}", hint=f"did you mean `export-zoo {near[0]}`?")


CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(cls=_Group, context_settings=CONTEXT, epilog=EXIT_CODES, no_args_is_help=True)
@click.version_option(__version__, prog_name="export-zoo")
def app() -> None:
    """Export zoo models to engines whose logits were compared with eager PyTorch.

    \b
    export-zoo resnet50 --precision int8 --calib ./imgs

    `export-zoo MODEL` is short for `export-zoo export MODEL`.
    """


@app.command("list")
@click.argument("pattern", default="")
@json_option
@quiet_option
@verbose_option
def list_models(pattern: str, json_path: Path | None, quiet: bool, verbose: bool) -> None:
    """List the zoo's models whose name matches PATTERN (a glob, or a part of the name)."""
    del json_path, verbose
    from export_zoo.exporter.cli import listing

    found = listing.listed(pattern)
    outcome.current().document["models"] = [asdict(row) for row in found]
    if not quiet:
        listing.print_models(found)


for command in (export, matrix, calibrate, costs, diagnose, bench, report, verify, inspect, triton, ovms):
    app.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return outcome.execute(app, sys.argv[1:] if arguments is None else arguments)


def run() -> None:
    """Entry point of the `export-zoo` console script. Signals end the run cleanly, as Ctrl-C does."""
    for number in outcome.SIGNALS:
        signal.signal(number, outcome.on_signal)
    code = main()
    outcome.ignore_signals()  # libraries take most of a second to shut down
    sys.exit(code)


if __name__ == "__main__":
    run()
