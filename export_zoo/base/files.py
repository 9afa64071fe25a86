"""Files that are complete or absent, and written by one process at a time."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


def cache_directory() -> Path:
    """The cache directory: $EXPORT_ZOO_CACHE, else $XDG_CACHE_HOME/export-zoo, else ~/.cache/export-zoo.

    Raises:
        RuntimeError: none of them is set and the user has no home directory.
    """
    if directory := os.environ.get("EXPORT_ZOO_CACHE"):
        return Path(directory)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "export-zoo"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; the temporary file replaces `path` at the end.

    If an error occurs, `path` stays as it was. The temporary name is hidden and ends in 32 hexadecimal digits, so that
    a file left behind by a killed process can be recognized.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Allow one writer at a time in a directory. The lock ends with the process."""
    try:
        import fcntl
    except ImportError:  # Windows has no fcntl: the last writer wins
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
