"""Options and help that every command has."""

from __future__ import annotations

from pathlib import Path

import click

EXIT_CODES = """\b
Exit codes:
    0  ok
    1  unexpected error: a defect, please report it
    2  usage: wrong or conflicting options
    3  parity gate failed; everything is kept under OUT.failed/
    4  a requested target is not available here
    5  bad input: model, weights, images or bundle
    6  an engine did not reach the state that --require asks for
    7  network, disk or memory
  130  interrupted
"""

json_option = click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the result as JSON here, on every exit code.",
)
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Only warnings and errors.")
verbose_option = click.option(
    "-v", "--verbose", is_flag=True, help="TensorRT's log, and tracebacks of unexpected errors."
)
