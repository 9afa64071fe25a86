"""`export-zoo calibrate`: writes a ranges file, in shards if wanted. Imports PyTorch only when it runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

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
from export_zoo.exporter.cli.option_table import (
    CALIBRATE_OPTIONS,
    SectionedCommand,
    add,
    export_options,
)
from export_zoo.exporter.run.report import ConsoleReporter


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--shard {text}: not I/N with I from 1 to N", hint="for example --shard 1/4")
    return int(match[1]), int(match[2])


def _shards(text: str | None) -> int | None:
    if text is not None and not re.fullmatch(r"[1-9][0-9]{0,5}", text):
        raise UsageError(f"--shards {text}: not a number of shards", hint="for example --shards 8")
    return None if text is None else int(text)


@click.command(cls=SectionedCommand, epilog=EXIT_CODES)
@click.argument("what", nargs=-1, metavar="MODEL | --merge FILE FILE...")
@click.option(
    "--merge", "merging", is_flag=True, help="Merge the ranges files of shards, instead of calibrating."
)
@click.option(
    "--shard", metavar="I/N", default="1/1", help="Calibrate on only the I-th of N parts of the images."
)
@on_option("shards")
@click.option(
    "--shards",
    metavar="N",
    help="Calibrate on N parts of the images, at once with --on ray, and merge the results: the same bits, whatever N. "
    "Finished shards are cached. Default: one, or as many as the cluster can run at once.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Ranges file to write. Default: ./MODEL.ranges.json. Required with --merge.",
)
@add(CALIBRATE_OPTIONS)
@json_option
@quiet_option
@verbose_option
def calibrate(
    what: tuple[str, ...],
    merging: bool,
    shard: str,
    place: str,
    shards: str | None,
    out: Path | None,
    json_path: Path | None,
    quiet: bool,
    verbose: bool,
    **given: Any,
) -> None:
    """Calibrate MODEL and write a ranges file for `export --ranges`, or merge such files.

    Uses the images that `export` would calibrate on: give both the same folder, counts and seed.
    """
    del json_path, verbose
    now = outcome.current()
    now.reporter = ConsoleReporter(quiet=quiet)
    if merging:
        if len(what) < 2:
            raise UsageError("--merge needs two ranges files or more", hint="--merge A B --out C")
        if out is None:
            raise UsageError("--merge needs --out", hint="--merge A B --out C")
        if others := given_options() - {"merging", "out", "json_path", "quiet", "verbose", "what"}:
            raise UsageError(
                f"--merge cannot be combined with {', '.join(sorted(option_name(name) for name in others))}",
                hint="leave them out: the ranges files record the images and weights",
            )
        from export_zoo.exporter.calibrate import merge

        ranges = merge([Path(name) for name in what], out, reporter=now.reporter)
    else:
        if len(what) != 1:
            raise UsageError("calibrate needs one MODEL", hint="`export-zoo list` shows all")
        part, count, connect = _shard(shard), _shards(shards), connector(place)
        if part[1] > 1 and (count is not None or connect is not None):
            raise UsageError(
                "--shard excludes --shards and --on", hint="give --shard to calibrate on one part only"
            )
        chosen = export_options(what[0], given, CALIBRATE_OPTIONS)
        out = out if out is not None else Path(f"{chosen.short_name}.ranges.json")
        from export_zoo.exporter.calibrate import calibrate as run

        cluster = connect() if connect is not None else None
        ranges = run(chosen, out, shard=part, shards=count, cluster=cluster, reporter=now.reporter)
    now.document |= {"ranges": str(out), "images": len(ranges.image_sha256), "tensors": len(ranges.tensors)}
    if not quiet:
        click.echo(f"{out}: {len(ranges.tensors)} tensors over {len(ranges.image_sha256)} images")
