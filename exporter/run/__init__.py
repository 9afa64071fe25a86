"""Shared by the stages of one run: the context, the stage cache and the reporter."""
