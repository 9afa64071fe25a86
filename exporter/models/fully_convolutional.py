"""VGG and AlexNet for any input size: their Linear layers as convolutions, and the scores of all places averaged.

Dense evaluation (Simonyan & Zisserman 2014, "Very Deep Convolutional Networks", arXiv 1409.1556, section 3.2).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torchvision.models import VGG, AlexNet

from export_zoo.base.errors import BadInputError, UsageError

OPTION = "--fully-convolutional"


def check(name: str) -> None:
    """Refuse models without such Linear layers, by their name in the zoo, before weights are downloaded.

    Raises:
        UsageError: neither a VGG nor AlexNet.
    """
    if not name.startswith("vgg") and name != "alexnet":
        raise UsageError(
            f"{OPTION}: {name} has no Linear layers that a feature map of one size only fits",
            hint="it is for VGG and AlexNet: leave it out",
        )


class FullyConvolutional(nn.Module):
    """The module names, and so the paths in the graph, are those of the model that it is made of.

    At the size that the model was trained at, the score map is one place, and the logits are the model's.
    """

    def __init__(self, model: VGG | AlexNet) -> None:
        super().__init__()
        self.features = model.features
        self.kernel = cast("tuple[int, int]", model.avgpool.output_size)
        layers: list[nn.Module] = []
        for layer in model.classifier:
            if isinstance(layer, nn.Linear):
                layers.append(_convolution(layer, (1, 1) if _has_convolution(layers) else self.kernel))
            else:
                layers.append(layer)
        self.classifier = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [N, 3, H, W] -> logits [N, classes]."""
        scores: torch.Tensor = self.classifier(self.features(x))
        return scores.mean((2, 3))


def _has_convolution(layers: list[nn.Module]) -> bool:
    return any(isinstance(layer, nn.Conv2d) for layer in layers)


def _convolution(linear: nn.Linear, kernel: tuple[int, int]) -> nn.Conv2d:
    """The convolution that is `linear` on a feature map of the kernel's size; shares its storage."""
    channels = linear.in_features // (kernel[0] * kernel[1])
    with torch.device("meta"):  # its own initial weights would take seconds, and be thrown away
        made = nn.Conv2d(channels, linear.out_features, kernel)
    made.weight = nn.Parameter(linear.weight.view(made.weight.shape))
    made.bias = linear.bias
    return made


def fully_convolutional(model: nn.Module, height: int, width: int) -> FullyConvolutional:
    """An eval-mode VGG or AlexNet as a network of convolutions, for inputs of height x width pixels and more.

    Raises:
        BadInputError: the feature map of such an input is smaller than the first Linear layer wants it.
    """
    if not isinstance(model, VGG | AlexNet):
        raise BadInputError(f"{OPTION}: {type(model).__name__} is no VGG or AlexNet", hint="leave it out")
    made = FullyConvolutional(model).eval()
    rows, columns = _feature_map(made.features, height, width)
    if rows < made.kernel[0] or columns < made.kernel[1]:
        raise BadInputError(
            f"{OPTION}: the feature map of input {height}x{width} is {rows}x{columns}, smaller than the kernel "
            f"{made.kernel[0]}x{made.kernel[1]} that the first Linear layer becomes",
            hint="choose an input of 224x224 or more: --input-size, or MIN of --dynamic-size",
        )
    return made


def _feature_map(features: nn.Module, height: int, width: int) -> tuple[int, int]:
    """Its size for an input; 0x0 where the layers do not run at that."""
    with torch.inference_mode():
        try:
            found = features(torch.zeros(1, 3, height, width))
        except RuntimeError:
            return 0, 0
    return int(found.shape[2]), int(found.shape[3])
