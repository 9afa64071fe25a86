"""Where Q/DQ pairs go for TensorRT and TensorRT-RTX."""

from __future__ import annotations

from export_zoo.engines.precision.input_placement import place_at_inputs
from export_zoo.engines.precision.int8.rules import Int8Rules

INT8_RULES = Int8Rules(place_at_inputs, symmetric=True, int32_bias=False, half=True, sums_in_16_bits=False)
