"""All precisions. A new one is a folder beside this file, and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from export_zoo.engines.precision.base import Precision
from export_zoo.engines.precision.fp16.precision import FP16
from export_zoo.engines.precision.fp32.precision import FP32
from export_zoo.engines.precision.int8.precision import INT8

PRECISIONS: Mapping[str, Precision] = {precision.name: precision for precision in (FP32, FP16, INT8)}
"""By name, from the most exact on."""

BASELINE = FP32
"""The precision of the simplified graph; others are written from it, and their speed is told as a multiple of its."""
