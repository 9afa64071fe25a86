"""Builds engines from a graph and activation ranges; runs, compares and bundles them. Never imports torch."""
