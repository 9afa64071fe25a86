"""Targets: what builds and runs the engines."""
