"""Ranges of tensors that only SiLU, Hardswish or GELU read.

Far below zero these functions are almost 0, so the range can end there: SiLU is -0.02 at -5.7 and nearer to 0 below. A
range from -15 would waste a third of its integers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from export_zoo.engines.precision.placement import input_of, readers, silu_input

Float64Array = npt.NDArray[np.float64]

_FARTHEST = 20.0
"""Below minus this value, each of the functions rounds to 0 in 8 bits."""


def _silu(x: Float64Array) -> Float64Array:
    return np.asarray(x / (1 + np.exp(-x)))


def _hardswish(x: Float64Array) -> Float64Array:
    return np.asarray(x * np.clip(x + 3, 0, 6) / 6)


_FUNCTIONS: Mapping[str, tuple[Callable[[Float64Array], Float64Array], float]] = {
    "SiLU": (_silu, -1.2785),
    # GELU lies between 0 and x * sigmoid(1.702 x) there (Hendrycks and Gimpel 2016, arXiv 1606.08415).
    "Gelu": (lambda x: _silu(1.702 * x) / 1.702, -0.7512),
    "HardSwish": (_hardswish, -1.5),
}
"""Functions, and where each has its minimum: it rises from there towards 0 on the left."""


def activations_behind(graph: ir.Graph) -> dict[str, str]:
    """The function that alone reads a tensor, by the tensor's name, for tensors of an FP32 graph."""
    found: dict[str, str] = {}
    for node in graph:
        value = silu_input(node)
        if value is not None and sorted(reader.op_type for reader in readers(value)) == ["Mul", "Sigmoid"]:
            name = "SiLU"
        elif node.op_type in _FUNCTIONS and len(readers(input_of(node, 0))) == 1:
            value, name = input_of(node, 0), node.op_type
        else:
            continue
        if not value.is_graph_output():
            found[str(value.name)] = name
    return found


def least_input(function: str, high: float) -> float:
    """The lowest end of an 8-bit range that ends at `high`: below it, the function is less than half a step from 0.

    Args:
        function: a value of `activations_behind`.
    """
    compute, minimum = _FUNCTIONS[function]
    ends = np.linspace(minimum, -_FARTHEST, 2000)
    forgotten = np.flatnonzero(-compute(ends) <= (high - ends) / (2 * 255))
    return float(ends[forgotten[0]])
