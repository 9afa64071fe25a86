"""The reference that engines are compared with: eager PyTorch's FP32 outputs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from export_zoo.calibration.images import Progress
from export_zoo.calibration.preprocess import Pixels, Preprocess, normalize
from export_zoo.engines.parity.outputs import sampled
from export_zoo.exporter.models.eager import run_eager

EAGER_BATCH = 8


def eager_outputs(
    model: nn.Module, pixels: Pixels, preprocess: Preprocess, progress: Progress = lambda _: None
) -> tuple[npt.NDArray[np.float32], ...]:
    """Run the eager model on [N, H, W, C] images, in eval mode and FP32 on the CPU.

    Returns its outputs, `sampled`; logits first.
    """
    outputs = []
    with torch.inference_mode():
        for start in range(0, len(pixels), EAGER_BATCH):
            batch = pixels[start : start + EAGER_BATCH]
            found = run_eager(model, torch.from_numpy(normalize(batch, preprocess)))
            outputs.append([sampled(output.numpy()) for output in found.values()])
            progress(len(batch))
    return tuple(np.concatenate(parts) for parts in zip(*outputs, strict=True))
