"""Weights with unusual scales."""

from __future__ import annotations

import numpy as np


def awkward_weights(seed: int):
    """Weights, biases and input scales as they come: channels of zeros, of almost nothing, of a great deal."""
    rng = np.random.default_rng(seed)
    channels = int(rng.integers(1, 9))
    shape = [channels, int(rng.integers(1, 5)), 3, 3] if seed % 2 else [channels, int(rng.integers(1, 20))]
    axis = 0 if len(shape) == 4 else int(rng.integers(0, 2))
    weight = rng.normal(size=shape) * 10.0 ** rng.uniform(-30, 4)
    size = shape[axis]
    factor = rng.choice([0.0, 1e-30, 1e-8, 1.0, 1e3], size=size).reshape(
        [-1 if i == axis else 1 for i in range(len(shape))]
    )
    bias = rng.normal(size=size) * 10.0 ** rng.uniform(-6, 6)
    bias[rng.random(size) < 0.2] = 0.0
    input_scale = np.float32(10.0 ** rng.uniform(-20, 3))
    return (weight * factor).astype(np.float32), axis, bias.astype(np.float32), input_scale
