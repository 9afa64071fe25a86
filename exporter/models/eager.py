"""Run an eager module, whatever it returns."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping

import torch
from torch import nn

from export_zoo.base.errors import BadInputError
from export_zoo.exporter.models.spec import Output

_PROBE_BATCHES = (3, 2)


def run_eager(module: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run the module and return its outputs by name, in the order of the exported graph's outputs.

    A single tensor is named `logits`. A mapping or a named tuple keeps its own names. The outputs of a tuple or list
    are named `logits`, `output_1`, ...

    Raises:
        BadInputError: the module returns something other than floating-point tensors.
    """
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for our own results only
        found = module(images)
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
    tensors = {n: v for n, v in named.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    if not tensors or len(tensors) < len(named):
        odd = ", ".join(f"{n} ({type(v).__name__})" for n, v in named.items() if n not in tensors)
        raise BadInputError(
            f"the network returns something other than floating-point tensors: {odd or 'nothing'}",
            hint="export a module that returns its logits as a tensor, a tuple or a dictionary",
        )
    return tensors


def outputs_of(module: nn.Module, height: int, width: int, model: str) -> tuple[Output, ...]:
    """Outputs of an eval-mode network, found by running it on noise images.

    Raises:
        BadInputError: the network does not run, returns shapes other than [N, classes] or [N, classes, height, width],
            puts itself into training mode, or returns different values for the same images.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(max(_PROBE_BATCHES), 3, height, width, generator=generator)
    try:
        with torch.inference_mode():
            first, again, fewer = (
                run_eager(module, images[:batch]) for batch in (_PROBE_BATCHES[0], *_PROBE_BATCHES)
            )
    except BadInputError as error:
        raise BadInputError(f"{model}: {error.message}", hint=error.hint) from error
    except Exception as error:
        raise BadInputError(
            f"{model}: does not run on float32 [{_PROBE_BATCHES[0]}, 3, {height}, {width}]: {error}",
            hint="the network must take any number of RGB images; choose another size with --input-size",
        ) from error
    if training := [name for name, part in module.named_modules() if part.training]:
        raise BadInputError(
            f"{model}: puts {training[0] or 'itself'} into training mode when it runs",
            hint="leave out .train(): BatchNorm and dropout must be in eval mode",
        )
    for name, tensor in first.items():
        for batch, found in ((_PROBE_BATCHES[0], tensor), (_PROBE_BATCHES[1], fewer[name])):
            shape = list(found.shape)
            if found.ndim not in (2, 4) or shape[0] != batch or shape[1] < 2:
                raise BadInputError(
                    f"{model}: output {name!r} is {shape} for {batch} images, not [N, classes] or "
                    "[N, classes, height, width] with two classes or more",
                    hint="return logits of such a shape as a tensor, a tuple or a dictionary",
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
        if not torch.allclose(tensor, again[name], rtol=1e-3, atol=1e-3 * float(tensor.std())):
            raise BadInputError(
                f"{model}: output {name!r} differs between two runs on the same images",
                hint="leave out always-on dropout, random numbers and changing state: they cannot be compared",
            )
        if name == "input" or name in module.state_dict():
            raise BadInputError(
                f"{model}: output {name!r} has the name of {'the input' if name == 'input' else 'a parameter'}",
                hint="give that entry of the dictionary another name",
            )
    return tuple(Output(name, tuple(tensor.shape[1:])) for name, tensor in first.items())
