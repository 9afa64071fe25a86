"""FP32: the simplified graph itself."""
