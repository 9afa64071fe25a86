"""All precisions. To add one, add a folder beside this file and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from export_zoo.engines.precision.base import Precision
from export_zoo.engines.precision.fp16.precision import FP16
from export_zoo.engines.precision.fp32.precision import FP32
from export_zoo.engines.precision.int8.precision import INT8

PRECISIONS: Mapping[str, Precision] = {precision.name: precision for precision in (FP32, FP16, INT8)}
"""Precisions by name, the most exact first."""

BASELINE = FP32
"""The precision of the simplified graph. The other precisions are written from it. Their speeds are reported as
multiples of its speed."""

QUANTIZED = " or ".join(name for name, precision in PRECISIONS.items() if precision.quantized)
"""Names of the quantized precisions, for messages."""
