"""A tiny network, and how networks are made for tests."""

from __future__ import annotations

import torch
from torch import nn


class Tiny(nn.Module):
    """A network of the parts of zoo networks: Conv, BatchNorm, branches, pooling, token-wise and dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.block = nn.ModuleDict({"left": nn.Conv2d(16, 16, 1), "right": nn.Conv2d(16, 16, 1)})
        self.norm = nn.BatchNorm2d(16)
        self.tokens = nn.Linear(16, 12)
        self.head = nn.Linear(12, 10)
        self.stem[1].running_mean.normal_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(self.block["left"](x)) + self.block["right"](x)
        x = torch.relu(self.norm(x))
        x = torch.tanh(self.tokens(x.flatten(2).transpose(1, 2)))
        return self.head(x.mean(1))


def made(module_class: type[nn.Module]) -> nn.Module:
    """The network with seeded weights, in eval mode."""
    torch.manual_seed(0)
    return module_class().eval()
