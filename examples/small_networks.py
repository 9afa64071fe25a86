"""Small networks of torchvision's larger families, for 32x32 images: `export-zoo examples/small_networks.py:vit`.

torchvision's own ViT and Swin are made for 224x224 and train for hours on a CPU; these are the same classes, smaller.
"""

from __future__ import annotations

from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer


def vit(num_classes: int = 10) -> nn.Module:
    """A vision transformer of four layers: 8x8 patches of 4x4 pixels, and the class token."""
    return VisionTransformer(
        image_size=32,
        patch_size=4,
        num_layers=4,
        num_heads=4,
        hidden_dim=128,
        mlp_dim=256,
        num_classes=num_classes,
    )


def swin(num_classes: int = 10) -> nn.Module:
    """A Swin transformer of two stages: windows of 4x4 patches of 2x2 pixels, shifted in every other layer."""
    return SwinTransformer(
        patch_size=[2, 2],
        embed_dim=48,
        depths=[2, 2],
        num_heads=[3, 6],
        window_size=[4, 4],
        stochastic_depth_prob=0.0,
        num_classes=num_classes,
    )
