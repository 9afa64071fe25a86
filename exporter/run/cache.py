"""Cache of stage results. The key of each is the hash of all its inputs.

A result is made in its own directory and renamed into place: a killed run leaves no partial result, and parallel runs
do not disturb each other. On a hit the files are hard-linked into the run's work directory, so that pruning by another
run cannot remove them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar, overload

from pydantic import TypeAdapter

from export_zoo.base.errors import EnvironmentFailureError, UsageError
from export_zoo.base.files import cache_directory
from export_zoo.base.graph_io import sha256_of
from export_zoo.base.package import PACKAGE

LIMIT_VARIABLE = "EXPORT_ZOO_CACHE_GB"
DEFAULT_LIMIT_GB = 20.0
_ABANDONED_SECONDS, _GRACE_SECONDS = 24 * 3600, 60
_ENTRY = "entry.json"
_INPUTS = "inputs"
_TEMPORARY, _MARKER = "export-zoo-", ".export-zoo-work"  # the marker identifies our own directories


@cache
def code_digest(package: Path = PACKAGE) -> str:
    """Hash of export-zoo's source. It is part of every key, so that a changed stage never uses old results."""
    combined = hashlib.sha256()
    folders = [package, *(path for path in package.iterdir() if path.is_symlink())]  # rglob follows no links
    for source in sorted(source for folder in folders for source in folder.rglob("*.py")):
        if "cpp" not in source.relative_to(package).parts:  # tests of the C++ library
            combined.update(
                f"{source.relative_to(package).as_posix()}\0".encode() + source.read_bytes() + b"\0"
            )
    return combined.hexdigest()


def digest(key: Mapping[str, Any]) -> str:
    """Hex SHA-256 of a key, as canonical JSON."""
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()


ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class StageResult(Generic[ResultT]):
    """A finished stage: `directory` holds its files, `data` is its return value. Later stages only read both."""

    directory: Path
    data: ResultT
    cached: bool
    key: str

    def file(self, name: str) -> Path:
        """A file of the stage."""
        return self.directory / name


def _limit_bytes() -> float:
    text = os.environ.get(LIMIT_VARIABLE) or str(DEFAULT_LIMIT_GB)
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = -1.0
    if not gigabytes >= 0:
        raise UsageError(f"{LIMIT_VARIABLE}={text}: not a number of gigabytes", hint="for example 20")
    return gigabytes * 1e9


