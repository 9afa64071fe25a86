"""YAML 1.2: in 1.1, which PyYAML reads, `1:4:8` is the number 3848, `1e-6` a word and `no` false."""

from __future__ import annotations

from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

__all__ = ["YAMLError", "load"]


def load(text: str) -> Any:
    """Of a document, or of a value: dicts, lists, text, numbers, booleans and None.

    Raises:
        YAMLError: it is none.
    """
    try:
        return YAML(typ="safe", pure=True).load(text)
    except ValueError as error:  # of 2024-13-45, say, which looks like a date
        raise YAMLError(str(error)) from error
