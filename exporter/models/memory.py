"""Estimates the memory that an export needs before it starts, from the network's shapes, without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from export_zoo.base.errors import EnvironmentFailureError
from export_zoo.base.machine import available_memory

MIB = 1 << 20

UNKNOWN = 4 << 30
"""Bytes that are assumed for networks whose memory is not known: the user's own, and those whose weights cannot be
read."""

# Fitted to the peaks that matrix runs measured (docs/zoo/results). `python benchmarks/memory.py` prints the fit.
_BASE = 1600 * MIB
"""Bytes for Python with PyTorch, ONNX Runtime and the exporter's rules."""
_EXPORT_COPIES = 11.0
"""Number of copies of the weights while the graph is exported, written and simplified."""
_EXTERNAL_COPIES = 4.0
"""The same for weights over 2 GiB, which are stored in separate files."""
_RUN_COPIES = 4.5
_LAYER = 5 * MIB
"""Bytes for the histograms of one layer's output during INT8 calibration."""
_TENSORS_AT_ONCE = 3.0
"""Number of tensors of the largest size that exist at once, at batch MAX."""
_PROTOBUF_LIMIT = 2 << 30


@dataclass(frozen=True)
class Footprint:
    """Figures that determine a network's memory: bytes of its weights, bytes of the largest tensor for one image, and
    the number of layers that run."""

    weights: int
    largest: int
    layers: int


_FILLS = frozenset(
    "normal_ trunc_normal_ uniform_ kaiming_normal_ kaiming_uniform_ xavier_normal_ xavier_uniform_ "
    "constant_ ones_ zeros_ zero_ fill_ mul_ add_ clamp_ erfinv_".split()
)
"""Functions that give a parameter its values: without memory they change nothing, and take half of the time."""


class _EmptyOnMeta(TorchFunctionMode):
    """Makes parameters without memory: `torch.empty` returns a shape only. Small constants stay as they are."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.empty:
            given["device"] = "meta"
        tensor = args[0] if args else given.get("tensor")
        if getattr(func, "__name__", "") in _FILLS and isinstance(tensor, torch.Tensor) and tensor.is_meta:
            return tensor
        return func(*args, **given)


_SAME_SHAPE = frozenset(
    "batch_norm layer_norm relu relu6 silu gelu hardswish hardsigmoid softmax dropout".split()
)
"""Functions of `torch.nn.functional` whose result has the shape of their first argument."""


class _ShapesAsTheyAre(TorchFunctionMode):
    """Skips normalizations and activations. They keep the shape, and PyTorch takes milliseconds for each."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if args and getattr(func, "__name__", "") in _SAME_SHAPE and isinstance(args[0], torch.Tensor):
            return args[0]
        return func(*args, **(kwargs or {}))


def without_memory() -> TorchFunctionMode:
    """A context that creates modules with shapes but no memory, for `footprint`."""
    return _EmptyOnMeta()


def footprint(module: nn.Module, height: int, width: int, channels: int = 3) -> Footprint:
    """Footprint of a module made in `without_memory`, for images [channels, height, width]; makes the module
    unusable."""
    module = module.eval().to("meta")
    largest = layers = 0

    def look(layer: nn.Module, _: Any, output: Any) -> None:
        nonlocal largest, layers
        if isinstance(output, torch.Tensor) and not any(layer.children()):
            largest, layers = max(largest, 4 * output.numel()), layers + 1

    for layer in module.modules():
        layer.register_forward_hook(look)
    with torch.inference_mode(), _ShapesAsTheyAre():
        module(torch.empty(1, channels, height, width, device="meta"))
    weights = sum(4 * tensor.numel() for tensor in module.state_dict().values())
    return Footprint(weights, largest, layers)


def expected_bytes(found: Footprint, *, calibrated: bool, batch: int) -> int:
    """Expected peak memory of a whole export, in bytes.

    Args:
        calibrated: whether INT8 or FP16 is among the precisions.
        batch: the largest batch.
    """
    copies = _EXPORT_COPIES if found.weights < _PROTOBUF_LIMIT else _EXTERNAL_COPIES
    exporting = copies * found.weights
    calibrating = _RUN_COPIES * found.weights + _LAYER * found.layers if calibrated else 0.0
    running = _RUN_COPIES * found.weights + _TENSORS_AT_ONCE * batch * found.largest
    return _BASE + int(max(exporting, calibrating, running))


def check(name: str, expected: int) -> None:
    """Refuse an export that does not fit into the free memory.

    Raises:
        EnvironmentFailureError: names the expected and the free memory.
    """
    free = available_memory()
    if expected > free:
        raise EnvironmentFailureError(
            f"{name}: is expected to take {expected / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free",
            hint="use a machine with more memory, or close other programs; if activations are large, lower --batch MAX "
            "or --input-size; --no-memory-check skips this check",
        )
