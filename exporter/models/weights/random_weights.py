"""Usable random weights: the logits vary with the input, so that parity has something to compare."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from export_zoo.base.errors import BadInputError
from export_zoo.calibration.preprocess import normalize
from export_zoo.calibration.synthetic import synthetic_images
from export_zoo.exporter.models.spec import ModelSpec

RESIDUAL_GAIN = 0.25
"""Largest gain of residual branches. With more than 16 branches, the gain is one over the square root of their number
(De & Smith 2020, arXiv 2002.10444, section 3). Without this limit, a random network of 80 blocks is chaotic: 20 dB
between two orders of summation in FP32."""


def _last_norm_of_branch(block: nn.Module) -> nn.BatchNorm2d | None:
    """The BatchNorm that ends a residual branch: in ResNets, MobileNets, EfficientNets, MNASNets and RegNets."""
    if isinstance(block, Bottleneck):
        return block.bn3  # type: ignore[return-value]
    if isinstance(block, BasicBlock):
        return block.bn2  # type: ignore[return-value]
    branches = {
        "use_res_connect": ("conv", "block"),  # MobileNetV2, MobileNetV3, EfficientNet
        "apply_residual": ("layers",),  # MNASNet
        "proj": ("f",),  # RegNet
    }
    for flag, names in branches.items():
        for name in names:
            branch = getattr(block, name, None)
            if (
                hasattr(block, flag)
                and getattr(block, flag) is not False
                and isinstance(branch, nn.Sequential)
            ):
                norms = [m for m in branch.modules() if isinstance(m, nn.BatchNorm2d)]
                return norms[-1] if norms else None
    return None


def make_usable(model: nn.Module, spec: ModelSpec) -> None:
    """Give random weights logits that vary with the input, so that parity has something to compare.

    A user's network is reset to its layers' own initialization, whatever weights its function gave it.

    ViT's head, and some of timm's, are initialized to zero and ConvNeXt's layer scale to 1e-6; both are initialized
    again. BatchNorm's untrained statistics let activations vanish or explode; they are estimated on a few seeded images
    instead. Residual branches start small, as in training (Goyal et al. 2017, arXiv 1706.02677, section 5.1, start at
    0): at full strength, a random ResNet is so chaotic that one flipped rounding tie decides its answer.
    """
    if spec.zoo == "python":  # the user's function may have loaded trained weights
        for module in model.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    lasts = [last for module in model.modules() if (last := _last_norm_of_branch(module)) is not None]
    gain = min(RESIDUAL_GAIN, max(1, len(lasts)) ** -0.5)
    for last_norm in lasts:
        if getattr(last_norm, "weight", None) is not None:  # InstanceNorm2d has none
            nn.init.constant_(last_norm.weight, gain)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("heads"):
            module.reset_parameters()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not bool(module.weight.any()):
            module.reset_parameters()  # a head that timm starts at 0
        if isinstance(module, nn.BatchNorm2d) and module.affine and not bool(module.weight.any()):
            nn.init.constant_(module.weight, RESIDUAL_GAIN)  # a branch that timm, or the user, starts at 0
    for name, parameter in model.named_parameters():
        own = name.rpartition(".")[2]
        if own.startswith(("layer_scale", "gamma")):  # torchvision's, timm's
            nn.init.ones_(parameter)
        elif "gain" in own and not bool(parameter.any()):  # of branches without BatchNorm
            nn.init.constant_(parameter, RESIDUAL_GAIN)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    height, width = spec.preprocess.crop_height, spec.preprocess.crop_width
    pixels = synthetic_images(8 if height * width <= 320 * 320 else 4, spec.preprocess, spec.seed)
    with torch.inference_mode():
        try:
            model(torch.from_numpy(normalize(pixels, spec.preprocess)))
        except Exception as error:
            raise BadInputError(
                f"{spec.name} does not run at input {height}x{width}: {error}",
                hint="choose another --input-size or --dynamic-size",
            ) from error
