"""Options of `export` and `calibrate`, each described once.

click's parameters, the sections of `--help`, and the arguments of `ExportOptions` follow from this table. A test keeps
the table, `ExportOptions` and docs/usage.md in step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from export_zoo.engines.precision.registry import BASELINE, PRECISIONS
from export_zoo.engines.targets.options import BuildOptions
from export_zoo.engines.targets.registry import AUTO, TARGETS
from export_zoo.exporter import option_values as v
from export_zoo.exporter import options as o

SECTIONS = ("Precision and target", "Images", "Weights", "Network and input", "INT8", "TensorRT", "Run")
"""Headings of `--help`, in order."""

Command = TypeVar("Command", bound=Callable[..., Any])


def _same(value: Any) -> Any:
    return value


def _optional(read: Callable[[str], Any]) -> Callable[[str | None], Any]:
    return lambda text: read(text) if text else None


def _not(value: bool) -> bool:
    return not value


@dataclass(frozen=True)
class Option:
    """One option.

    Args:
        flags: as click takes them: `--seed`, or `--x/--no-x` for a switch.
        field: of `ExportOptions`; `build.NAME` for one of `BuildOptions`.
        section: its heading in `--help`.
        help: what it does, in a line or two.
        metavar: placeholder of its value; empty for a flag.
        type: click's type of the value.
        default: of the command line, as text; None: none.
        repeatable: it may be given several times.
        read: from click's value to the field's; of repeatable ones, from a tuple. Raises UsageError.
        calibrate: `export-zoo calibrate` has it, too.
    """

    flags: str
    field: str
    section: str
    help: str
    metavar: str = ""
    type: Any = None
    default: str | float | None = None
    repeatable: bool = False
    read: Callable[[Any], Any] = _same
    calibrate: bool = False

    @property
    def parameter(self) -> str:
        """Name of click's parameter."""
        return self.flags.partition("/")[0].lstrip("-").replace("-", "_")

    def decorate(self, command: Command) -> Command:
        """Add it to a command."""
        if "/" in self.flags:
            decorator = click.option(self.flags, default=None, help=self.help)
        elif not self.metavar:
            decorator = click.option(self.flags, is_flag=True, help=self.help)
        else:
            decorator = click.option(
                self.flags,
                metavar=self.metavar,
                type=self.type,
                default=self.default,
                show_default=self.default is not None,
                multiple=self.repeatable,
                help=self.help,
            )
        return decorator(command)


_FOLDER = click.Path(path_type=Path, readable=False)
_FILE = click.Path(path_type=Path)
_PRECISIONS, _IMAGES, _WEIGHTS, _NETWORK, _INT8, _TENSORRT, _RUN = SECTIONS

