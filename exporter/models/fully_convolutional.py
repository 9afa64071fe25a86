"""VGG and AlexNet for any input size: Linear layers become convolutions, and the scores of all positions are averaged.

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
        UsageError: the model is neither a VGG nor AlexNet.
    """
    if not name.startswith("vgg") and name != "alexnet":
        raise UsageError(
            f"{OPTION}: {name} has no Linear layers that need a feature map of one size",
            hint="leave it out: it is for VGG and AlexNet only",
        )


class FullyConvolutional(nn.Module):
    """A VGG or AlexNet whose Linear layers are convolutions.

    The module names, and so the paths in the graph, are those of the original model. At the input size that the model
    was trained at, the score map has one position, and the logits are those of the original model.
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
    """The convolution that equals `linear` on a feature map of the kernel's size. It shares the storage of `linear`."""
    channels = linear.in_features // (kernel[0] * kernel[1])
    with torch.device("meta"):  # real initial weights would take seconds and be discarded
        made = nn.Conv2d(channels, linear.out_features, kernel)
    made.weight = nn.Parameter(linear.weight.view(made.weight.shape))
    made.bias = linear.bias
    return made


def fully_convolutional(model: nn.Module, height: int, width: int) -> FullyConvolutional:
    """Convert an eval-mode VGG or AlexNet to convolutions, for inputs of at least height x width pixels.

    Raises:
        BadInputError: the feature map of such an input is smaller than the first Linear layer needs.
    """
    if not isinstance(model, VGG | AlexNet):
        raise BadInputError(
            f"{OPTION}: {type(model).__name__} is neither a VGG nor AlexNet", hint="leave it out"
        )
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
    """Height and width of the feature map for an input size; 0x0 if the layers do not run at that size."""
    with torch.inference_mode():
        try:
            found = features(torch.zeros(1, 3, height, width))
        except RuntimeError:
            return 0, 0
    return int(found.shape[2]), int(found.shape[3])
