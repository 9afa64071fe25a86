"""The user's own networks: `path/to/file.py:FUNCTION` or `package.module:FUNCTION`."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from export_zoo.base.errors import BadInputError, UsageError
from export_zoo.exporter.models.eager import outputs_of
from export_zoo.exporter.models.model_arguments import value_of
from export_zoo.exporter.models.preprocessing import read_preprocess, resized
from export_zoo.exporter.models.spec import ModelSpec
from export_zoo.exporter.models.weights import state_dicts as weights_room
from export_zoo.exporter.models.weights import weights_files
from export_zoo.exporter.options import ExportOptions

_files: dict[tuple[Path, int], ModuleType] = {}
"""Those that were imported, by place and time of their last change: registries take a name but once."""


def _imported(source: str, model: str) -> ModuleType:
    """The module of `FILE.py` or of `package.module`; what it imports from beside it is found."""
    path = Path(source)
    is_file = source.endswith(".py")
    if is_file and not path.is_file():
        raise BadInputError(f"{model}: no such file: {source}", hint="give FILE.py:FUNCTION")
    known = (path.resolve(), path.stat().st_mtime_ns) if is_file else None
    if known in _files:
        return _files[known]
    folder = str(path.resolve().parent if is_file else Path.cwd())
    if folder not in sys.path:  # kept there: functions import when they are called, too
        sys.path.append(folder)  # last: a profile.py in it is not the standard library's
    try:
        if known is None:
            return importlib.import_module(source)
        name = f"export_zoo_user_{path.stem}"
        found = importlib.util.spec_from_file_location(name, path)
        assert found is not None
        assert found.loader is not None
        module = importlib.util.module_from_spec(found)
        sys.modules[name] = module  # dataclasses and pickle look there
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == source.partition(".")[0]:
            raise BadInputError(
                f"{model}: no module {error.name!r} here",
                hint="give FILE.py:FUNCTION, or a module that is installed or in this directory",
            ) from error
        raise BadInputError(
            f"{model}: {source} cannot be imported: {type(error).__name__}: {error}",
            hint="it must import where export-zoo runs; for relative imports give package.module:FUNCTION",
        ) from error
    _files[known] = module
    return module


def _factory(model: str) -> Callable[..., Any]:
    source, _, name = model.rpartition(":")
    if not source or not name.isidentifier():
        raise UsageError(
            f"model {model!r}: not FILE.py:FUNCTION or package.module:FUNCTION",
            hint="for example models/net.py:build",
        )
    with contextlib.redirect_stdout(sys.stderr):
        module = _imported(source, model)
    found = getattr(module, name, None)
    if not callable(found):
        named = [n for n in vars(module) if callable(getattr(module, n)) and not n.startswith("_")]
        near = difflib.get_close_matches(name, named, n=3)
        raise BadInputError(
            f"{model}: {source} has no function {name!r}",
            hint=f"did you mean {' or '.join(near)}?" if near else "name a function that returns the network",
        )
    # A copy: it is kept with its file, and weights are loaded into what is exported.
    return (lambda: copy.deepcopy(found)) if isinstance(found, nn.Module) else found


def _made(model: str, arguments: Mapping[str, Any], seed: int, size: tuple[int, int]) -> nn.Module:
    """In eval mode, on the CPU, with the types of its weights as they are."""
    factory = _factory(model)
    shown = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        raise BadInputError(
            f"{model}: cannot be called with ({shown}): {error}",
            hint="--num-classes and --model-arg become its keyword arguments",
        ) from error
    except ValueError:  # no signature to ask
        pass
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                made = factory(**arguments)
        except (Exception, SystemExit) as error:
            raise BadInputError(
                f"{model}: called with ({shown}), it raises {type(error).__name__}: {error}",
                hint="--num-classes and --model-arg become its keyword arguments",
            ) from error
        while isinstance(made, nn.Module) and isinstance(inner := _wrapped(made), nn.Module):
            made = inner
        if isinstance(made, nn.Module):
            made = made.cpu().eval()
            _materialize(made, size)
    if not isinstance(made, nn.Module) or isinstance(made, torch.jit.ScriptModule):
        raise BadInputError(
            f"{model}: returns {type(made).__name__}, not a torch.nn.Module",
            hint="name a function that returns the network, not scripted or traced",
        )
    return made


def _materialize(module: nn.Module, size: tuple[int, int]) -> None:
    """Give lazy layers their shapes, which a first run decides."""
    if any(isinstance(part, LazyModuleMixin) for part in module.modules()):
        with contextlib.suppress(Exception), torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
            module(torch.zeros(2, 3, *size))  # where it does not run, `outputs_of` says so


def _wrapped(module: nn.Module) -> object:
    """What torch.compile, DataParallel and DistributedDataParallel wrap."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return module.module
    return getattr(module, "_orig_mod", None)


def _arguments(spec_args: tuple[tuple[str, str], ...], num_classes: int | None) -> dict[str, Any]:
    classes = {} if num_classes is None else {"num_classes": num_classes}
    return {**classes, **{key: value_of(key, text) for key, text in spec_args}}


def resolve(options: ExportOptions) -> ModelSpec:
    """Import the factory and call it once, to see outputs and weights.

    Raises:
        BadInputError: it cannot be imported or called, or its network is none for images.
        UsageError: no `--preprocess`.
    """
    model = options.model
    assert options.preprocess is not None
    preprocess, labels = read_preprocess(options.preprocess)
    preprocess = resized(preprocess, options)
    size = (preprocess.crop_height, preprocess.crop_width)
    module = _made(model, _arguments(options.model_args, options.num_classes), options.seed, size)
    kinds = {str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.is_floating_point()}
    notes = tuple(
        f"{model}: its weights are {kind}: exported, and compared, as float32"
        for kind in sorted(kinds - {"float32"})
    )
    module = module.float()
    outputs = outputs_of(module, *size, model)
    weights = weights_files.chosen(options, "factory", "as the factory returns them")
    if weights.kind == "factory":
        weights = dataclasses.replace(weights, sha256=weights_room.state_digest(module))
    source, _, function = model.rpartition(":")
    return ModelSpec.of(
        options,
        zoo="python",
        name=function,
        weights=weights,
        preprocess=preprocess,
        labels=labels,
        outputs=outputs,
        factory=f"{_told(Path(source))}:{function}",
        factory_path=source,
        notes=notes,
        version=uuid.uuid4().hex,  # the code may be any: the cache cannot tell when it changed
    )


def _told(source: Path) -> str:
    """As it was given where that is relative: no machine's folders get into the bundle."""
    return source.name if source.is_absolute() or ".." in source.parts else source.as_posix()


def construct(spec: ModelSpec, state: Mapping[str, torch.Tensor] | None) -> nn.Module:
    """The network as the factory returns it."""
    del state
    arguments = _arguments(spec.model_args, spec.num_classes_given)
    size = (spec.preprocess.crop_height, spec.preprocess.crop_width)
    return _made(f"{spec.factory_path}:{spec.name}", arguments, spec.seed, size).float()
