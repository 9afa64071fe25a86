"""Shared by tests: small networks, layers, weights and paths. No test imports another test."""
