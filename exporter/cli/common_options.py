"""Options and help texts that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from export_zoo.base.errors import UsageError

if TYPE_CHECKING:
    from export_zoo.exporter.cluster.ray_cluster import RayCluster

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


def html_option(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The option --html of a command.

    Args:
        what: what it writes, for its help.
    """
    return click.option(
        "--html",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help=f"{what}; it needs no other file. Needs matplotlib.",
    )


LOCAL = "local"


def on_option(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The option --on of a command. Its value is checked by `connector`.

    Args:
        what: what runs there, such as "cells".
    """
    return click.option(
        "--on",
        "place",
        default=LOCAL,
        metavar="local|ray|ray://HOST:PORT",
        help=f"Where {what} run: on this machine (default), or as tasks of a Ray cluster: the one that runs here or "
        "that RAY_ADDRESS names, or the one at an address of Ray's client.",
    )


def connector(place: str) -> Callable[[], RayCluster] | None:
    """A function that connects to the cluster of --on; None for this machine. Raises UsageError for another value."""
    if place == LOCAL:
        return None
    if place != "ray" and not place.startswith("ray://"):
        raise UsageError(f"--on {place}: unknown", hint="choose from local, ray, ray://HOST:PORT")

    def connect() -> RayCluster:
        from export_zoo.exporter.cluster.ray_cluster import RayCluster

        return RayCluster(None if place == "ray" else place)

    return connect


def given_options() -> set[str]:
    """Parameters of the running command that were given on the command line."""
    context = click.get_current_context()
    given = click.core.ParameterSource.COMMANDLINE
    return {name for name in context.params if context.get_parameter_source(name) is given}


def option_name(parameter: str) -> str:
    """Option of a parameter: `--keep-float` for `keep_float`."""
    command = click.get_current_context().command
    return next((p.opts[0] for p in command.params if p.name == parameter), parameter)
