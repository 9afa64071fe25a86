"""The lowest layer: errors, file writing, ONNX graph files, and facts about this machine."""
