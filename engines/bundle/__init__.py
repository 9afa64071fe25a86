"""Reads a bundle, chooses its best engine for this machine, loads the engine and serves it."""
