"""Networks as users write them: for tests of `FILE.py:FUNCTION`, which imports this file."""

from __future__ import annotations

import itertools
import warnings
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import nn
from torchvision.models import VisionTransformer, mnasnet0_5


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


def vision_transformer() -> nn.Module:
    """vit_b_32 with 2 of 12 layers, and a twelfth of its width."""
    return VisionTransformer(
        image_size=64, patch_size=32, num_layers=2, num_heads=2, hidden_dim=64, mlp_dim=256, num_classes=10
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

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.species, self.age = nn.Linear(16, 10), nn.Linear(16, 4)

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


class Taps(nn.Module):
    """Outputs that other layers read: the image itself, before and after an activation, and behind a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.flat, self.head = nn.Linear(8, 8), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        before = self.first(x)
        after = before.relu()
        pooled = self.flat(self.second(after).mean(dim=(2, 3)))
        return {
            "scores": self.head(pooled),
            "image": x,
            "before": before,
            "after": after,
            "view": after.flatten(1),
            "pooled": pooled,
        }


class Scores(NamedTuple):
    scores: torch.Tensor
    features: torch.Tensor


class Named(nn.Module):
    """A named tuple, and a word on stdout each time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        print("made")

    def forward(self, x: torch.Tensor) -> Scores:
        print("run")
        found = self.conv(x).mean(dim=(2, 3))
        return Scores(found, found.relu())


class Noisy(nn.Module):
    """Dropout that is always on."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(self.fc(x.mean(dim=(2, 3))), training=True)


class Trains(nn.Module):
    """BatchNorm that goes on learning."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm2d(3), nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.norm.train()
        return self.fc(self.norm(x).mean(dim=(2, 3)))


class Branches(nn.Module):
    """A branch on values."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc(x.mean(dim=(2, 3)))
        return x if x.sum() > 0 else -x


class SameSize(nn.Module):
    """Scores at 64x64 places, whatever the image's size."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(self.scores(x), size=(64, 64), mode="bilinear", align_corners=False)


class Clashes(nn.Module):
    def __init__(self, name: str = "input") -> None:
        super().__init__()
        self.name, self.fc = name, nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {self.name: self.fc(x.mean(dim=(2, 3)))}


class Two(nn.Module):
    """Two rows, for any number of images."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3))[:2]


def half() -> nn.Module:
    return padded().half()


def wrapped() -> nn.Module:
    return torch.compile(nn.DataParallel(padded()))  # type: ignore[return-value]


def scripted() -> nn.Module:
    return torch.jit.script(padded())


class Sum(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum()


class Argmax(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3)).argmax(dim=1)


class Gray(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean(dim=(2, 3))


class Double(nn.Module):
    """Logits that a prior in double precision is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.prior = nn.Linear(3, 4), torch.zeros(4, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.mean(dim=(2, 3))) + self.prior


class Masked(nn.Module):
    """A class that is never chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.mean(dim=(2, 3))) + torch.tensor([0.0, 0.0, 0.0, -torch.inf])


class Lazy(nn.Module):
    """Layers that learn their shapes when they are run first."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.LazyConv2d(8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class Inner(nn.Module):
    """torchvision's MNASNet, which refuses a state dict of no version, as a part."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mnasnet0_5(weights=None, num_classes=6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def unseeded() -> nn.Module:
    """Other weights each time."""
    network = padded()
    nn.init.constant_(network.head.bias, next(_numbers))
    return network


def trained() -> nn.Module:
    """Weights that the function loads itself."""
    network = padded()
    for parameter in network.parameters():
        nn.init.constant_(parameter, 0.5)
    return network


_numbers = itertools.count()


def breaks() -> nn.Module:
    raise RuntimeError("no licence server")


def leaves() -> nn.Module:
    raise SystemExit(3)


def text() -> str:
    return "resnet"


made = padded()
NOT_CALLABLE = 3


class Small(nn.Module):
    """A convolution, a mean and a dense layer: what the networks below are made of."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Linear(8, num_classes)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).relu()

    def head(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.mean((2, 3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class Stretched(Small):
    """The epsilon keeps an even image from 0 / 0, and the factor from 1 is no identity."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        return super().forward((x - low) / (high - low + 1e-8) * (1 + 8e-6))


class InPlace(Small):
    """Changes its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.sub_(0.45)
        return super().forward(x)


class Autocast(Small):
    """Runs under autocast, as in training."""

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class WithoutLoss(Small):
    """Its second output is a loss, which needs labels."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        logits = super().forward(x)
        return logits, None, logits.relu()


class Counter(Small):
    """Counts its runs in a buffer, which changes no logit."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return super().forward(x)


class NoStatistics(Small):
    """BatchNorm over the batch at hand."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(x)))


class Squeezed(Small):
    """squeeze() drops the batch dimension of one image, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(nn.functional.adaptive_avg_pool2d(self.body(x), 1).squeeze())


class Unrolled(Small):
    """A loop over the images."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.stack([self.body(image[None])[0] for image in x]))


class Unpooled(nn.Module):
    """Pooling indices are read again, as in SegNet."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 8), (8, 8), (8, 5)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled, where = nn.functional.max_pool2d(self.a(x).relu(), 2, return_indices=True)
        return self.c(nn.functional.max_unpool2d(self.b(pooled).relu(), where, 2))


class Guarded(Small):
    """The logarithm of a guarded probability, a guarded reciprocal and a guarded negative power."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        power = x.pow(2).mean((1, 2, 3), keepdim=True)
        x = x * (power + 1e-9).pow(-0.5) * torch.reciprocal(power + 1e-9)
        return torch.log(self.head(x).softmax(1).clamp(min=1e-7))


def observed() -> nn.Module:
    """Prepared for quantization-aware training."""
    network = Small().train()
    network.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    return torch.ao.quantization.prepare_qat(network)


class Folded(Small):
    """fold() becomes Col2Im, which ONNX Runtime has and TensorRT does not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        unfolded = nn.functional.unfold(x, 3, padding=1)
        return self.head(nn.functional.fold(unfolded, x.shape[2:], 3, padding=1))


class Headed(Small):
    """One body, and heads of all kinds."""

    def __init__(self, kind: str = "logit", num_classes: int = 4, channels: int = 3) -> None:
        super().__init__(1 if kind in ("logit", "number", "yes") else num_classes)
        self.kind = kind
        self.conv = nn.Conv2d(channels, 8, 3, stride=2, padding=1)
        nn.init.normal_(self.fc.weight, std=4.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.body(x)
        values = self.head(features)
        if self.kind == "tokens":
            return self.fc(features.flatten(2).transpose(1, 2))
        if self.kind in ("mask", "depth"):
            plane = features.mean(1, keepdim=True) - 0.3
            plane = nn.functional.interpolate(plane, size=x.shape[-2:], mode="bilinear")
            return plane.sigmoid() if self.kind == "mask" else plane
        return {
            "logit": lambda: values,
            "number": lambda: 40 + 10 * values.squeeze(1),
            "yes": lambda: values.sigmoid(),
            "labels": lambda: (8 * values).sigmoid(),  # often 1.0 exactly
            "shares": lambda: values.softmax(1),
            "quantities": lambda: 40 + 10 * values,
            "directions": lambda: nn.functional.normalize(values, dim=1),
            "averages": lambda: features.mean((2, 3)).clamp(0, 1),  # in [0, 1], but no probabilities
        }[self.kind]()


class Amplified(Small):
    """A sigmoid far on its left: ONNX Runtime's is exact to 1e-7, which the small values of this one show."""

    def __init__(self) -> None:
        super().__init__()
        self.squash = nn.Sigmoid()
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1e3 * self.head(self.squash(0.02 * self.conv(x) - 8))


class Warns(Small):
    """Warns of its input, and of a later version."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_exporting():
            warnings.warn("the image has an odd size", UserWarning, stacklevel=1)
            warnings.warn("a later version changes this", FutureWarning, stacklevel=1)
        return super().forward(x)


class Faint(Small):
    """Activations of a millionth, scaled back at the end: half has few bits there, and sees no overflow."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = ((self.body(x) * 1e-3).relu() * 1e-3).relu()
        return self.head((x * 1e3).relu() * 1e3)


class Jittery(Small):
    """A residue of large numbers: each kernel's rounding gives another."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.remainder(torch.round(super().forward(x) * 1e6), 7)
