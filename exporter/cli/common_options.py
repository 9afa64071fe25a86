"""Options and help texts that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

EXIT_CODES = """\b
Exit codes:
    0  ok
    1  unexpected error: a defect, please report it
    2  usage: wrong or conflicting options
    3  parity gate failed; export keeps everything under OUT.failed/
    4  a requested target is not available here
    5  bad input: model, weights, images or bundle
    6  an engine did not reach the state that export's --require asks for, or was refused by its target
    7  network, disk, memory, or a package that is not installed
  130  interrupted
"""

json_option = click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the result as JSON here, on every exit code.",
)
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print only warnings and errors.")
verbose_option = click.option(
    "-v", "--verbose", is_flag=True, help="Print TensorRT's log, and tracebacks of unexpected errors."
)


def given_options() -> set[str]:
    """Parameters of the running command that were given on the command line."""
    context = click.get_current_context()
    given = click.core.ParameterSource.COMMANDLINE
    return {name for name in context.params if context.get_parameter_source(name) is given}


def option_name(parameter: str) -> str:
    """Option of a parameter: `--keep-float` for `keep_float`."""
    command = click.get_current_context().command
    return next((p.opts[0] for p in command.params if p.name == parameter), parameter)
