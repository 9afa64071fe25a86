"""Files of reports."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from export_zoo.base.errors import EnvironmentFailureError, UsageError


def check_writable(path: Path, option: str, bundle: Path, others: Sequence[Path | None] = ()) -> None:
    """Refuse a file that cannot be written, that lies in the bundle, or is another's, before any work.

    Raises:
        UsageError: see above.
    """
    if path.resolve().is_relative_to(bundle.resolve()):
        raise UsageError(f"{option} {path}: lies in the bundle", hint="give a path outside of it")
    if any(other is not None and other.resolve() == path.resolve() for other in others):
        raise UsageError(f"{option} {path}: is the file of another option", hint="give another path")
    nearest = next(above for above in path.absolute().parents if above.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UsageError(f"{option} {path}: {nearest} cannot be written to", hint="give a writable path")


def write(path: Path, text: str, option: str) -> None:
    """Write a report. Raises EnvironmentFailureError if `path` cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise EnvironmentFailureError(
            f"{option} {path}: cannot be written: {error.strerror}", hint="give a writable path"
        ) from error
