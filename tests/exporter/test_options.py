"""Options are described once: the command line, `--help`, `ExportOptions` and docs/usage.md agree."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from support.paths import ROOT

from export_zoo.base.errors import UsageError
from export_zoo.engines.precision.int8.keep_float import KINDS
from export_zoo.engines.targets.options import BuildOptions
from export_zoo.exporter import model_sources, options
from export_zoo.exporter.cli.calibrate import calibrate
from export_zoo.exporter.cli.export import export
from export_zoo.exporter.cli.option_table import (
    OPTIONS,
    SECTIONS,
    export_options,
)
from export_zoo.exporter.model_sources import Source, source_of
from export_zoo.exporter.option_values import BatchRange, SizeRange, Tolerance
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
    documented = [flag for row in ROWS for flag in re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", row[0])]
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


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"precisions": "fp16"}, {"precisions": ("fp16",)}),
        ({"targets": ["onnxruntime"]}, {"targets": ("onnxruntime",)}),
        ({"steps": "round,bias"}, {"steps": ("round", "bias")}),
        ({"keep_float": "layer4.*"}, {"keep_float": ("layer4.*",)}),
        ({"weights": Path("a.pth")}, {"weights": "a.pth"}),
        ({"input_size": 64}, {"input_size": (64, 64)}),
        ({"input_size": [64, 96]}, {"input_size": (64, 96)}),
        ({"batch": "1:8:32"}, {"batch": BatchRange(1, 8, 32)}),
        ({"batch": 4}, {"batch": BatchRange(4, 4, 4)}),
        ({"dynamic_size": "32:64:96"}, {"dynamic_size": SizeRange((32, 32), (64, 64), (96, 96))}),
        ({"tolerances": "int8:sqnr=20"}, {"tolerances": (Tolerance("sqnr", 20.0, "int8"),)}),
        (
            {"tolerances": [Tolerance("sqnr", 20.0), "top1=0.9"]},
            {"tolerances": (Tolerance("sqnr", 20.0), Tolerance("top1", 0.9))},
        ),
        ({"model_args": {"groups": 32}}, {"model_args": (("groups", "32"),)}),
        ({"renames": {"module.": ""}}, {"renames": (("module.", ""),)}),
    ],
)
def test_python_takes_the_texts_of_the_command_line(given, wanted):
    assert ExportOptions("resnet18", **given) == ExportOptions("resnet18", **wanted)


@pytest.mark.parametrize(
    "given",
    [
        {"weights": None},
        {"calib": 3},
        {"seed": "x"},
        {"calib_images": "5"},
        {"calib_images": True},
        {"precisions": 8},
        {"keep_float": [1]},
        {"input_size": (64,)},
        {"input_size": 6.4},
        {"batch": None},
        {"tolerances": [2.5]},
    ],
    ids=str,
)
def test_python_is_told_which_value_is_wrong(given):
    (name,) = given
    with pytest.raises(UsageError) as raised:
        ExportOptions("resnet18", **given)
    assert raised.value.message.startswith(name)
    assert raised.value.hint


def test_kinds_of_layers_to_keep_float_are_those_of_the_lower_floor():
    assert tuple(KINDS) == options.KEEP_FLOAT_KINDS


@pytest.mark.parametrize(
    ("model", "source", "short"),
    [
        ("resnet18", "torchvision", "resnet18"),
        ("timm/resnet18.a1_in1k", "timm", "resnet18.a1_in1k"),
        ("nets/vit.py:vit", "python", "vit"),
        ("package.module:make", "python", "make"),
    ],
)
def test_a_models_name_tells_its_source(model, source, short):
    assert source_of(model).name == source
    assert ExportOptions(model, preprocess="p.yaml").short_name == short


def test_a_source_of_models_is_a_module_and_a_line(monkeypatch):
    one = Source("tiny", "tiny_zoo", prefix="tiny/")
    monkeypatch.setattr(model_sources, "SOURCES", (one, *model_sources.SOURCES))
    assert source_of("tiny/conv") is one
    assert ExportOptions("tiny/conv").out_dir == Path("conv.bundle")
