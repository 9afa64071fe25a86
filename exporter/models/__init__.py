"""Resolves a model name to a network with its weights and its preprocessing."""
