"""Many exports in one run: the matrix file, its cells, their processes and the report."""

RESULTS, BUNDLES = "results", "bundles"
"""Folders of a matrix run's directory, and of its storage."""