def _link(source: Path, target: Path) -> None:
    """Hard-link a file; copy it if the file system has no links."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)


def _lock(directory: Path) -> int | None:
    """Mark a work directory as in use. The lock ends with the process.

    Returns None if another process has the lock, or on Windows, which has no fcntl.

    Raises:
        OSError: the directory cannot be opened.
    """
    try:
        import fcntl
    except ImportError:  # on Windows only the age shows that it is abandoned
        return None
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_abandoned(works: Iterable[Path]) -> None:
    """Remove the work directories of killed runs. Those of other users in /tmp stay: they cannot be removed."""
    for old in works:
        with contextlib.suppress(OSError):  # another run may have removed it
            age = time.time() - old.stat().st_mtime
            if age <= _GRACE_SECONDS:  # its run may not have taken the lock yet
                continue
            descriptor = _lock(old)
            if descriptor is not None or age > _ABANDONED_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
            if descriptor is not None:
                os.close(descriptor)


def _new_work(root: Path) -> Path:
    """A new work directory in a cache directory, without those of killed runs."""
    works = root / "work"
    works.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(works.iterdir())
    work = works / uuid.uuid4().hex
    work.mkdir()
    return work


class StageCache:
    """Runs stages through the cache. A context manager: it owns the run's work directory.

    Args:
        root: the cache directory, or None for no cache (all results are made in a temporary directory).
    """

    def __init__(self, root: Path | None) -> None:
        self._root = root
        self._work = Path()
        self._limit = 0.0
        self._descriptor: int | None = None

    def __enter__(self) -> StageCache:
        self._limit = _limit_bytes()
        if self._root is None:
            marked = Path(tempfile.gettempdir()).glob(f"{_TEMPORARY}*/{_MARKER}")
            _remove_abandoned(marker.parent for marker in marked)
            self._work = Path(tempfile.mkdtemp(prefix=_TEMPORARY))
            (self._work / _MARKER).touch()
        else:
            self._work = _new_work(self._root)
        with contextlib.suppress(OSError):  # a file system without locks: only the age counts
            self._descriptor = _lock(self._work)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._work, ignore_errors=True)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if self._root is not None and kind is None:
            self._prune(self._root)

    @overload
    def run(self, stage: str, key: Mapping[str, Any], make: Callable[[Path], Any]) -> StageResult[Any]: ...

    @overload
    def run(
        self, stage: str, key: Mapping[str, Any], make: Callable[[Path], ResultT], kind: Any
    ) -> StageResult[ResultT]: ...

    def run(
        self, stage: str, key: Mapping[str, Any], make: Callable[[Path], Any], kind: Any = Any
    ) -> StageResult[Any]:
        """The result of a stage: from the cache, or made by `make(directory)` and stored.

        `make` writes its files into `directory`, without subdirectories, and returns a value of the type `kind`, which
        pydantic must be able to write as JSON and to read again.
        """
        name = digest({"stage": stage, **key})
        adapter = TypeAdapter(kind)
        if self._root is not None and (hit := self._hit(stage, name, adapter)) is not None:
            return hit
        directory = self._work / f"{stage}-{name[:16]}-{uuid.uuid4().hex[:8]}"
        try:
            directory.mkdir()
            data = make(directory)
            if self._root is not None:
                self._keep(stage, name, key, directory, adapter.dump_python(data, mode="json"))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise EnvironmentFailureError(
                f"{self._root or self._work}: {error.strerror} ({stage})",
                hint="free some space, or move the cache (EXPORT_ZOO_CACHE; with --no-cache, TMPDIR)",
            ) from error
        return StageResult(directory, data, cached=False, key=name)

    def scratch(self) -> Path:
        """A new directory that is removed at the end of the run."""
        return Path(tempfile.mkdtemp(prefix="scratch-", dir=self._work))

    def _hit(self, stage: str, name: str, adapter: TypeAdapter[Any]) -> StageResult[Any] | None:
        assert self._root is not None
        entry = self._root / stage / name
        directory = self._work / f"{stage}-{name[:16]}-{uuid.uuid4().hex[:8]}"
        try:
            if not entry.exists():
                return None
            described = json.loads((entry / _ENTRY).read_text(encoding="utf-8"))
            data = adapter.validate_python(described["data"])
            result = StageResult(directory, data, cached=True, key=name)
            directory.mkdir()
            for file, sha256 in described["files"].items():
                _link(entry / file, directory / file)
                if sha256_of(directory / file) != sha256:
                    raise ValueError(f"{file} was altered")
            os.utime(entry)
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            # A damaged entry is removed, and made again.
            shutil.rmtree(directory, ignore_errors=True)
            shutil.rmtree(entry, ignore_errors=True)
            return None
        return result

    def _keep(self, stage: str, name: str, key: Mapping[str, Any], directory: Path, data: Any) -> None:
        assert self._root is not None
        staging = self._work / f"keep-{uuid.uuid4().hex}"
        staging.mkdir()
        files = {}
        for file in sorted(directory.iterdir()):
            _link(file, staging / file.name)
            files[file.name] = sha256_of(file)
        document = {"stage": stage, "key": key, "files": files, "data": data}
        (staging / _ENTRY).write_text(json.dumps(document, indent=1), encoding="utf-8")
        (self._root / stage).mkdir(exist_ok=True)
        try:
            staging.rename(self._root / stage / name)
        except OSError:
            # Another run stored its result first; both are valid.
            shutil.rmtree(staging, ignore_errors=True)

    def _prune(self, root: Path) -> None:
        """Remove the least recently used entries above the size limit.

        Inputs that were used in the last day count, but stay: a task may be reading them.
        """
        entries = []
        for entry in root.glob("*/*"):
            try:
                # Other folders, the ARM64 root for example, stay.
                if (entry / _ENTRY).is_file() or entry.parent.name == _INPUTS:
                    size = sum(file.stat().st_size for file in entry.rglob("*"))
                    entries.append((entry.stat().st_mtime, size, entry))
            except OSError:
                continue  # another run is pruning, too
        total = sum(size for _, size, _ in entries)
        for used, size, entry in sorted(entries):
            if total <= self._limit:
                break
            if entry.parent.name == _INPUTS and time.time() - used < _ABANDONED_SECONDS:
                continue
            shutil.rmtree(entry, ignore_errors=True)
            total -= size


def input_place(content: str, name: str) -> Path:
    """Where this machine keeps a file or folder that travelled to it, see `exporter.cluster.files`.

    Args:
        content: hash of its bytes.
    """
    return cache_directory() / _INPUTS / content / name


@contextlib.contextmanager
def work_directory() -> Iterator[Path]:
    """A new folder in the cache, which is removed at the end; that of a killed process, by a later run."""
    work = _new_work(cache_directory())
    inside = work / "files"  # not the folder itself, whose lock `publish` would wait for
    inside.mkdir()
    descriptor = None
    try:
        with contextlib.suppress(OSError):
            descriptor = _lock(work)
        yield inside
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)
