"""torchvision's classification and segmentation models: names, weights, preprocessing, arguments."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models import WeightsEnum, get_model, get_model_weights
from torchvision.transforms import InterpolationMode

from export_zoo.base.errors import BadInputError, UsageError
from export_zoo.calibration.preprocess import Preprocess
from export_zoo.exporter.models import dynamic_size, memory
from export_zoo.exporter.models.model_arguments import value_of
from export_zoo.exporter.models.preprocessing import read_preprocess, resized
from export_zoo.exporter.models.spec import ModelSpec, Output
from export_zoo.exporter.models.weights import state_dicts, weights_files
from export_zoo.exporter.options import ExportOptions

TRANSFORM_INPUT_MODELS = ("googlenet", "inception_v3")
"""Models that torchvision builds with `transform_input=True` for pretrained weights: they were trained with other
statistics than the transforms normalize to."""

_AUX_KEYS = {"googlenet": "aux1.", "inception_v3": "AuxLogits."}
_SEGMENTATION_AUX = "aux_classifier."

_UNSUPPORTED = {
    "detection": (
        "non-maximum suppression returns a varying number of boxes, which a fixed graph cannot",
        "write a factory (FILE.py:FUNCTION) that returns backbone and heads, and run the suppression outside of it",
    ),
    "video": (
        "it takes clips [N, 3, T, H, W], not images",
        "use torch.onnx.export: calibration and comparison here are for images only",
    ),
    "optical_flow": ("it takes two images", "use torch.onnx.export: calibration here is for one image only"),
    "quantization": (
        "it is quantized already, for PyTorch's own kernels",
        "export the float model of that name with --precision int8",
    ),
}


@cache
def model_names() -> tuple[str, ...]:
    """torchvision's classification models."""
    return tuple(torchvision.models.list_models(module=torchvision.models))


@cache
def segmentation_names() -> tuple[str, ...]:
    """torchvision's semantic segmentation models."""
    return tuple(torchvision.models.list_models(module=torchvision.models.segmentation))


def check_model(name: str) -> None:
    """Check that torchvision has the model and that it is supported.

    Raises:
        BadInputError: the model is unknown or not supported; names the reason or the nearest names.
    """
    known = model_names() + segmentation_names()
    if name in known:
        return
    for module, (reason, hint) in _UNSUPPORTED.items():
        if name in torchvision.models.list_models(module=getattr(torchvision.models, module)):
            raise BadInputError(f"model {name!r} is not supported, because {reason}", hint=hint)
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    raise BadInputError(
        f"unknown model {name!r}",
        hint=(f"did you mean {' or '.join(near)}? " if near else "") + "`export-zoo list` shows all",
    )


def preprocess_of(weights: WeightsEnum) -> Preprocess:
    """The preprocessing of torchvision weights, from their own `transforms()`.

    For SemanticSegmentation, a centre crop to a square is added to the resize: an engine's input has one size.

    Raises:
        BadInputError: the transforms are neither those of ImageClassification, with bilinear or bicubic resizing, nor
            those of SemanticSegmentation.
    """
    transforms = weights.transforms()
    names = {InterpolationMode.BILINEAR: "bilinear", InterpolationMode.BICUBIC: "bicubic"}
    try:
        (resize,) = transforms.resize_size
        (crop,) = getattr(transforms, "crop_size", transforms.resize_size)
        return Preprocess(
            resize_size=resize,
            crop_height=crop,
            crop_width=crop,
            interpolation=names[transforms.interpolation],  # type: ignore[arg-type]
            mean=tuple(transforms.mean),
            std=tuple(transforms.std),
            source=f"{weights}.transforms()",
        )
    except (AttributeError, KeyError, ValueError) as error:
        raise BadInputError(
            f"{weights}: its transforms cannot be reproduced: {transforms}", hint="please report this"
        ) from error


def _choose_transforms(options: ExportOptions, known: WeightsEnum | None) -> Preprocess:
    if options.transforms is not None:
        named = weights_files.by_name(options.model, options.transforms, option="--transforms")
        return resized(preprocess_of(named), options)
    if known is not None:
        return resized(preprocess_of(known), options)
    found = {w.name: resized(preprocess_of(w), options) for w in get_model_weights(options.model)}
    distinct = {p.model_dump_json(exclude={"source"}) for p in found.values()}
    if len(distinct) > 1:
        raise UsageError(
            f"--weights {options.weights}: {options.model} has several preprocessings, and the file does not "
            f"say which one it was trained with: {'; '.join(_summary(n, p) for n, p in found.items())}",
            hint=f"add --transforms {next(iter(found))} (or another of them)",
        )
    return next(iter(found.values()))


def _summary(name: str, p: Preprocess) -> str:
    sizes = f"resize {p.resize_size}, crop {p.crop_height}, {p.interpolation}"
    return f"{name} ({sizes}, mean {list(p.mean)}, std {list(p.std)})"


_OTHER_OPTIONS = {
    "weights": "--weights",
    "weights_backbone": "--weights",
    "image_size": "--input-size",
    "input_size": "--input-size",
    "transform_input": "--transform-input",
    "init_weights": "--weights none",
    "aux_logits": "a weights file with or without these heads",
    "progress": "nothing: it does not change the model",
}


def model_argument(key: str, text: str) -> Any:
    """The value of a `--model-arg`, see `models.model_arguments`.

    Raises:
        UsageError: the argument has its own option, or the value is not valid.
    """
    if key in _OTHER_OPTIONS:
        raise UsageError(f"--model-arg {key}: use {_OTHER_OPTIONS[key]}", hint="leave it out")
    return value_of(key, text, layers=True)


