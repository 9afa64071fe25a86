"""Ranges files without images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from export_zoo.base.graph_io import sha256_of
from export_zoo.calibration.preprocess import Preprocess
from export_zoo.calibration.ranges import Ranges, TensorRange


def ranges_with(graph: Path, preprocess: Preprocess, tensors: Mapping[str, TensorRange]) -> Ranges:
    """Ranges of a graph's tensors."""
    return Ranges(
        graph_sha256=sha256_of(graph),
        preprocess=preprocess,
        image_sha256=[],
        unreadable=[],
        instruction_set="any",
        versions={},
        tensors=dict(tensors),
    )
