"""Networks as users write them: for tests of `FILE.py:FUNCTION`, which imports this file."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn


def padded(mode: str = "zeros", num_classes: int = 10) -> nn.Module:
    """Convolutions that pad by `mode`, in nn.Sequential; ceil_mode pooling, groups and dilation."""
    return nn.Sequential(
        OrderedDict(
            first=nn.Conv2d(3, 16, 5, stride=2, padding=2, padding_mode=mode, bias=False),
            norm=nn.BatchNorm2d(16),
            act=nn.ReLU(),
            pool=nn.MaxPool2d(3, stride=2, ceil_mode=True),
            grouped=nn.Conv2d(16, 32, 3, padding=1, groups=4, padding_mode=mode),
            swish=nn.Hardswish(),
            dilated=nn.Conv2d(32, 32, 3, padding=2, dilation=2, padding_mode=mode),
            relu=nn.ReLU(),
            average=nn.AvgPool2d(2, ceil_mode=True),
            spread=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            head=nn.Linear(32, num_classes),
        )
    )


class Registered(nn.Module):
    """Layers by ModuleList, ModuleDict and add_module; a residual that is added twice."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2)
        self.blocks = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(depth)])
        self.acts = nn.ModuleDict({"silu": nn.SiLU(), "gelu": nn.GELU()})
        self.add_module("fc 1", nn.Linear(width, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + self.acts["silu"](block(x)) + x
        x = self.acts["gelu"](x).mean(dim=(2, 3))
        return self.get_submodule("fc 1")(x)


class TwoHeads(nn.Module):
    """A dictionary of two classifications."""

    def __init__(self, wrong: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.species, self.age = nn.Linear(16, 10), nn.Linear(16, 4)
        self.wrong = wrong

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.body(x)
        return {"species": self.species(x), "age": self.age(x)}


class Pixels(nn.Module):
    """A tuple: class scores at each pixel, and of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU())
        self.scores, self.fc = nn.Conv2d(16, 5, 1), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        size = x.shape[-2:]
        x = self.body(x)
        scores = nn.functional.interpolate(self.scores(x), size=size, mode="bilinear", align_corners=False)
        return scores, self.fc(x.mean(dim=(2, 3)))


class Sum(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(dim=(1, 2, 3))


class Argmax(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3)).argmax(dim=1)


class Gray(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean(dim=(2, 3))


def breaks() -> nn.Module:
    raise RuntimeError("no licence server")


def leaves() -> nn.Module:
    raise SystemExit(3)


def text() -> str:
    return "resnet"


made = padded()
NOT_CALLABLE = 3
