"""Values of `--model-arg KEY=VALUE`."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from torch import nn

from export_zoo.base import yaml_text
from export_zoo.base.errors import UsageError

_LAYER = re.compile(r"(?:torch\.)?(?:nn\.)?([A-Z]\w*)(?:\((\d+)\))?")


def value_of(key: str, text: str, *, layers: bool = False) -> Any:
    """Parse a value: YAML (numbers, true, lists, words), or for `*_layer` a class of `torch.nn` if one has that name.

    `norm_layer=GroupNorm(8)` passes 8 as the class's first argument.

    Args:
        layers: whether `*_layer` takes only classes, as torchvision's networks do.

    Raises:
        UsageError: the value is none of these, or the argument has its own option.
    """
    if key == "num_classes":
        raise UsageError("--model-arg num_classes: use --num-classes", hint="leave it out")
    if key.endswith("_layer"):
        match = _LAYER.fullmatch(text)
        layer = getattr(nn, match[1], None) if match is not None else None
        if match is not None and isinstance(layer, type) and issubclass(layer, nn.Module):
            return layer if match[2] is None else partial(layer, int(match[2]))
        # Other networks may take numbers or their own names: `relu`, `LayerNorm2d`.
        if layers or text.endswith(")"):
            raise UsageError(
                f"--model-arg {key}={text}: not a class of torch.nn",
                hint=f"for example --model-arg {key}=GroupNorm(8)",
            )
    try:
        return yaml_text.load(text)
    except yaml_text.YAMLError as error:
        raise UsageError(
            f"--model-arg {key}={text}: not a number, true, false, a list or a word",
            hint=f"for example --model-arg {key}=[1,2]",
        ) from error
