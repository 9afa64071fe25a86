"""Run an eager module, whatever it returns."""

from __future__ import annotations

import contextlib
import copy
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from export_zoo.base.errors import BadInputError
from export_zoo.base.package import PACKAGE
from export_zoo.calibration.preprocess import Preprocess
from export_zoo.engines.parity.tasks import guess, scores_of
from export_zoo.exporter.models.spec import Output

_IMAGES = 3
"""Number of noise images that a network is probed with."""

_KEEP_THE_BATCH = (
    "squeeze() drops the batch dimension when there is one image: use flatten(1), or squeeze with a dimension"
)


_ALIKE = 1e-3
"""Difference, relative to the value and to the standard deviation of all, up to which values count as the same."""

AMPLIFIES = (
    "the network amplifies rounding, by a small difference of large numbers, by rounding or by a comparison: no two "
    "kernels give the same logits; compute that part otherwise, or scale it"
)


def line_of(error: BaseException) -> str:
    """The line of a network's own code that raised an error, such as "net.py:12, `if x.mean() > 0:`".

    Lines of installed packages and of export-zoo do not count. Empty if there are no others.
    """
    folders = [PACKAGE, *(PACKAGE / name for name in ("exporter", "engines", "calibration"))]
    folders += [Path(path) for path in sysconfig.get_paths().values()]
    installed = tuple(str(folder.resolve()) for folder in folders)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith("<") and not str(Path(frame.filename).resolve()).startswith(
            installed
        ):
            return f"{Path(frame.filename).name}:{frame.lineno}, `{frame.line}`"
    return ""


_entered: list[list[str]] = []
"""The lists that `without_autocast` yielded and that are still filled."""


@contextlib.contextmanager
def without_autocast() -> Iterator[list[str]]:
    """Run networks in the types of their weights. Yields a list with an entry for each `torch.autocast` entered.

    Autocast belongs to training and to GPUs. ONNX Runtime has no bfloat16 convolutions on the CPU, and precisions are
    chosen when an engine is built.
    """
    cls = torch.amp.autocast_mode.autocast
    enter, leave = cls.__enter__, cls.__exit__

    def note(self: torch.autocast) -> torch.autocast:
        for types in _entered if self._enabled else ():
            types.append(str(self.fast_dtype))
        return self

    _entered.append([])
    cls.__enter__, cls.__exit__ = note, lambda self, *_: None  # type: ignore[method-assign]
    try:
        yield _entered[-1]
    finally:
        _entered.pop()
        cls.__enter__, cls.__exit__ = enter, leave  # type: ignore[method-assign]


