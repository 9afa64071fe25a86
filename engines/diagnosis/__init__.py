"""Finds the layers that cost an engine its accuracy. Never imports PyTorch."""
