"""Find the tensors that gain from a smaller range than their minimum and maximum."""

from __future__ import annotations

from functools import reduce

import onnx_ir as ir

from export_zoo.calibration.histogram import Histogram
from export_zoo.calibration.methods import minmax, mse, squared_error
from export_zoo.calibration.ranges import Ranges
from export_zoo.engines.precision.int8.keep_float import kept_float
from export_zoo.engines.precision.int8.rules import Int8Rules


def worth_clipping(
    graph: ir.Graph, ranges: Ranges, rules: Int8Rules, keep_float: tuple[str, ...]
) -> list[str]:
    """Names of tensors worth clipping, one per scale group, in order of gain, largest first.

    The gain is the squared error that the range of least squared error saves over the range from minimum to maximum,
    relative to the tensor's power. Groups that save less than a tenth of their error are left out.

    Args:
        ranges: ranges with histograms of the tensors that the target quantizes.
    """
    symmetric = rules.symmetric
    saved: dict[str, float] = {}
    for members in rules.place(graph, kept_float(graph, keep_float)).groups().values():
        tensors = [ranges.tensors[name] for name in members]
        if not all(tensor.histogram for tensor in tensors):
            continue
        histogram = reduce(Histogram.merged, (Histogram.decode(tensor.histogram) for tensor in tensors))
        low, high = min(t.min for t in tensors), max(t.max for t in tensors)
        before, after = (
            squared_error(histogram, *method(histogram, low, high, symmetric), symmetric)
            for method in (minmax, mse)
        )
        if after < 0.9 * before:
            saved[members[0]] = (before - after) / squared_error(histogram, 0.0, 0.0, symmetric)
    return sorted(saved, key=lambda name: (-saved[name], name))
