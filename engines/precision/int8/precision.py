"""INT8 as a precision."""

from __future__ import annotations

from export_zoo.engines.precision.base import Precision

# 8 bits on every tensor: trained networks keep 15 to 30 dB; under 10 dB predictions start to change.
INT8 = Precision(
    "int8",
    {
        "sqnr": 10.0,
        "top1": 0.90,
        "agreement": 0.90,
        "correlation": 0.95,
        "similarity": 0.95,
        "nearest": 0.75,
        "accuracy_drop": 0.02,
        "misplaced": 0,
    },
    uses_ranges=True,
    quantized=True,
    integer_sums=True,
)
