"""Run an eager module, whatever it returns."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from calibration.errors import BadInputError
from exporter.spec import Output

_PROBE_BATCH = 2


def run_eager(module: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The module's outputs by name: `logits` of a tensor, a mapping's own names, `logits`, `output_1`, ... of several.

    The order is that of the exported graph's outputs.

    Raises:
        BadInputError: it returns something else than floating point tensors.
    """
    found = module(images)
    if isinstance(found, torch.Tensor):
        named: dict[str, object] = {"logits": found}
    elif isinstance(found, Mapping):
        named = {str(name): value for name, value in found.items()}
    elif isinstance(found, (tuple, list)):
        named = {f"output_{i}" if i else "logits": value for i, value in enumerate(found)}
    else:
        named = {"logits": found}
    tensors = {n: v for n, v in named.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    if not tensors or len(tensors) < len(named):
        odd = ", ".join(f"{n} ({type(v).__name__})" for n, v in named.items() if n not in tensors)
        raise BadInputError(
            f"the network returns other than tensors of floating point numbers: {odd or 'nothing'}",
            hint="export a module that returns its logits, alone, as a tuple or as a dictionary",
        )
    return tensors


def outputs_of(module: nn.Module, height: int, width: int, model: str) -> tuple[Output, ...]:
    """The network's outputs, found by running it on two black images.

    Raises:
        BadInputError: it does not run, or gives other than [N, classes] or [N, classes, height, width].
    """
    try:
        with torch.inference_mode():
            found = run_eager(module, torch.zeros(_PROBE_BATCH, 3, height, width))
    except BadInputError:
        raise
    except Exception as error:
        raise BadInputError(
            f"{model}: does not run on float32 [{_PROBE_BATCH}, 3, {height}, {width}]: {error}",
            hint="choose another --input-size; networks take RGB images",
        ) from error
    for name, tensor in found.items():
        shape = list(tensor.shape)
        if tensor.ndim not in (2, 4) or shape[0] != _PROBE_BATCH or shape[1] < 2:
            raise BadInputError(
                f"{model}: output {name!r} is {shape} for {_PROBE_BATCH} images, not [N, classes] or "
                "[N, classes, height, width]",
                hint="return logits of two classes or more",
            )
    return tuple(Output(name, tuple(tensor.shape[1:])) for name, tensor in found.items())
