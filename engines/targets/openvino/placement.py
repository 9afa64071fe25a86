"""Where Q/DQ pairs go for OpenVINO on a CPU."""

from __future__ import annotations

from export_zoo.engines.precision.input_placement import place_at_inputs
from export_zoo.engines.precision.int8.first_conv import block_first_convolution
from export_zoo.engines.precision.int8.rules import Int8Rules

INT8_RULES = Int8Rules(
    place_at_inputs,
    symmetric=False,
    int32_bias=False,
    half=False,
    sums_in_16_bits=True,
    pairs_by_pixel=True,
    finish=block_first_convolution,
)
