"""Options and help texts that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from export_zoo.exporter import options

EXIT_CODES = """\b
Exit codes:
    0  ok
    1  unexpected error: a defect, please report it
    2  usage: wrong or conflicting options
    3  parity gate failed; export keeps everything under OUT.failed/
    4  a requested target is not available here
    5  bad input: model, weights, images or bundle
    6  an engine did not reach the state that export's --require asks for
    7  network, disk or memory
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


keep_float_option = click.option(
    "--keep-float",
    multiple=True,
    metavar="PATTERN",
    help="INT8: layers to leave unquantized: a glob over module paths or nodes, @depthwise, @few-channels. Repeatable.",
)

_MODEL_OPTIONS = (
    click.option(
        "--calib",
        type=click.Path(path_type=Path, readable=False),
        metavar="DIR",
        help="Images to calibrate on (INT8); divided into calibrate, select and verify sets.",
    ),
    click.option(
        "--calib-images",
        type=int,
        default=options.DEFAULT_CALIB_IMAGES,
        show_default=True,
        metavar="N",
        help="Maximum number of calibration images.",
    ),
    click.option(
        "--verify",
        type=click.Path(path_type=Path, readable=False),
        metavar="DIR",
        help="Images to verify on. Default: a part of --calib.",
    ),
    click.option(
        "--verify-images",
        type=int,
        default=options.DEFAULT_VERIFY_IMAGES,
        show_default=True,
        metavar="N",
        help="Maximum number of verification images.",
    ),
    click.option(
        "--weights",
        default="DEFAULT",
        show_default=True,
        metavar="W",
        help="DEFAULT, a name (IMAGENET1K_V1), a .pth or .safetensors file, or none (random).",
    ),
    click.option(
        "--transforms",
        metavar="NAME",
        help="torchvision weights whose preprocessing is used, if it cannot be inferred from the weights file.",
    ),
    click.option(
        "--preprocess",
        type=click.Path(path_type=Path, readable=False),
        metavar="FILE",
        help="JSON or YAML: resize, crop, mean, std that the network was trained with. Required for your own networks.",
    ),
    click.option(
        "--num-classes",
        type=int,
        metavar="N",
        help="Number of classes of the head. Default: that of the zoo's weights.",
    ),
    click.option(
        "--weights-key",
        metavar="KEY",
        help="Entry of a training checkpoint to load, such as model_ema. Default: state_dict, model, ... as found.",
    ),
    click.option(
        "--rename",
        "renames",
        multiple=True,
        metavar="OLD=NEW",
        help="Replace prefix OLD of names in the file with NEW. Repeatable; applied in this order.",
    ),
    click.option(
        "--skip-weights",
        multiple=True,
        metavar="PATTERN",
        help="Names in the file to leave out, as a glob. Repeatable.",
    ),
    click.option(
        "--allow-pickle",
        is_flag=True,
        help="Load a pickled module. This runs the code in the file: use it only for files that you trust.",
    ),
    click.option(
        "--model-arg",
        "model_args",
        multiple=True,
        metavar="KEY=VALUE",
        help="Argument of the model's function: replace_stride_with_dilation=[false,true,true]. Repeatable.",
    ),
    click.option(
        "--init-missing",
        multiple=True,
        metavar="PATTERN",
        help="Parameters that the file may lack, as a glob; initialized at random. Repeatable.",
    ),
    click.option(
        "--transform-input/--no-transform-input",
        default=None,
        help="googlenet, inception_v3: transform the input as in training. Default: on; off with --weights none.",
    ),
    click.option(
        "--fully-convolutional",
        is_flag=True,
        help="VGG, AlexNet: Linear layers as convolutions, scores averaged over all positions. Takes larger inputs.",
    ),
    click.option("--input-size", metavar="N|HxW", help="Input size in pixels. Default: the weights' own."),
    click.option(
        "--dynamic-size",
        metavar="MIN:OPT:MAX",
        help="Instead of --input-size: any height and width from MIN to MAX (each N or HxW). Preprocessing and "
        "calibration use OPT.",
    ),
    click.option(
        "--resize-size",
        type=int,
        metavar="N",
        help="Shorter side in pixels, before the crop. Default: the weights' own, in proportion to --input-size.",
    ),
    click.option(
        "--seed",
        type=int,
        default=0,
        show_default=True,
        metavar="N",
        help="Seed of the splits, synthetic images and random weights.",
    ),
    click.option(
        "--no-memory-check",
        is_flag=True,
        help="Skip the memory check: export even if more memory is expected to be needed than is free.",
    ),
    click.option("--no-cache", is_flag=True, help="Do not read or write the cache."),
)

Command = TypeVar("Command", bound=Callable[..., Any])


def model_options(command: Command) -> Command:
    """Add the options for the network and its images. `options.model_options` reads them."""
    for option in reversed(_MODEL_OPTIONS):
        command = option(command)
    return command
