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
from export_zoo.exporter.models.eager import probe
from export_zoo.exporter.models.model_arguments import value_of
from export_zoo.exporter.models.preprocessing import read_preprocess, resized
from export_zoo.exporter.models.spec import ModelSpec
from export_zoo.exporter.models.weights import state_dicts, weights_files
from export_zoo.exporter.options import ExportOptions

_files: dict[tuple[Path, int], ModuleType] = {}
"""Imported modules, by path and modification time. A file is imported once: registries refuse the same name twice."""


def _imported(source: str, model: str) -> ModuleType:
    """Import `FILE.py` or `package.module`. Its own imports from the same directory work, too."""
    path = Path(source)
    is_file = source.endswith(".py")
    if is_file and not path.is_file():
        raise BadInputError(f"{model}: no such file: {source}", hint="give FILE.py:FUNCTION")
    known = (path.resolve(), path.stat().st_mtime_ns) if is_file else None
    if known in _files:
        return _files[known]
    folder = str(path.resolve().parent if is_file else Path.cwd())
    if folder not in sys.path:  # stays there: functions may import when they are called
        sys.path.append(folder)  # last: a profile.py there must not replace the standard library's
    try:
        if known is None:
            return importlib.import_module(source)
        name = f"export_zoo_user_{path.stem}"
        found = importlib.util.spec_from_file_location(name, path)
        assert found is not None
        assert found.loader is not None
        module = importlib.util.module_from_spec(found)
        sys.modules[name] = module  # dataclasses and pickle look it up there
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == source.partition(".")[0]:
            raise BadInputError(
                f"{model}: module {error.name!r} was not found",
                hint="give FILE.py:FUNCTION, or a module that is installed or in this directory",
            ) from error
        raise BadInputError(
            f"{model}: {source} cannot be imported: {type(error).__name__}: {error}",
            hint="make it importable where export-zoo runs; for relative imports give package.module:FUNCTION",
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
    # A copy: the module stays in `_files`, and weights are loaded into the network that is exported.
    return (lambda: copy.deepcopy(found)) if isinstance(found, nn.Module) else found


def _build(model: str, arguments: Mapping[str, Any], seed: int, shape: tuple[int, int, int]) -> nn.Module:
    """Call the factory. The network is in eval mode, on the CPU; the dtypes of its weights are unchanged."""
    factory = _factory(model)
    shown = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        raise BadInputError(
            f"{model}: cannot be called with ({shown}): {error}",
            hint="check --num-classes and --model-arg: they become its keyword arguments",
        ) from error
    except ValueError:  # no signature is available
        pass
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                made = factory(**arguments)
        except (Exception, SystemExit) as error:
            raise BadInputError(
                f"{model}: called with ({shown}), it raises {type(error).__name__}: {error}",
                hint="check --num-classes and --model-arg: they become its keyword arguments",
            ) from error
        while isinstance(made, nn.Module) and isinstance(inner := _wrapped(made), nn.Module):
            made = inner
        if isinstance(made, nn.Module):
            made = made.cpu().eval()
            _materialize(made, shape)
    if not isinstance(made, nn.Module) or isinstance(made, torch.jit.ScriptModule):
        raise BadInputError(
            f"{model}: returns {type(made).__name__}, not a torch.nn.Module",
            hint="name a function that returns the network, not scripted or traced",
        )
    return made


def _materialize(module: nn.Module, shape: tuple[int, int, int]) -> None:
    """Run the module once if it has lazy layers, which get their shapes from the first run."""
    if any(isinstance(part, LazyModuleMixin) for part in module.modules()):
        with contextlib.suppress(Exception), torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
            module(torch.zeros(2, *shape))  # if it does not run, `probe` reports that


def _wrapped(module: nn.Module) -> object:
    """The module that torch.compile, DataParallel or DistributedDataParallel wraps; None if there is none."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return module.module
    return getattr(module, "_orig_mod", None)


def _arguments(spec_args: tuple[tuple[str, str], ...], num_classes: int | None) -> dict[str, Any]:
    classes = {} if num_classes is None else {"num_classes": num_classes}
    return {**classes, **{key: value_of(key, text) for key, text in spec_args}}


def resolve(options: ExportOptions) -> ModelSpec:
    """Import the factory and call it once to find its outputs and weights.

    Raises:
        BadInputError: the factory cannot be imported or called, or its network does not take images.
        UsageError: the model is not FILE.py:FUNCTION or package.module:FUNCTION.
    """
    model = options.model
    assert options.preprocess is not None
    preprocess, labels = read_preprocess(options.preprocess)
    preprocess = resized(preprocess, options)
    arguments = _arguments(options.model_args, options.num_classes)
    module = _build(model, arguments, options.seed, preprocess.shape)
    kinds = {str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.is_floating_point()}
    notes = tuple(
        f"{model}: its weights are {kind}; they are exported and compared as float32"
        for kind in sorted(kinds - {"float32"})
    )
    module = module.float()
    weights = weights_files.chosen(options, "factory", "as the factory returns them")
    if weights.kind == "factory":  # before the network runs, which may change its buffers
        weights = dataclasses.replace(weights, sha256=state_dicts.state_digest(module))
    probed = probe(module, preprocess, model)
    source, _, function = model.rpartition(":")
    return ModelSpec.of(
        options,
        zoo="python",
        name=function,
        weights=weights,
        preprocess=preprocess,
        labels=labels,
        outputs=probed.outputs,
        factory=f"{_shown(Path(source))}:{function}",
        factory_path=source,
        notes=(*notes, *probed.notes),
        version=uuid.uuid4().hex,  # the cache cannot know when user code changes
    )


def _shown(source: Path) -> str:
    """The path as given, or only its file name if it is absolute or contains `..`.

    The bundle must not name this machine's folders.
    """
    return source.name if source.is_absolute() or ".." in source.parts else source.as_posix()


def construct(spec: ModelSpec, state: Mapping[str, torch.Tensor] | None) -> nn.Module:
    """The network as the factory returns it."""
    del state
    arguments = _arguments(spec.model_args, spec.num_classes_given)
    return _build(f"{spec.factory_path}:{spec.name}", arguments, spec.seed, spec.preprocess.shape).float()