OPTIONS = (
    Option(
        "--precision",
        "precisions",
        _PRECISIONS,
        "Repeatable. Default: fp32.",
        metavar="|".join(PRECISIONS),
        repeatable=True,
        read=lambda given: tuple(given) or (BASELINE.name,),
    ),
    Option(
        "--target",
        "targets",
        _PRECISIONS,
        f"{', '.join(TARGETS)} or {AUTO}. Repeatable. Default: {AUTO}, all that is available here.",
        metavar="NAME",
        repeatable=True,
        read=lambda given: tuple(given) or (AUTO,),
    ),
    Option(
        "--batch",
        "batch",
        _PRECISIONS,
        "Batch sizes to accept; engines are tuned and timed at OPT.",
        metavar="MIN:OPT:MAX",
        default=v.DEFAULT_BATCH,
        read=v.BatchRange.parse,
    ),
    Option(
        "--tolerance",
        "tolerances",
        _PRECISIONS,
        "Limit of the parity gate. Repeatable. Defaults by precision: docs/parity.md.",
        metavar="[TARGET:]METRIC=VALUE",
        repeatable=True,
        read=lambda given: tuple(map(v.Tolerance.parse, given)),
    ),
    Option(
        "--require",
        "require",
        _PRECISIONS,
        "State that every engine must reach.",
        metavar="|".join(o.REQUIREMENTS),
        default="graph",
    ),
    Option(
        "--strict",
        "strict",
        _PRECISIONS,
        f"Fail if a target of --target {AUTO} refuses the network. Otherwise, its engines are left out with a warning.",
    ),
    Option(
        "--calib",
        "calib",
        _IMAGES,
        "Images to calibrate on (INT8); divided into calibrate, select and verify sets.",
        metavar="DIR",
        type=_FOLDER,
        calibrate=True,
    ),
    Option(
        "--calib-images",
        "calib_images",
        _IMAGES,
        "Maximum number of calibration images.",
        metavar="N",
        type=int,
        default=o.DEFAULT_CALIB_IMAGES,
        calibrate=True,
    ),
    Option(
        "--verify",
        "verify",
        _IMAGES,
        "Images to verify on. Default: a part of --calib.",
        metavar="DIR",
        type=_FOLDER,
        calibrate=True,
    ),
    Option(
        "--verify-images",
        "verify_images",
        _IMAGES,
        "Maximum number of verification images.",
        metavar="N",
        type=int,
        default=o.DEFAULT_VERIFY_IMAGES,
        calibrate=True,
    ),
    Option(
        "--weights",
        "weights",
        _WEIGHTS,
        "DEFAULT, a name (IMAGENET1K_V1), a .pth or .safetensors file, or none (random).",
        metavar="W",
        default="DEFAULT",
        calibrate=True,
    ),
    Option(
        "--weights-key",
        "weights_key",
        _WEIGHTS,
        "Entry of a training checkpoint to load, such as model_ema. Default: state_dict, model, ... as found.",
        metavar="KEY",
        calibrate=True,
    ),
    Option(
        "--rename",
        "renames",
        _WEIGHTS,
        "Replace prefix OLD of names in the file with NEW. Repeatable; applied in this order.",
        metavar="OLD=NEW",
        repeatable=True,
        read=v.parse_renames,
        calibrate=True,
    ),
    Option(
        "--skip-weights",
        "skip_weights",
        _WEIGHTS,
        "Names in the file to leave out, as a glob. Repeatable.",
        metavar="PATTERN",
        repeatable=True,
        read=tuple,
        calibrate=True,
    ),
    Option(
        "--init-missing",
        "init_missing",
        _WEIGHTS,
        "Parameters that the file may lack, as a glob; initialized at random. Repeatable.",
        metavar="PATTERN",
        repeatable=True,
        read=tuple,
        calibrate=True,
    ),
    Option(
        "--allow-pickle",
        "allow_pickle",
        _WEIGHTS,
        "Load a pickled module. This runs the code in the file: use it only for files that you trust.",
        calibrate=True,
    ),
    Option(
        "--transforms",
        "transforms",
        _NETWORK,
        "torchvision weights whose preprocessing is used, if it cannot be inferred from the weights file.",
        metavar="NAME",
        calibrate=True,
    ),
    Option(
        "--preprocess",
        "preprocess",
        _NETWORK,
        "JSON or YAML: resize, crop, mean, std that the network was trained with. Required for your own networks.",
        metavar="FILE",
        type=_FOLDER,
        calibrate=True,
    ),
    Option(
        "--num-classes",
        "num_classes",
        _NETWORK,
        "Number of classes of the head; 1 for one value, 0 for timm's features. Default: that of the zoo's weights.",
        metavar="N",
        type=int,
        calibrate=True,
    ),
    Option(
        "--task",
        "task",
        _NETWORK,
        f"Meaning of the first output: {', '.join(o.TASKS)}. Default: found out from its shape and values.",
        metavar="TASK",
        type=click.Choice(o.TASKS),
        calibrate=True,
    ),
    Option(
        "--model-arg",
        "model_args",
        _NETWORK,
        "Argument of the model's function: replace_stride_with_dilation=[false,true,true]. Repeatable.",
        metavar="KEY=VALUE",
        repeatable=True,
        read=v.parse_model_args,
        calibrate=True,
    ),
    Option(
        "--transform-input/--no-transform-input",
        "transform_input",
        _NETWORK,
        "googlenet, inception_v3: transform the input as in training. Default: on; off with --weights none.",
        calibrate=True,
    ),
    Option(
        "--fully-convolutional",
        "fully_convolutional",
        _NETWORK,
        "VGG, AlexNet: Linear layers as convolutions, scores averaged over all positions. Takes larger inputs.",
        calibrate=True,
    ),
    Option(
        "--input-size",
        "input_size",
        _NETWORK,
        "Input size in pixels. Default: the weights' own.",
        metavar="N|HxW",
        read=_optional(v.parse_size),
        calibrate=True,
    ),
    Option(
        "--dynamic-size",
        "dynamic_size",
        _NETWORK,
        "Instead of --input-size: any height and width from MIN to MAX (each N or HxW). Preprocessing and "
        "calibration use OPT.",
        metavar="MIN:OPT:MAX",
        read=_optional(v.SizeRange.parse),
        calibrate=True,
    ),
    Option(
        "--resize-size",
        "resize_size",
        _NETWORK,
        "Shorter side in pixels, before the crop. Default: the weights' own, in proportion to --input-size.",
        metavar="N",
        type=int,
        calibrate=True,
    ),
    Option(
        "--method",
        "method",
        _INT8,
        f"Method for INT8 ranges: {', '.join(o.METHODS[1:])}, or {o.METHODS[0]} (the best of them on the select "
        "images).",
        metavar="NAME",
        default="auto",
    ),
    Option(
        "--steps",
        "steps",
        _INT8,
        "Steps to try to improve INT8: names separated by commas, or none.",
        metavar="NAMES",
        default=",".join(o.STEPS),
        read=v.parse_steps,
    ),
    Option(
        "--effort",
        "effort",
        _INT8,
        "How much is tried to improve INT8. high takes 1.3 to 1.7 times as long.",
        metavar="|".join(o.EFFORTS),
        default=o.EFFORTS[0],
    ),
    Option(
        "--keep-float",
        "keep_float",
        _INT8,
        "INT8: layers to leave unquantized: a glob over module paths or nodes, @depthwise, @few-channels. Repeatable.",
        metavar="PATTERN",
        repeatable=True,
        read=tuple,
        calibrate=True,
    ),
    Option(
        "--keep-float-fp16",
        "keep_float_fp16",
        _INT8,
        "FP16: nodes to leave float32: a glob over module paths or nodes. Repeatable.",
        metavar="PATTERN",
        repeatable=True,
        read=tuple,
    ),
    Option(
        "--aim",
        "aim",
        _INT8,
        f"INT8, FP16: accuracy to reach by leaving float the layers that cost least time: {', '.join(v.AIMS)}.",
        metavar="METRIC=VALUE",
        read=_optional(v.Aim.parse),
    ),
    Option(
        "--aim-seconds",
        "aim_seconds",
        _INT8,
        "Time to look for these layers, for each engine; the best result so far is then taken.",
        metavar="S",
        type=float,
        default=o.DEFAULT_AIM_SECONDS,
    ),
    Option(
        "--costs",
        "costs",
        _INT8,
        "INT8: cost file of `export-zoo costs`: regions that are faster in float stay float. Default: the one that "
        "comes with export-zoo.",
        metavar="FILE",
        type=_FILE,
    ),
    Option(
        "--ranges",
        "ranges",
        _INT8,
        "Ranges file of `export-zoo calibrate`, used instead of calibrating.",
        metavar="FILE",
        type=_FILE,
    ),
    Option(
        "--workspace",
        "build.workspace_mb",
        _TENSORRT,
        "TensorRT: maximum scratch memory on the device, in MiB. Default: all of it.",
        metavar="MIB",
        type=int,
    ),
    Option("--refittable", "build.refittable", _TENSORRT, "TensorRT: weights can be replaced later."),
    Option(
        "--strip-weights", "build.strip_weights", _TENSORRT, "TensorRT: plan without weights, to be refitted."
    ),
    Option(
        "--hardware-compatible",
        "build.hardware_compatible",
        _TENSORRT,
        "tensorrt: runs on GPUs from Ampere on.",
    ),
    Option(
        "--version-compatible",
        "build.version_compatible",
        _TENSORRT,
        "tensorrt: runs with later versions, too.",
    ),
    Option(
        "--compute-capability",
        "build.compute_capabilities",
        _TENSORRT,
        "tensorrt-rtx: GPUs to build for; `current`: this one. Repeatable. Default: 8.0, 8.6, 8.9 and 12.0.",
        metavar="X.Y",
        repeatable=True,
        read=tuple,
    ),
    Option(
        "--timing-cache",
        "build.timing_cache",
        _TENSORRT,
        "tensorrt: `.timing` file of an earlier bundle, to choose the same kernels again.",
        metavar="FILE",
        type=click.Path(path_type=Path, dir_okay=False),
    ),
    Option(
        "--out",
        "out",
        _RUN,
        "Directory of the bundle. Default: ./MODEL.bundle.",
        metavar="DIR",
        type=_FILE,
    ),
    Option(
        "--seed",
        "seed",
        _RUN,
        "Seed of the splits, synthetic images and random weights.",
        metavar="N",
        type=int,
        default=0,
        calibrate=True,
    ),
    Option(
        "--no-memory-check",
        "memory_check",
        _RUN,
        "Skip the memory check: export even if more memory is expected to be needed than is free.",
        read=_not,
        calibrate=True,
    ),
    Option("--no-cache", "cache", _RUN, "Do not read or write the cache.", read=_not, calibrate=True),
)


