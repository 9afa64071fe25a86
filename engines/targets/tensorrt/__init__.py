"""TensorRT and TensorRT-RTX on GPUs."""
