"""Exports an eager PyTorch module to a simplified ONNX graph, and computes eager's outputs to compare engines with."""
