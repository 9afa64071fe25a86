"""From an eager PyTorch module to a simplified ONNX graph, and eager's outputs to compare engines with."""
