"""Dispatches a model name to its source, and builds the network."""

from __future__ import annotations

import dataclasses
import warnings
from importlib import import_module
from types import ModuleType

import torch
from torch import nn

from export_zoo.base.errors import BadInputError, UsageError
from export_zoo.exporter.model_sources import SOURCES, source_of
from export_zoo.exporter.models import dynamic_size, fully_convolutional, memory
from export_zoo.exporter.models.spec import ModelSpec
from export_zoo.exporter.models.weights import state_dicts, weights_files
from export_zoo.exporter.models.weights.random_weights import make_usable
from export_zoo.exporter.options import ExportOptions

_BY_NAME = {source.name: source for source in SOURCES}


def _module(name: str) -> ModuleType:
    """The module of a source, by its name in the manifest."""
    return import_module(f"{__package__}.sources.{_BY_NAME[name].module}")


def resolve(options: ExportOptions) -> ModelSpec:
    """Resolve the options to a model; finds or downloads the weights file.

    Raises:
        BadInputError: unknown model or weights, a damaged file, or a factory that cannot be called.
        UsageError: options that do not fit the model, or preprocessing that must be chosen.
        EnvironmentFailureError: a failed download, or a library that is not installed.
    """
    if options.model.endswith(".py"):
        raise UsageError(
            f"model {options.model!r}: names a file but no function", hint="give FILE.py:FUNCTION"
        )
    source = source_of(options.model)
    if not source.listed:
        _refuse_torchvisions(options)
    if options.fully_convolutional:
        fully_convolutional.check(options.model)
    spec: ModelSpec = _module(source.name).resolve(options)
    if spec.weights_path is None:
        _refuse_without_file(options)
    size = (spec.preprocess.crop_height, spec.preprocess.crop_width)
    for output in spec.outputs:
        if spec.sizes is not None and len(output.shape) == 2:
            raise UsageError(
                f"--dynamic-size: output {output.name} of {spec.name} has tokens, whose number follows the size",
                hint="use --input-size, with one bundle for each size",
            )
        if spec.sizes is not None and len(output.shape) > 2 and output.shape[1:] != size:
            raise UsageError(
                f"--dynamic-size: output {output.name} of {spec.name} is not as large as the input",
                hint="use --input-size, with one bundle for each size",
            )
    wanted = 2 if spec.head.task == "binary" else spec.num_classes
    if spec.labels and len(spec.labels) != wanted:
        raise BadInputError(
            f"--preprocess {options.preprocess}: {len(spec.labels)} labels, {spec.name} has {spec.head.counted}",
            hint="give two labels, the no first, or leave them out"
            if spec.head.task == "binary"
            else "give one label for each class, or leave them out"
            if spec.head.task != "embedding"
            else "leave them out: labels are for classes and quantities",
        )
    return spec


def resolve_before_download(options: ExportOptions) -> ModelSpec | None:
    """The same network with random weights, to check its memory before weights are downloaded for it.

    None if no weights are downloaded. Raises the errors of `resolve`.
    """
    source = source_of(options.model)
    if options.weights == "none" or weights_files.looks_like_file(options.weights) or source.own_code:
        return None
    transforms = options.transforms
    if source.listed:
        _module(source.name).check_model(options.model)
        weights = weights_files.by_name(options.model, options.weights, option="--weights")
        if weights_files.place_of(weights).is_file():
            return None
        transforms = transforms or weights.name
    return resolve(
        dataclasses.replace(
            options,
            weights="none",
            transforms=transforms,
            weights_key=None,
            renames=(),
            skip_weights=(),
            init_missing=(),
            allow_pickle=False,
        )
    )


def _refuse_torchvisions(options: ExportOptions) -> None:
    for option, given in (
        ("--transforms", options.transforms),
        ("--transform-input", options.transform_input),
    ):
        if given is not None:
            raise UsageError(f"{option}: {options.model} is not a torchvision model", hint="leave it out")


def _refuse_without_file(options: ExportOptions) -> None:
    """Refuse options for a weights file if there is none: a forgotten --weights would export an untrained network."""
    for option, given in (
        ("--weights-key", options.weights_key),
        ("--rename", options.renames),
        ("--skip-weights", options.skip_weights),
        ("--init-missing", options.init_missing),
        ("--allow-pickle", options.allow_pickle),
    ):
        if given:
            raise UsageError(
                f"{option}: {options.model} is exported without a weights file",
                hint="give --weights FILE, or leave it out",
            )


def footprint(spec: ModelSpec) -> memory.Footprint | None:
    """Memory footprint of the network, from shapes alone. None for user code, which may do anything.

    Raises:
        BadInputError: the network refuses its arguments or the input size.
    """
    if _BY_NAME[spec.zoo].own_code:
        return None
    shapes_only = dataclasses.replace(spec, weights_kind="random")
    p = spec.preprocess
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        with memory.without_memory():
            module: nn.Module = _module(spec.zoo).construct(shapes_only, None)
        try:
            size = spec.sizes.max if spec.sizes is not None else (p.crop_height, p.crop_width)
            return memory.footprint(module, *size, p.channels)
        except Exception as error:
            raise BadInputError(
                f"{spec.name} does not run at input {p.crop_height}x{p.crop_width}: {error}",
                hint="choose another --input-size",
            ) from error


def expected_memory(spec: ModelSpec, options: ExportOptions) -> int | None:
    """Expected peak memory of a whole export, in bytes. None for user code, which may do anything.

    Raises:
        BadInputError: as `footprint`.
    """
    found = footprint(spec)
    if found is None:
        return None
    return memory.expected_bytes(found, calibrated=options.uses_ranges, batch=options.batch.max)


def build(spec: ModelSpec) -> tuple[nn.Module, state_dicts.LoadReport]:
    """Build the eval-mode model; returns it with a report of what was loaded.

    Raises:
        BadInputError: the weights do not fit, or the architecture refuses the input size.
    """
    loaded = state_dicts.Loaded({})
    state: dict[str, torch.Tensor] | None = None
    if spec.weights_path is not None:
        loaded = state_dicts.read_weights(spec.weights_path, spec.reading)
        state = loaded.state
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(spec.seed)
        model: nn.Module = _module(spec.zoo).construct(spec, state)
        initialized: list[str] = []
        if spec.weights_kind == "random":
            make_usable(model, spec)
        elif state is not None:
            initialized = state_dicts.load_into(
                model,
                state,
                origin=str(spec.weights_path),
                init_missing=spec.init_missing,
                versions=loaded.versions,
            )
        elif state_dicts.state_digest(model) != spec.weights_sha256:  # `resolve` built it, too
            raise BadInputError(
                f"{spec.name}: has different weights each time it is built",
                hint="seed NumPy's and Python's random numbers yourself: only PyTorch's are seeded",
            )
    if spec.fully_convolutional:
        p = spec.preprocess
        least = spec.sizes.min if spec.sizes is not None else (p.crop_height, p.crop_width)
        model = fully_convolutional.fully_convolutional(model.eval(), *least)
    if spec.sizes is not None:
        dynamic_size.check(model, spec.name)
    report = state_dicts.LoadReport(initialized, list(loaded.skipped), loaded.entry, list(loaded.others))
    return model.eval(), report
