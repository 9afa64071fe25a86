"""This package: its version and where it is installed."""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"

PACKAGE = Path(__file__).parent.parent
"""Folder of `export_zoo`."""
IMPORT_ROOT = PACKAGE.parent
"""The sys.path entry that contains this package, for processes that we start."""
