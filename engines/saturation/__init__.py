"""Sums of uint8 x int8 products in 16 bits: where kernels saturate, and INT8 graphs that cannot."""