def run_eager(module: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run the module and return its outputs by name, in the order of the exported graph's outputs.

    A single tensor is named `logits`. A mapping or a named tuple keeps its own names. The outputs of a tuple or list
    are named `logits`, `output_1`, ... An output that is None is left out, as the exporter does.

    Raises:
        BadInputError: the module returns something other than floating-point tensors.
    """
    # stdout is for our own results only. The module may change its input in place.
    with contextlib.redirect_stdout(sys.stderr), without_autocast():
        found = module(images.clone())
    if isinstance(found, torch.Tensor):
        named: dict[str, object] = {"logits": found}
    elif isinstance(found, Mapping):
        named = {str(name): value for name, value in found.items()}
    elif isinstance(found, tuple) and hasattr(found, "_asdict"):
        named = dict(found._asdict())
    elif isinstance(found, (tuple, list)):
        named = {f"output_{i}" if i else "logits": value for i, value in enumerate(found)}
    else:
        named = {"logits": found}
    named = {name: value for name, value in named.items() if value is not None}  # a loss without labels
    tensors = {n: v for n, v in named.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    if not tensors or len(tensors) < len(named):
        kinds = {
            n: str(v.dtype) if isinstance(v, torch.Tensor) else type(v).__name__ for n, v in named.items()
        }
        odd = ", ".join(f"{n} ({kind})" for n, kind in kinds.items() if n not in tensors)
        raise BadInputError(
            f"the network returns something other than floating-point tensors: {odd or 'nothing'}",
            hint="export a module that returns its logits as a tensor, a tuple or a dictionary",
        )
    return tensors


@dataclass(frozen=True)
class Probed:
    """Facts about a network, found by running it on noise images."""

    outputs: tuple[Output, ...]
    notes: tuple[str, ...]
    """Warnings for the user."""


def probe(module: nn.Module, preprocess: Preprocess, model: str) -> Probed:
    """Find the outputs of an eval-mode network by running it on noise images, and check that it is a pure function.

    Raises:
        BadInputError: the network does not run, returns other shapes than [N], [N, classes], [N, tokens, classes] or
            [N, classes, height, width], puts itself into training mode, or returns different values for the same
            images: in another run, or in another batch.
    """
    _check_kind(module, model)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_IMAGES, *preprocess.shape, generator=generator)
    with torch.inference_mode(), without_autocast() as autocasts:
        with _LastOperators() as operators:
            first = _run_probe(module, images, model)
        again = _run_probe(module, images, model)
        fewer = _run_probe(module, images[:2], model)
        single = _run_probe(module, images[:1], model)
    if training := [name for name, part in module.named_modules() if part.training]:
        raise BadInputError(
            f"{model}: puts {training[0] or 'itself'} into training mode when it runs",
            hint="leave out .train(): BatchNorm and dropout must be in eval mode",
        )
    for name, tensor in first.items():
        for batch, found in ((_IMAGES, first), (2, fewer)):
            shape = list(found[name].shape)
            if len(shape) not in (1, 2, 3, 4) or shape[0] != batch or 0 in shape:
                raise BadInputError(
                    f"{model}: output {name!r} is {shape} for {batch} images, not [N], [N, classes], "
                    "[N, tokens, classes] or [N, classes, height, width]",
                    hint="return outputs of such a shape as a tensor, a tuple or a dictionary",
                )
        wanted, shape = [1, *tensor.shape[1:]], list(single[name].shape)
        if shape != wanted:
            raise BadInputError(
                f"{model}: output {name!r} is {shape} for one image, not {wanted}", hint=_KEEP_THE_BATCH
            )
        if tensor.dtype != torch.float32:
            raise BadInputError(
                f"{model}: output {name!r} is {str(tensor.dtype).removeprefix('torch.')}, not float32",
                hint="end with .float(): engines return float32",
            )
        if not bool(tensor.isfinite().all()):
            raise BadInputError(
                f"{model}: output {name!r} is not finite on noise images: NaN or infinity cannot be compared",
                hint="mask with a large negative number instead of -inf, or check whether the training diverged",
            )
        if not _alike(tensor, again[name]):
            raise BadInputError(
                f"{model}: output {name!r} differs between two runs on the same images"
                + _first_different(module, images, images),
                hint="leave out always-on dropout, random numbers and changing state: they cannot be compared",
            )
        for part, few in ((fewer[name], images[:2]), (single[name], images[:1])):
            if not _alike(tensor[: len(part)], part, spread=tensor):
                if rounding_error(module, images) > _ALIKE:
                    raise BadInputError(
                        f"{model}: output {name!r} of an image differs from batch to batch by rounding alone: computed "
                        "in double precision, it is another one, too",
                        hint=AMPLIFIES,
                    )
                raise BadInputError(
                    f"{model}: output {name!r} of an image depends on the other images in its batch"
                    + _first_different(module, images, few),
                    hint="a network for inference must not compute over the batch: BatchNorm needs running statistics "
                    "(track_running_stats=True) and eval mode; leave out means and sorting over dimension 0",
                )
        if name == "input" or name in module.state_dict():
            raise BadInputError(
                f"{model}: output {name!r} has the name of {'the input' if name == 'input' else 'a parameter'}",
                hint="give that entry of the dictionary another name",
            )
    notes = (f"{model}: runs under torch.autocast; it is exported and compared without it, in float32",)
    outputs = tuple(_output(name, tensor, operators.of(tensor)) for name, tensor in first.items())
    return Probed(outputs, notes if autocasts else ())


def _output(name: str, tensor: torch.Tensor, operator: str) -> Output:
    values = tensor.numpy()
    head = guess(values, operator)
    probabilities = scores_of(values) == "probabilities"
    return Output(name, tuple(values.shape[1:]), head.task, head.scores, probabilities)


class _LastOperators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the name of the operator that computed the memory of each tensor, such as `aten.sigmoid.default`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._by_memory: dict[int, str] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        found = func(*args, **(kwargs or {}))
        inputs = {arg.data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        # A view, such as that of squeeze, has its input's memory. An operator in place is no view.
        if isinstance(found, torch.Tensor) and (
            found.data_ptr() not in inputs
            or func._schema.is_mutable
            or found.data_ptr() not in self._by_memory
        ):
            self._by_memory[found.data_ptr()] = str(func)
        return found

    def of(self, tensor: torch.Tensor) -> str:
        return self._by_memory.get(tensor.data_ptr(), "")


def _check_kind(module: nn.Module, model: str) -> None:
    """Refuse networks for which a failure further on would give no useful hint."""
    for path, part in module.named_modules():
        if type(part).__module__.startswith("torch.ao."):
            raise BadInputError(
                f"{model}: is prepared or converted by torch.ao.quantization: {path} is a {type(part).__name__}",
                hint="return the float network, before prepare, prepare_qat and convert; --precision int8 quantizes it",
            )


def _run_probe(module: nn.Module, images: torch.Tensor, model: str) -> dict[str, torch.Tensor]:
    try:
        return run_eager(module, images)
    except BadInputError as error:
        raise BadInputError(f"{model}: {error.message}", hint=error.hint) from error
    except Exception as error:
        shape, line = list(images.shape), line_of(error)
        first = next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)
        hint = "the network must take any number of images; choose another size with --input-size"
        if len(images) < _IMAGES:
            hint = f"it runs on {_IMAGES} images: {_KEEP_THE_BATCH}"
        elif first is not None and first.in_channels != images.shape[1]:
            mode = {1: "`mode: L` (gray)", 3: "`mode: RGB`", 4: "`mode: RGBA`, or `mode: bands`"}
            hint = (
                f"the first convolution takes {first.in_channels} channel(s), and the preprocessing gives "
                f"{images.shape[1]}: give {mode.get(first.in_channels, '`mode: bands`')} in the --preprocess file, "
                "with as many values of mean and std"
            )
        raise BadInputError(
            f"{model}: does not run on float32 {shape}: {error}{f' ({line})' if line else ''}", hint=hint
        ) from error


def _alike(first: torch.Tensor, second: torch.Tensor, spread: torch.Tensor | None = None) -> bool:
    spread = first if spread is None else spread
    return torch.allclose(first, second, rtol=_ALIKE, atol=_ALIKE * float(spread.std()))


def rounding_error(module: nn.Module, images: torch.Tensor) -> float:
    """Largest difference of the first output, computed in float32 and in float64, relative to its standard deviation.

    0 if the network does not run in float64.
    """
    try:
        with torch.inference_mode():
            single = next(iter(run_eager(module, images).values())).double()
            double = next(iter(run_eager(copy.deepcopy(module).double(), images.double()).values()))
        return float((single - double).abs().max() / (double.std() + 1e-12))
    except Exception:  # a network may keep to float32
        return 0.0


def module_outputs(module: nn.Module, images: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Run the module once. Returns path and output of each inner module that returns one tensor, in order of execution.

    A module that runs several times is listed as often.
    """
    outputs: list[tuple[str, torch.Tensor]] = []

    def keep(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, torch.Tensor) and output.is_floating_point() and output.ndim > 0:
                outputs.append((path, output.clone()))

        return hook

    hooks = [part.register_forward_hook(keep(path)) for path, part in module.named_modules() if path]
    try:
        with torch.inference_mode():
            run_eager(module, images)
    finally:
        for handle in hooks:
            handle.remove()
    return outputs


def _first_different(module: nn.Module, images: torch.Tensor, other: torch.Tensor) -> str:
    """Names the first module whose output for `other`, the first of the images, differs between the two runs."""
    runs = module_outputs(module, images), module_outputs(module, other)
    for (path, before), (_, after) in zip(*runs, strict=False):
        if before.shape[1:] == after.shape[1:] and not _alike(before[: len(after)], after, spread=before):
            return (
                f", first seen in the output of module {path} ({type(module.get_submodule(path)).__name__})"
            )
    return ""
