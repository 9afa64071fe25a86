"""Stages of an export, in order: network, images, ranges, build, verify. Each goes through the stage cache."""