def resolve(options: ExportOptions) -> ModelSpec:
    """Resolve the options to a model; finds or downloads the weights file.

    Raises:
        BadInputError: unknown model or weights, or a damaged file.
        UsageError: options that do not fit the model, or transforms that must be chosen.
        EnvironmentFailureError: a failed download.
    """
    check_model(options.model)
    name = options.model
    if options.transform_input is not None and name not in TRANSFORM_INPUT_MODELS:
        raise UsageError(
            f"--transform-input: {name} has no such option",
            hint=f"leave it out: it is only for {' and '.join(TRANSFORM_INPUT_MODELS)}",
        )
    if options.dynamic_size is not None and not options.fully_convolutional and name in model_names():
        with memory.without_memory(), warnings.catch_warnings():  # before weights are downloaded
            warnings.simplefilter("ignore")
            dynamic_size.check(get_model(name, weights=None), name)
    arguments = {key: model_argument(key, text) for key, text in options.model_args}
    known: WeightsEnum | None = None
    if options.weights == "none":
        weights = weights_files.ChosenWeights("random", "random")
    else:
        if weights_files.looks_like_file(options.weights):
            file = weights_files.local_file(Path(options.weights), name)
        else:
            file = weights_files.downloaded(weights_files.by_name(name, options.weights, option="--weights"))
        known = file.known
        kind = "torchvision" if known is not None else "file"
        called = str(known) if known is not None else file.path.name
        weights = weights_files.ChosenWeights(kind, called, file.sha256, file.path)
    if options.preprocess is not None:
        preprocess, given_labels = read_preprocess(options.preprocess)
        preprocess = resized(preprocess, options)
        if preprocess.channels != 3:
            raise BadInputError(
                f"--preprocess {options.preprocess}: {preprocess.channels} channel(s), torchvision's {name} takes 3",
                hint="give `mode: RGB`, or use timm's networks or your own, which take other numbers",
            )
    else:
        given_labels = ()
        preprocess = _choose_transforms(
            options, get_model_weights(name)["DEFAULT"] if weights.kind == "random" else known
        )
    transform_input: bool | None = None
    if name in TRANSFORM_INPUT_MODELS:
        # A local file was trained or fine-tuned with the same normalization as torchvision's own weights.
        transform_input = options.weights != "none"
        if options.transform_input is not None:
            transform_input = options.transform_input
    if name.startswith("vit_") and preprocess.crop_height != preprocess.crop_width:
        raise UsageError(f"--input-size: {name} takes square inputs only", hint="give one number")
    reference = known or get_model_weights(name)["DEFAULT"]
    categories = tuple(reference.meta["categories"])
    if options.num_classes == 0:
        raise UsageError(
            f"--num-classes 0: torchvision's {name} has no form without a head",
            hint="use timm's networks, or a function of your own that replaces the last layer by nn.Identity()",
        )
    num_classes = options.num_classes or len(categories)
    trained_labels = known is not None and num_classes == len(categories) and not options.init_missing
    task = "classification" if num_classes > 1 else "binary"
    outputs: tuple[Output, ...] = (Output("logits", (num_classes,), task),)
    if name in segmentation_names():
        shape = (num_classes, preprocess.crop_height, preprocess.crop_width)
        auxiliary = bool(arguments.get("aux_loss"))
        if weights.path is not None:
            state = state_dicts.read_weights(weights.path, state_dicts.Reading.of(options)).state
            auxiliary = any(key.startswith(_SEGMENTATION_AUX) for key in state)
        outputs = tuple(Output(n, shape, "segmentation") for n in (("out", "aux") if auxiliary else ("out",)))
    return ModelSpec.of(
        options,
        zoo="torchvision",
        name=name,
        weights=weights,
        preprocess=preprocess,
        labels=given_labels or (categories if trained_labels else ()),
        outputs=outputs,
        transform_input=transform_input,
    )


def construct(spec: ModelSpec, state: Mapping[str, torch.Tensor] | None) -> nn.Module:
    """Build the model as torchvision initializes it, with auxiliary heads if the state dict has them.

    Raises:
        BadInputError: torchvision refuses the arguments or the input size.
    """
    arguments: dict[str, Any] = {"num_classes": spec.num_classes}
    height, width = spec.preprocess.crop_height, spec.preprocess.crop_width
    if spec.name.startswith("vit_"):
        arguments["image_size"] = height
    if spec.name.startswith("maxvit"):
        arguments["input_size"] = (height, width)
    if spec.name in TRANSFORM_INPUT_MODELS:
        arguments["transform_input"] = spec.transform_input
        arguments["init_weights"] = state is None
        prefix = _AUX_KEYS[spec.name]
        arguments["aux_logits"] = state is not None and any(key.startswith(prefix) for key in state)
    if spec.name in segmentation_names():
        arguments["weights_backbone"] = None
        if len(spec.outputs) > 1:
            arguments["aux_loss"] = True
    arguments |= {key: model_argument(key, text) for key, text in spec.model_args}
    try:
        found: nn.Module = get_model(spec.name, weights=None, **arguments)
    except Exception as error:
        if spec.model_args:
            given = " ".join(f"--model-arg {key}={text}" for key, text in spec.model_args)
            raise BadInputError(
                f"{given}: {spec.name} cannot be built with these arguments: {error}",
                hint="check the arguments of torchvision's function and of its class",
            ) from error
        raise BadInputError(
            f"{spec.name} cannot be built for input {height}x{width}: {error}",
            hint="choose another --input-size",
        ) from error
    return found
