"""How much memory an export will take, told before it is begun: from the network's shapes, without its weights."""

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

# Fitted to peaks that the matrix measured (docs/zoo/results): `python benchmarks/memory.py` prints how well they fit.
_BASE = 1600 * MIB
"""Python with PyTorch, ONNX Runtime and the exporter's rules."""
_EXPORT_COPIES = 11.0
"""Of the weights, while the graph is exported, written and simplified."""
_EXTERNAL_COPIES = 4.0
"""The same above 2 GiB, where weights lie in files of their own."""
_RUN_COPIES = 4.5
_LAYER = 5 * MIB
"""Histograms of a layer's output while INT8 is calibrated."""
_TENSORS_AT_ONCE = 3.0
"""Of the largest, at batch MAX."""
_PROTOBUF_LIMIT = 2 << 30


@dataclass(frozen=True)
class Footprint:
    """What decides how much memory a network takes: bytes of its weights, bytes of the largest tensor that one image
    makes, and the number of layers that are run."""

    weights: int
    largest: int
    layers: int


class _EmptyOnMeta(TorchFunctionMode):
    """Parameters are made by `torch.empty`: they get a shape and no memory. Small constants stay as they are."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.empty:
            given["device"] = "meta"
        return func(*args, **given)


def without_memory() -> TorchFunctionMode:
    """A context in which modules are made with shapes alone; `footprint` takes them."""
    return _EmptyOnMeta()


def footprint(module: nn.Module, height: int, width: int) -> Footprint:
    """Of a module that was made `without_memory`, for images [3, height, width]. The module is of no use afterwards."""
    module = module.eval().to("meta")
    largest = layers = 0

    def look(layer: nn.Module, _: Any, output: Any) -> None:
        nonlocal largest, layers
        if isinstance(output, torch.Tensor) and not any(layer.children()):
            largest, layers = max(largest, 4 * output.numel()), layers + 1

    for layer in module.modules():
        layer.register_forward_hook(look)
    with torch.inference_mode():
        module(torch.empty(1, 3, height, width, device="meta"))
    weights = sum(4 * tensor.numel() for tensor in module.state_dict().values())
    return Footprint(weights, largest, layers)


def expected_bytes(found: Footprint, *, calibrated: bool, batch: int) -> int:
    """The peak of a whole export.

    Args:
        calibrated: INT8 or FP16 is among the precisions.
        batch: the largest.
    """
    copies = _EXPORT_COPIES if found.weights < _PROTOBUF_LIMIT else _EXTERNAL_COPIES
    exporting = copies * found.weights
    calibrating = _RUN_COPIES * found.weights + _LAYER * found.layers if calibrated else 0.0
    running = _RUN_COPIES * found.weights + _TENSORS_AT_ONCE * batch * found.largest
    return _BASE + int(max(exporting, calibrating, running))


def check(name: str, expected: int) -> None:
    """Refuse what does not fit.

    Raises:
        EnvironmentFailureError: names what is expected and what is free.
    """
    free = available_memory()
    if expected > free:
        raise EnvironmentFailureError(
            f"{name}: is expected to take {expected / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free",
            hint="use a machine that has more, or end other programs; a lower --batch MAX and a smaller --input-size "
            "help where activations are large; --no-memory-check tries all the same",
        )
