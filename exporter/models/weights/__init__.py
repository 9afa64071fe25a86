"""Weights of a network: finds, reads and strictly loads a weights file, or makes random weights."""