def add(chosen: Sequence[Option]) -> Callable[[Command], Command]:
    """A decorator that adds options to a command, in their order."""

    def decorate(command: Command) -> Command:
        for option in reversed(chosen):
            command = option.decorate(command)
        return command

    return decorate


CALIBRATE_OPTIONS = tuple(option for option in OPTIONS if option.calibrate)


def export_options(
    model: str, given: Mapping[str, Any], chosen: Iterable[Option] = OPTIONS
) -> o.ExportOptions:
    """Make `ExportOptions` from a command's parameters. Raises UsageError."""
    values: dict[str, Any] = {}
    build: dict[str, Any] = {}
    for option in chosen:
        group, dot, name = option.field.partition(".")
        (build if dot else values)[name or group] = option.read(given[option.parameter])
    return o.ExportOptions(model=model, **values, build=BuildOptions(**build))


class SectionedCommand(click.Command):
    """A command whose `--help` shows options under the headings of SECTIONS; all others under Run."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        heading = {option.parameter: option.section for option in OPTIONS}
        rows: dict[str, list[tuple[str, str]]] = {section: [] for section in SECTIONS}
        for parameter in self.get_params(ctx):
            if not isinstance(parameter, click.Option):
                continue
            if (record := parameter.get_help_record(ctx)) is not None:
                rows[heading.get(parameter.name or "", _RUN)].append(record)
        for section, records in rows.items():
            if records:
                with formatter.section(section):
                    formatter.write_dl(records)
