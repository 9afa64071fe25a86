"""The reference: eager PyTorch's FP32 logits of the images that engines are compared on."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from calibration.images import Progress
from calibration.preprocess import Preprocess, UInt8Array, normalize

EAGER_BATCH = 8


def eager_logits(
    model: nn.Module, pixels: UInt8Array, preprocess: Preprocess, progress: Progress = lambda _: None
) -> npt.NDArray[np.float32]:
    """Logits float32 [N, classes] of uint8 [N, H, W, 3] images, by the eager model in eval mode, FP32, CPU."""
    outputs = []
    with torch.inference_mode():
        for start in range(0, len(pixels), EAGER_BATCH):
            batch = pixels[start : start + EAGER_BATCH]
            outputs.append(model(torch.from_numpy(normalize(batch, preprocess))).numpy())
            progress(len(batch))
    return np.concatenate(outputs)
