"""Shared by the stages of one run: options, the stage cache, and what is reported."""
