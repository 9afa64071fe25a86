"""The zoo: torchvision's classification models, how to build one, and its preprocessing."""

from __future__ import annotations

import contextlib
import difflib
import re
import warnings
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torchvision
import yaml
from torch import nn
from torchvision.models import WeightsEnum, get_model, get_model_weights
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.transforms import InterpolationMode

from calibration.errors import BadInputError, UsageError
from calibration.images import synthetic_images
from calibration.preprocess import Preprocess, normalize
from engines.manifest import WeightsKind
from exporter import dynamic_size, fully_convolutional
from exporter import weights as weights_room
from exporter.options import ExportOptions, SizeRange

TRANSFORM_INPUT_MODELS = ("googlenet", "inception_v3")
"""torchvision gives these `transform_input=True` with pretrained weights: they were trained with other
statistics than the transforms normalize to."""

RESIDUAL_GAIN = 0.25

_AUX_KEYS = {"googlenet": "aux1.", "inception_v3": "AuxLogits."}


@dataclass(frozen=True)
class ModelSpec:
    """Everything that decides what a model computes: the cache key of all that follows."""

    name: str
    num_classes: int
    weights_kind: WeightsKind
    weights_name: str
    weights_sha256: str
    weights_path: Path | None
    transform_input: bool | None
    init_missing: tuple[str, ...]
    model_args: tuple[tuple[str, str], ...]
    """Of torchvision's function, as they were written."""
    fully_convolutional: bool
    sizes: SizeRange | None
    """Of --dynamic-size; its OPT is what `preprocess` crops to."""
    reading: weights_room.Reading
    seed: int
    preprocess: Preprocess
    labels: tuple[str, ...]

    def key(self) -> dict[str, Any]:
        """Hashable identity: where the file lies does not count, nor do the labels."""
        fields = {k: v for k, v in asdict(self).items() if k not in ("weights_path", "labels", "preprocess")}
        return {**fields, "preprocess": self.preprocess.model_dump(exclude={"source"})}


@cache
def model_names() -> tuple[str, ...]:
    """torchvision's classification models."""
    return tuple(torchvision.models.list_models(module=torchvision.models))


def check_model(name: str) -> None:
    """Raises BadInputError, with the nearest names, where torchvision has no such classification model."""
    if name in model_names():
        return
    near = difflib.get_close_matches(name.lower(), model_names(), n=3, cutoff=0.5)
    if name in torchvision.models.list_models():
        raise BadInputError(
            f"model {name!r} is not a classification model", hint="`export-zoo list` shows those supported"
        )
    raise BadInputError(
        f"unknown model {name!r}",
        hint=(f"did you mean {' or '.join(near)}? " if near else "") + "`export-zoo list` shows all",
    )


def preprocess_of(weights: WeightsEnum) -> Preprocess:
    """The preprocessing of torchvision weights, from their own `transforms()`.

    Raises:
        BadInputError: transforms that are not ImageClassification's with bilinear or bicubic resizing.
    """
    transforms = weights.transforms()
    names = {InterpolationMode.BILINEAR: "bilinear", InterpolationMode.BICUBIC: "bicubic"}
    try:
        (crop,) = transforms.crop_size
        (resize,) = transforms.resize_size
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


def _resized(preprocess: Preprocess, options: ExportOptions) -> Preprocess:
    """Apply --input-size (or OPT of --dynamic-size) and --resize-size; without it the resize keeps its proportion."""
    changed = preprocess
    if options.crop_size is not None:
        changed = changed.at_size(*options.crop_size)
    if options.resize_size is not None:
        changed = changed.model_copy(update={"resize_size": options.resize_size})
    if options.crop_size is None and options.resize_size is None:
        return preprocess
    return changed.model_copy(update={"source": f"{preprocess.source}, sizes from options"})


def _choose_transforms(options: ExportOptions, known: WeightsEnum | None) -> Preprocess:
    if options.transforms is not None:
        named = weights_room.by_name(options.model, options.transforms, option="--transforms")
        return _resized(preprocess_of(named), options)
    if known is not None:
        return _resized(preprocess_of(known), options)
    found = {w.name: _resized(preprocess_of(w), options) for w in get_model_weights(options.model)}
    distinct = {p.model_dump_json(exclude={"source"}) for p in found.values()}
    if len(distinct) > 1:
        raise UsageError(
            f"--weights {options.weights}: {options.model} has several preprocessings, and the file does not "
            f"tell which it was trained with: {'; '.join(_summary(n, p) for n, p in found.items())}",
            hint=f"add --transforms {next(iter(found))} (or another of them)",
        )
    return next(iter(found.values()))


