"""Below everything: errors, files, ONNX files, and facts about this machine."""
