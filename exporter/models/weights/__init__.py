"""Weights of a network: find the file, read it, load it strictly; or random ones."""
