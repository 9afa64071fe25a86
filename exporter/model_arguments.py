"""Values of `--model-arg KEY=VALUE`."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import yaml
from torch import nn

from calibration.errors import UsageError

_LAYER = re.compile(r"(?:torch\.)?(?:nn\.)?([A-Z]\w*)(?:\((\d+)\))?")


def value_of(key: str, text: str) -> Any:
    """YAML (numbers, true, lists, words), or for `*_layer` a class of `torch.nn`.

    `norm_layer=GroupNorm(8)` passes 8 as the class's first argument.

    Raises:
        UsageError: it is none of these, or has an option of its own.
    """
    if key == "num_classes":
        raise UsageError("--model-arg num_classes: use --num-classes", hint="leave it out")
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
