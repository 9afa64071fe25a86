"""Options are described once: the command line, `--help`, `ExportOptions` and docs/usage.md agree."""

from __future__ import annotations

import re
from dataclasses import fields

import click
import pytest
from click.testing import CliRunner
from support.paths import ROOT

from export_zoo.engines.targets.options import BuildOptions
from export_zoo.exporter.cli.calibrate import calibrate
from export_zoo.exporter.cli.export import export
from export_zoo.exporter.cli.option_table import (
    OPTIONS,
    SECTIONS,
    export_options,
)
from export_zoo.exporter.options import ExportOptions

TABLE = (ROOT / "docs" / "usage.md").read_text().partition("## Options of `export`")[2].partition("\n## ")[0]
ROWS = [
    line.strip("|").split(" | ")
    for line in re.sub(r"\\\|", "/", TABLE).splitlines()
    if line.startswith("| `")
]
COMMON = {"--json", "-q", "-v"}


def flags_of(command: click.Command) -> set[str]:
    """The first spelling of each option."""
    return {p.opts[0] for p in command.params if isinstance(p, click.Option)}


def test_every_field_has_an_option_and_every_option_a_field():
    top = {f.name for f in fields(ExportOptions)} - {"model", "build"}
    assert top | {f"build.{f.name}" for f in fields(BuildOptions)} == {option.field for option in OPTIONS}
    assert len({option.field for option in OPTIONS}) == len(OPTIONS)


def test_defaults_of_the_command_line_are_those_of_python():
    context = export.make_context("export", ["resnet18"])
    assert export_options("resnet18", context.params) == ExportOptions("resnet18")


def test_the_table_in_the_docs_has_every_option_and_no_other():
    documented = [flag for row in ROWS for flag in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", row[0])]
    documented = [flag for flag in documented if flag not in ("--no-",)]
    assert len(set(documented)) == len(documented)
    assert set(documented) == flags_of(export)


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.default is not None], ids=lambda o: o.flags)
def test_the_table_in_the_docs_has_the_default(option):
    (row,) = [row for row in ROWS if re.search(rf"{option.flags}\b(?!-)", row[0])]
    assert str(option.default) in row[1]


@pytest.mark.parametrize("command", [export, calibrate], ids=lambda command: command.name)
def test_help_has_every_option_under_a_heading(command):
    shown = CliRunner().invoke(command, ["--help"], terminal_width=200).output
    headings = re.findall(r"^(\S.*):$", shown, flags=re.MULTILINE)
    assert [name for name in SECTIONS if name in headings] == [name for name in headings if name in SECTIONS]
    assert "Options" not in headings
    for flag in flags_of(command):
        assert re.search(rf"^  (-\w, )?{flag}\b", shown, flags=re.MULTILINE), flag
