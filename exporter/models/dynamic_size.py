"""Which networks take inputs of any size: what is known to fix one is refused by name, before it is exported."""

from __future__ import annotations

from torch import nn
from torchvision.models import MaxVit, SwinTransformer, VisionTransformer

from export_zoo.base.errors import UsageError

OPTION = "--dynamic-size"

_FIXED: dict[type[nn.Module], str] = {
    VisionTransformer: "its position embedding has one entry for each patch of one size",
    SwinTransformer: "the size decides how many windows it pads its feature maps to, and torch.export fixes that",
    MaxVit: "its windows, grids and position biases are made for one size",
}


def _pools_to_a_map(module: nn.Module) -> bool:
    """An adaptive pool to more than one place: its windows become those of the size that is traced."""
    if not isinstance(module, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d):
        return False
    wanted = module.output_size
    sides = wanted if isinstance(wanted, tuple) else (wanted, wanted)
    return any(side is not None and side > 1 for side in sides)


def check(model: nn.Module, name: str) -> None:
    """Refuse networks that fix their input's size; the exporter would do it in silence.

    Raises:
        UsageError: names the module, and what helps.
    """
    for path, module in model.named_modules():
        where = f"{path} ({type(module).__name__})" if path else type(module).__name__
        reason = next((text for kind, text in _FIXED.items() if isinstance(module, kind)), "")
        hint = "use --input-size: one size for each bundle"
        if _pools_to_a_map(module):
            reason = "it pools to more than one place, with windows that the exporter fixes"
            if name.startswith("vgg") or name == "alexnet":
                hint = "add --fully-convolutional, which needs no such pooling"
        if reason:
            raise UsageError(f"{OPTION}: {name} takes one size only, for its {where}: {reason}", hint=hint)
