"""FP32 as a precision."""

from __future__ import annotations

from export_zoo.engines.precision.base import Precision

# FP32 differs from eager only in the order of summation: 100 dB or more on well-scaled networks.
FP32 = Precision(
    "fp32",
    {
        "sqnr": 60.0,
        "top1": 0.99,
        "agreement": 0.99,
        "correlation": 0.9999,
        "similarity": 0.9999,
        "nearest": 0.99,
        "misplaced": 0,
    },
)
