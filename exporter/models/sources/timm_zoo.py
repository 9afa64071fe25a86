"""timm's models: `timm/NAME`, preprocessed as timm's own data configuration says."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from export_zoo.base.errors import BadInputError, EnvironmentFailureError
from export_zoo.calibration.preprocess import Preprocess
from export_zoo.exporter.models.eager import probe
from export_zoo.exporter.models.model_arguments import value_of
from export_zoo.exporter.models.preprocessing import read_preprocess, resized
from export_zoo.exporter.models.spec import ModelSpec
from export_zoo.exporter.models.weights import state_dicts, weights_files
from export_zoo.exporter.options import ExportOptions

if TYPE_CHECKING:
    import torch
    from torch import nn


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise EnvironmentFailureError(
            f"timm cannot be imported: {error}", hint="pip install 'export-zoo[timm]'"
        ) from error
    return timm


def preprocess_of(name: str) -> Preprocess:
    """The preprocessing of timm's evaluation (`timm.data.transforms_factory.transforms_imagenet_eval`).

    Raises:
        BadInputError: the crop mode, interpolation or input cannot be reproduced.
    """
    timm = _timm()
    config = timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    channels, height, width = config["input_size"]
    squash = config["crop_mode"] == "squash"
    sides = math.floor(height / config["crop_pct"]), math.floor(width / config["crop_pct"])
    shorter = min(sides)
    # `Preprocess` scales both sides by the same ratio, and timm rounds each.
    as_ours = shorter * height // min(height, width), shorter * width // min(height, width)
    if (
        channels != 3
        or config["crop_mode"] not in ("center", "squash")
        or (height != width and not squash)
        or (squash and sides != as_ours)
        or config["interpolation"] not in ("bilinear", "bicubic")
    ):
        raise BadInputError(
            f"timm/{name}: its preprocessing cannot be reproduced: input {config['input_size']}, crop mode "
            f"{config['crop_mode']}, interpolation {config['interpolation']}",
            hint="give the preprocessing with --preprocess FILE",
        )
    return Preprocess(
        resize_size=shorter,
        crop_height=height,
        crop_width=width,
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        crop_mode="squash" if squash else "center",
        source=f"timm {timm.__version__}, data configuration of {name}",
    )


def _check_name(name: str) -> None:
    timm = _timm()
    if timm.is_model(name.partition(".")[0]) and (
        "." not in name or name in timm.list_pretrained(f"{name.partition('.')[0]}.*")
    ):
        return
    near = difflib.get_close_matches(name, [*timm.list_models(), *timm.list_pretrained()], n=3, cutoff=0.5)
    raise BadInputError(
        f"timm {timm.__version__} has no model {name!r}",
        hint=f"did you mean {' or '.join(f'timm/{n}' for n in near)}?"
        if near
        else "`python -c 'import timm; print(timm.list_models())'` shows all",
    )


def resolve(options: ExportOptions) -> ModelSpec:
    """Resolve the options to a model. With `--weights DEFAULT`, timm downloads its own weights.

    Raises:
        BadInputError: timm has no such model, or its preprocessing cannot be reproduced.
        EnvironmentFailureError: timm is not installed, or the download failed.
    """
    name = options.model.removeprefix("timm/")
    _check_name(name)
    labels: tuple[str, ...] = ()
    if options.preprocess is not None:
        preprocess, labels = read_preprocess(options.preprocess)
    else:
        preprocess = preprocess_of(name)
    preprocess = resized(preprocess, options)
    weights = weights_files.chosen(options, "timm", f"timm/{name}")
    module = _build(
        name, options.model_args, options.num_classes, preprocess, pretrained=weights.kind == "timm"
    )
    if weights.kind == "timm":
        weights = dataclasses.replace(weights, sha256=state_dicts.state_digest(module))
    outputs = probe(module, preprocess, options.model).outputs
    if options.num_classes == 0:  # timm's form without a head
        outputs = (outputs[0].with_task("embedding"), *outputs[1:])
    return ModelSpec.of(
        options,
        zoo="timm",
        name=name,
        weights=weights,
        preprocess=preprocess,
        labels=labels,
        outputs=outputs,
        version=_timm().__version__,
    )


def _build(
    name: str,
    model_args: tuple[tuple[str, str], ...],
    num_classes: int | None,
    preprocess: Preprocess,
    *,
    pretrained: bool,
) -> nn.Module:
    arguments = {key: value_of(key, text) for key, text in model_args}
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    timm = _timm()
    config = timm.get_pretrained_cfg(name)
    size = (preprocess.crop_height, preprocess.crop_width)
    if arguments.setdefault("in_chans", preprocess.channels) != preprocess.channels:
        raise BadInputError(
            f"timm/{name}: --model-arg in_chans={arguments['in_chans']}, and the preprocessing has "
            f"{preprocess.channels} channels",
            hint="give the preprocessing with --preprocess FILE: `mode: L` for 1 channel, `mode: bands` for others; "
            "in_chans follows from it",
        )
    if config.fixed_input_size and size != tuple(config.input_size[1:]):
        arguments["img_size"] = size  # position embeddings
    try:
        made: nn.Module = timm.create_model(name, pretrained=pretrained, **arguments)
    except OSError as error:
        raise EnvironmentFailureError(
            f"timm/{name}: download of its weights ({config.hf_hub_id or config.url} on Hugging Face) failed: "
            f"{str(error).splitlines()[0]}",
            hint="run it once with network access, or pass --weights FILE; --weights none needs no trained weights",
        ) from error
    except Exception as error:
        raise BadInputError(
            f"timm/{name}: cannot be built: {type(error).__name__}: {error}",
            hint="check --model-arg, --num-classes and --input-size",
        ) from error
    return made.float().eval()


def construct(spec: ModelSpec, state: Mapping[str, torch.Tensor] | None) -> nn.Module:
    """Build the model as timm does, with timm's weights unless the weights are random or come from a file.

    Raises:
        As `resolve`.
    """
    del state
    return _build(
        spec.name,
        spec.model_args,
        spec.num_classes_given,
        spec.preprocess,
        pretrained=spec.weights_kind == "timm",
    )
