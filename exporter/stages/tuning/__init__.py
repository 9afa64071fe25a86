"""Tunes INT8 for a target: makes candidates, measures them and chooses one."""
