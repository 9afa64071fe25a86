"""Files and folders that a task reads: where its node has them, or how they travel to it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from export_zoo.base.graph_io import sha256_of
from export_zoo.calibration.images import read_unchanged
from export_zoo.exporter.run.cache import input_place


def content_of(path: Path) -> str:
    """SHA-256 of a file; of a folder's file names and sizes, which is quick."""
    resolved = path.resolve()
    if path.is_file():
        return _of_file(resolved, resolved.stat().st_mtime_ns)
    listed = "".join(f"{name}\0{size}\0" for name, size, _ in _listing(resolved))
    return hashlib.sha256(listed.encode()).hexdigest()


def bytes_of(path: Path) -> str:
    """SHA-256 of a file; of a folder's file names and the hashes of their bytes."""
    resolved = path.resolve()
    return content_of(path) if path.is_file() else _of_folder(resolved, _listing(resolved))


def _listing(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of a folder's files, in order."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    found = ((path.relative_to(folder), path.stat()) for path in paths)
    return tuple((str(name), about.st_size, about.st_mtime_ns) for name, about in found)


@cache
def _of_file(path: Path, changed: int) -> str:
    del changed  # part of the cache's key: a file that changes during a run is hashed again
    return sha256_of(path)


@lru_cache(maxsize=16)
def _of_folder(folder: Path, listing: tuple[tuple[str, int, int], ...]) -> str:
    combined = hashlib.sha256()
    for name, _, _ in listing:
        combined.update(f"{name}\0{sha256_of(folder / name)}\0".encode())
    return combined.hexdigest()


def packed(root: Path, *names: str) -> bytes:
    """Files and folders of a folder as an uncompressed tar archive; links are followed."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", dereference=True) as archive:
        for name in names:
            archive.add(root / name, arcname=name)
    return buffer.getvalue()


def unpack(data: bytes, folder: Path) -> None:
    """Unpack `packed` into a folder, which is made if it does not exist."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(folder, filter="data")


@dataclass(frozen=True)
class Named:
    """A file or folder that a node keeps in its cache, once it has travelled there: weights, or a folder of images.

    Attributes:
        path: absolute path on the driver.
        content: see `bytes_of`.
    """

    path: str
    content: str

    @classmethod
    def of(cls, path: Path) -> Named:
        return cls(str(path.resolve()), bytes_of(path))

    def here(self) -> str | None:
        """Where this node has it: at the same path, or in its cache. None if it has to travel."""
        own = Path(self.path)
        if own.exists() and bytes_of(own) == self.content:
            return self.path
        return _kept(self._place)

    @property
    def _place(self) -> Path:
        return input_place(self.content, Path(self.path).name)

    def pack(self) -> bytes:
        """The file or folder, to be sent. Runs on the driver."""
        return packed(Path(self.path).parent, Path(self.path).name)

    def unpacked(self, data: bytes, scratch: Path) -> str:
        """Where this node has it after it has travelled."""
        del scratch
        return _keep(self._place, lambda folder: unpack(data, folder))


@dataclass(frozen=True)
class Part:
    """Some files of a folder.

    Attributes:
        path: absolute path of the folder on the driver.
        files: SHA-256 of each file, by its path below the folder.
        kept: whether a node keeps them in its cache for later tasks.
    """

    path: str
    files: Mapping[str, str]
    kept: bool = False

    @classmethod
    def of(cls, root: Path, folder: str) -> Part:
        """All files of a folder below `root`."""
        files = sorted(path for path in (root / folder).rglob("*") if path.is_file())
        return cls(str(root), {path.relative_to(root).as_posix(): sha256_of(path) for path in files})

    @classmethod
    def of_files(cls, files: Sequence[Path]) -> Part:
        """Files of one folder, which nodes keep."""
        return cls(str(files[0].parent.resolve()), {path.name: sha256_of(path) for path in files}, kept=True)

    def here(self) -> str | None:
        """The folder, if this node has it at the same path, or in its cache, with the same files."""
        root = Path(self.path)
        try:
            same = all(sha256_of(root / name) == sha256 for name, sha256 in self.files.items())
        except OSError:
            same = False
        if same:
            return self.path
        return _kept(self._place) if self.kept else None

    @property
    def _place(self) -> Path:
        identity = hashlib.sha256(json.dumps(self.files, sort_keys=True).encode())
        return input_place(identity.hexdigest(), "files")

    def pack(self) -> bytes:
        """The files, to be sent. Runs on the driver. Raises BadInputError if one has changed or vanished."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name, sha256 in self.files.items():
                data = read_unchanged(Path(self.path) / name, sha256)
                described = tarfile.TarInfo(name)
                described.size = len(data)
                archive.addfile(described, io.BytesIO(data))
        return buffer.getvalue()

    def unpacked(self, data: bytes, scratch: Path) -> str:
        """Where this node has them after they have travelled."""
        if self.kept:
            return _keep(self._place, lambda folder: unpack(data, folder / self._place.name))
        place = Path(tempfile.mkdtemp(dir=scratch))
        unpack(data, place)
        return os.fspath(place)


def _kept(place: Path) -> str | None:
    """A place in the cache, if something is there. Its time says that it was used, see `StageCache`."""
    try:
        os.utime(place.parent)
    except FileNotFoundError:
        return None
    return str(place) if place.exists() else None


def _keep(place: Path, write: Callable[[Path], None]) -> str:
    """Put something at its place in the cache, whole or not at all: `write` writes it into a new folder."""
    place.parent.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent.parent, prefix=".new-") as directory:
        write(Path(directory))
        try:
            Path(directory).rename(place.parent)
        except OSError:
            if not place.exists():  # another task was not faster
                raise
        Path(directory).mkdir(exist_ok=True)  # for its removal
    return str(place)


Wanted = Named | Part
"""Something that a task reads."""
