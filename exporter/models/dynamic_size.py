"""Refuses networks that are known to need one input size, before the export. The error names the module."""

from __future__ import annotations

from torch import nn
from torchvision.models import MaxVit, SwinTransformer, VisionTransformer

from export_zoo.base.errors import UsageError

OPTION = "--dynamic-size"

_FIXED: dict[type[nn.Module], str] = {
    VisionTransformer: "its position embedding has one entry per patch, for one input size",
    SwinTransformer: "the size decides the number of windows in its padded feature maps, and torch.export fixes that",
    MaxVit: "its windows, grids and position biases are made for one input size",
}


def _pools_to_a_map(module: nn.Module) -> bool:
    """Whether `module` is an adaptive pool to more than one position: the export fixes its windows to one size."""
    if not isinstance(module, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d):
        return False
    wanted = module.output_size
    sides = wanted if isinstance(wanted, tuple) else (wanted, wanted)
    return any(side is not None and side > 1 for side in sides)


def check(model: nn.Module, name: str) -> None:
    """Refuse networks that need one input size; the exporter would fix it silently.

    Raises:
        UsageError: the network needs one input size. The message names the module, the hint a workaround.
    """
    for path, module in model.named_modules():
        where = f"{path} ({type(module).__name__})" if path else type(module).__name__
        reason = next((text for kind, text in _FIXED.items() if isinstance(module, kind)), "")
        hint = "use --input-size, with one bundle for each size"
        if _pools_to_a_map(module):
            reason = "it pools to more than one position, with windows that the exporter fixes"
            if name.startswith("vgg") or name == "alexnet":
                hint = "add --fully-convolutional, which needs no such pooling"
        if reason:
            raise UsageError(
                f"{OPTION}: {name} takes one input size only, because of its {where}: {reason}", hint=hint
            )