def _summary(name: str, p: Preprocess) -> str:
    sizes = f"resize {p.resize_size}, crop {p.crop_height}, {p.interpolation}"
    return f"{name} ({sizes}, mean {list(p.mean)}, std {list(p.std)})"


_OTHER_OPTIONS = {
    "weights": "--weights",
    "num_classes": "--num-classes",
    "image_size": "--input-size",
    "input_size": "--input-size",
    "transform_input": "--transform-input",
    "init_weights": "--weights none",
    "aux_logits": "a file that has them, or not",
    "progress": "nothing: it changes no model",
}
_LAYER = re.compile(r"(?:torch\.)?(?:nn\.)?([A-Z]\w*)(?:\((\d+)\))?")


def model_argument(key: str, text: str) -> Any:
    """The value of a `--model-arg`: YAML (numbers, true, lists, words), or for `*_layer` a class of `torch.nn`.

    `norm_layer=GroupNorm(8)` passes 8 as the class's first argument.

    Raises:
        UsageError: an argument that has an option of its own, or a value that is none.
    """
    if key in _OTHER_OPTIONS:
        raise UsageError(f"--model-arg {key}: use {_OTHER_OPTIONS[key]}", hint="leave it out")
    if key.endswith("_layer"):
        match = _LAYER.fullmatch(text)
        layer = getattr(nn, match[1], None) if match is not None else None
        if match is None or not (isinstance(layer, type) and issubclass(layer, nn.Module)):
            raise UsageError(
                f"--model-arg {key}={text}: no class of torch.nn",
                hint=f"for example --model-arg {key}=GroupNorm(8)",
            )
        return layer if match[2] is None else partial(layer, int(match[2]))
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(
            f"--model-arg {key}={text}: not a number, true, false, a list or a word",
            hint=f"for example --model-arg {key}=[1,2]",
        ) from error


