"""Reads YAML 1.2. In YAML 1.1, which PyYAML reads, `1:4:8` is the number 3848, `1e-6` a string and `no` false."""

from __future__ import annotations

from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

__all__ = ["YAMLError", "load"]


def load(text: str) -> Any:
    """Parse a YAML document or value to dicts, lists, strings, numbers, booleans and None.

    Raises:
        YAMLError: the text is not valid YAML.
    """
    try:
        return YAML(typ="safe", pure=True).load(text)
    except ValueError as error:  # for example 2024-13-45, which looks like a date
        raise YAMLError(str(error)) from error
