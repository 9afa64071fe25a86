"""Train a torchvision network on scikit-learn's handwritten digits, in about a minute on one core.

    python examples/digits.py --model resnet18 --out demo/digits

writes `<model>.safetensors` and `images/<class>/<index>.png` (32x32, the 898 digits not trained on). The network
takes 32x32 inputs: export it with `--num-classes 10 --input-size 32 --resize-size 32`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn
from torchvision.models import get_model

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's, so that its transforms fit
EPOCHS = {"resnet18": 12, "mobilenet_v2": 30, "squeezenet1_1": 40, "vgg11_bn": 8, "mobilenet_v3_small": 40}
LEARNING_RATE = {"resnet18": 2e-3, "mobilenet_v2": 3e-3, "squeezenet1_1": 6e-4, "mobilenet_v3_small": 3e-3}
INPUT_SIZE = 32


def digits(size: int = INPUT_SIZE) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [1797, size, size, 3] and class indices [1797]; 8x8 digits scaled up."""
    data = load_digits()
    small = np.rint(data.images * 255 / 16).astype(np.uint8)
    images = [
        np.asarray(Image.fromarray(s).convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
        for s in small
    ]
    return np.stack(images), data.target


def tensor(pixels: np.ndarray) -> torch.Tensor:
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def train(
    name: str, seed: int = 0, make: Callable[[], nn.Module] | None = None, size: int = INPUT_SIZE
) -> tuple[nn.Module, float]:
    """Train on every other digit; returns the model and its top-1 accuracy on the rest.

    `make` makes the network that `name` means, where that is not torchvision's.
    On one thread: layers this small gain nothing from more, and suffer where cores are shared.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _train(name, seed, make or (lambda: get_model(name, weights=None, num_classes=10)), size)
    finally:
        torch.set_num_threads(threads)


def _train(name: str, seed: int, make: Callable[[], nn.Module], size: int) -> tuple[nn.Module, float]:
    torch.manual_seed(seed)
    pixels, labels = digits(size)
    x, y = tensor(pixels), torch.from_numpy(labels).long()
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.momentum is not None and module.momentum <= 0.01:
            module.momentum = (
                0.1  # MNASNet's 0.0003 is for weeks of ImageNet: statistics would stay those of the start
            )
    epochs, rate = EPOCHS.get(name, 20), LEARNING_RATE.get(name, 1e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2, fused=True)
    train_x, train_y = x[::2], y[::2]
    steps = epochs * (len(train_x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(epochs):
        model.train()
        for index in torch.randperm(len(train_x))[: len(train_x) // 64 * 64].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(train_x[index]), train_y[index]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.inference_mode():
        accuracy = (model(x[1::2]).argmax(1) == y[1::2]).float().mean().item()
    return model, accuracy


def write_images(directory: Path, size: int = INPUT_SIZE) -> None:
    """The digits that `train` does not see, as PNG files in one folder per class."""
    pixels, labels = digits(size)
    for index in range(1, len(pixels), 2):
        folder = directory / str(labels[index])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[index]).save(folder / f"{index:04}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--out", type=Path, default=Path("demo/digits"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    write_images(options.out / "images")
    model, accuracy = train(options.model)
    path = options.out / f"{options.model}.safetensors"
    save_file(model.state_dict(), path)
    print(f"{path}: {100 * accuracy:.1f} % top-1 on the digits not trained on")


if __name__ == "__main__":
    main()
