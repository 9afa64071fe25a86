"""Statistics of layers' inputs, measured once: equalization by powers of two multiplies them by its factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from export_zoo.base import graph_io
from export_zoo.calibration.layer_inputs import MOMENTS, Statistics, input_sizes, layer_statistics, scaled
from export_zoo.calibration.preprocess import Pixels, Preprocess
from export_zoo.engines.precision.int8.rounding import LARGEST
from export_zoo.engines.precision.placement import weight_of
from export_zoo.exporter.stages.tuning.gain import Float64Array

Factors = Mapping[str, npt.NDArray[np.float32]]
"""Factors of the input channels of layers, by node name; layers that are not there keep their inputs."""


class InputStatistics:
    """Means and second moments of the inputs of all layers with an int8 weight.

    Args:
        graph: the graph before equalization.
        pixels: images to measure on, [N, H, W, C].
    """

    def __init__(self, graph: Path, pixels: Pixels, preprocess: Preprocess) -> None:
        self._graph, self._pixels, self._preprocess = graph, pixels, preprocess
        self._means: dict[str, Statistics] = {}
        self._kept: list[tuple[str, Statistics]] | None = None

    @cached_property
    def _layers(self) -> list[str]:
        return [str(node.name) for node in graph_io.load(self._graph).graph if weight_of(node) is not None]

    @cached_property
    def rounded(self) -> int:
        """Number of layers that `moments` yields."""
        return sum(size <= LARGEST for _, size in input_sizes(self._graph, self._layers).values())

    def moments(self, factors: Factors) -> Iterator[tuple[str, Float64Array]]:
        """Second moments of layers' inputs, float64 [groups, K, K] by node name. Layers above LARGEST have none."""
        for name, found in self._all():
            changed = _changed(name, found, factors)
            if changed.moments is not None:
                yield name, changed.moments

    def means(self, factors: Factors) -> dict[str, Float64Array]:
        """Mean inputs of all layers, float64 [groups, K] by node name."""
        if not self._means:
            images = self._pixels, self._preprocess
            self._means = dict(layer_statistics(self._graph, *images, self._layers, largest=0))
        return {name: _changed(name, found, factors).mean for name, found in self._means.items()}

    def _all(self) -> Iterator[tuple[str, Statistics]]:
        """Statistics of each layer. They are kept if they are small; otherwise, they are measured at each call."""
        if self._kept is not None:
            yield from self._kept
            return
        sizes = input_sizes(self._graph, self._layers).values()
        small = sum(8 * groups * size**2 for groups, size in sizes if size <= LARGEST) <= MOMENTS
        kept: list[tuple[str, Statistics]] = []
        means: dict[str, Statistics] = {}
        images = self._pixels, self._preprocess
        for name, found in layer_statistics(self._graph, *images, self._layers, largest=LARGEST):
            means[name] = Statistics(found.mean, None)
            if small:
                kept.append((name, found))
            yield name, found
        self._means = means
        self._kept = kept if small else None


def _changed(name: str, found: Statistics, factors: Factors) -> Statistics:
    return scaled(found, factors[name]) if name in factors else found