def resolve(options: ExportOptions) -> ModelSpec:
    """From options to the model that they mean; finds or downloads the weights file.

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
            hint=f"it is for {' and '.join(TRANSFORM_INPUT_MODELS)}",
        )
    if options.fully_convolutional:
        fully_convolutional.check(name)
    elif options.dynamic_size is not None:
        # Before weights are downloaded. RegNets compute their widths with tensors, which "meta" has not.
        with torch.device("meta"), warnings.catch_warnings(), contextlib.suppress(NotImplementedError):
            warnings.simplefilter("ignore")
            dynamic_size.check(get_model(name, weights=None), name)
    for key, text in options.model_args:
        model_argument(key, text)
    known: WeightsEnum | None = None
    path: Path | None = None
    sha256 = ""
    if options.weights == "none":
        kind: WeightsKind = "random"
        weights_name = "random"
        preprocess = _choose_transforms(options, get_model_weights(name)["DEFAULT"])
        if options.init_missing:
            raise UsageError("--init-missing: --weights none has nothing to miss", hint="leave one out")
    else:
        if weights_room.looks_like_file(options.weights):
            file = weights_room.local_file(name, Path(options.weights))
        else:
            file = weights_room.downloaded(weights_room.by_name(name, options.weights, option="--weights"))
        known, path, sha256 = file.known, file.path, file.sha256
        kind = "torchvision" if known is not None else "file"
        weights_name = str(known) if known is not None else file.path.name
        preprocess = _choose_transforms(options, known)
    transform_input: bool | None = None
    if name in TRANSFORM_INPUT_MODELS:
        # A local file was trained, or fine-tuned, behind the same normalization as torchvision's own.
        transform_input = options.weights != "none"
        if options.transform_input is not None:
            transform_input = options.transform_input
    if name.startswith("vit_") and preprocess.crop_height != preprocess.crop_width:
        raise UsageError(f"--input-size: {name} takes square inputs only", hint="give one number")
    reference = known or get_model_weights(name)["DEFAULT"]
    categories = tuple(reference.meta["categories"])
    num_classes = options.num_classes or len(categories)
    trained_labels = known is not None and num_classes == len(categories) and not options.init_missing
    return ModelSpec(
        name=name,
        num_classes=num_classes,
        weights_kind=kind,
        weights_name=weights_name,
        weights_sha256=sha256,
        weights_path=path,
        transform_input=transform_input,
        init_missing=options.init_missing,
        model_args=options.model_args,
        fully_convolutional=options.fully_convolutional,
        sizes=options.dynamic_size,
        reading=weights_room.Reading(
            options.weights_key, options.renames, options.skip_weights, options.allow_pickle
        ),
        seed=options.seed,
        preprocess=preprocess,
        labels=categories if trained_labels else (),
    )


def build(spec: ModelSpec) -> tuple[nn.Module, weights_room.LoadReport]:
    """The eval-mode model, and what was loaded into it.

    Raises:
        BadInputError: the weights do not fit, or the architecture refuses the input size.
    """
    loaded = weights_room.Loaded({})
    state: dict[str, torch.Tensor] | None = None
    if spec.weights_path is not None:
        loaded = weights_room.read_weights(spec.weights_path, spec.reading)
        state = loaded.state
    arguments: dict[str, Any] = {"num_classes": spec.num_classes}
    arguments |= {key: model_argument(key, text) for key, text in spec.model_args}
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
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(spec.seed)
        try:
            model = get_model(spec.name, weights=None, **arguments)
        except Exception as error:
            if spec.model_args:
                given = " ".join(f"--model-arg {key}={text}" for key, text in spec.model_args)
                raise BadInputError(
                    f"{given}: {spec.name} cannot be built with that: {error}",
                    hint="see the arguments of torchvision's function and of its class",
                ) from error
            raise BadInputError(
                f"{spec.name} cannot be built for input {height}x{width}: {error}",
                hint="choose another --input-size",
            ) from error
        initialized: list[str] = []
        if state is None:
            _make_usable(model, spec)
        else:
            initialized = weights_room.load_into(
                model, state, origin=str(spec.weights_path), init_missing=spec.init_missing
            )
    if spec.fully_convolutional:
        least = spec.sizes.min if spec.sizes is not None else (height, width)
        model = fully_convolutional.fully_convolutional(model.eval(), *least)
    if spec.sizes is not None:
        dynamic_size.check(model, spec.name)
    report = weights_room.LoadReport(initialized, list(loaded.skipped), loaded.entry, list(loaded.others))
    return model.eval(), report


def _last_norm_of_branch(block: nn.Module) -> nn.BatchNorm2d | None:
    """The BatchNorm that ends a residual branch: in ResNets, MobileNets, EfficientNets, MNASNets and RegNets."""
    if isinstance(block, Bottleneck):
        return block.bn3  # type: ignore[return-value]
    if isinstance(block, BasicBlock):
        return block.bn2  # type: ignore[return-value]
    branches = {
        "use_res_connect": ("conv", "block"),  # MobileNetV2, MobileNetV3, EfficientNet
        "apply_residual": ("layers",),  # MNASNet
        "proj": ("f",),  # RegNet
    }
    for flag, names in branches.items():
        for name in names:
            branch = getattr(block, name, None)
            if (
                hasattr(block, flag)
                and getattr(block, flag) is not False
                and isinstance(branch, nn.Sequential)
            ):
                norms = [m for m in branch.modules() if isinstance(m, nn.BatchNorm2d)]
                return norms[-1] if norms else None
    return None


def _make_usable(model: nn.Module, spec: ModelSpec) -> None:
    """Give random weights logits that vary with the input, so that parity has something to compare.

    ViT's head is initialized to zero and ConvNeXt's layer scale to 1e-6; BatchNorm's untrained statistics let
    activations vanish or explode, and are estimated on a few seeded images instead. Residual branches start
    small, as in training (Goyal et al. 2017, arXiv 1706.02677, section 5.1, start at 0): at full strength a random
    ResNet is so chaotic that one flipped rounding tie decides its answer.
    """
    for name, module in model.named_modules():
        scale = getattr(module, "layer_scale", None)
        if isinstance(scale, nn.Parameter):
            nn.init.ones_(scale)
        if isinstance(module, nn.Linear) and name.startswith("heads"):
            module.reset_parameters()
        last = _last_norm_of_branch(module)
        if last is not None and getattr(last, "weight", None) is not None:  # InstanceNorm2d has none
            nn.init.constant_(last.weight, RESIDUAL_GAIN)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    height, width = spec.preprocess.crop_height, spec.preprocess.crop_width
    pixels = synthetic_images(8 if height * width <= 320 * 320 else 4, height, width, spec.seed)
    with torch.inference_mode():
        try:
            model(torch.from_numpy(normalize(pixels, spec.preprocess)))
        except Exception as error:
            raise BadInputError(
                f"{spec.name} does not run at input {height}x{width}: {error}",
                hint="choose another --input-size or --dynamic-size",
            ) from error
