"""Targets: the backends that build and run the engines."""
