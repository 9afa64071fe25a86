"""A copy of a matrix's results and bundles in an object store or on another file system, from which others continue."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from export_zoo.base.errors import EnvironmentFailureError, UsageError
from export_zoo.base.files import replacing
from export_zoo.engines.bundle.reader import MANIFEST
from export_zoo.exporter.matrix import BUNDLES, RESULTS
from export_zoo.exporter.matrix.results import stored
from export_zoo.exporter.publish import failed_place


class Storage:
    """A folder of any file system that fsspec knows: `s3://bucket/folder`, `gs://...`, `file:///mnt/share/folder`.

    It has the folders of --out. Each file appears whole, a bundle's manifest after its other files, and results after
    their bundle: a run that is stopped leaves nothing that seems complete.

    Raises:
        UsageError: there is no such file system, or its package is not installed.
    """

    def __init__(self, uri: str) -> None:
        self._uri, self._lock = uri, threading.Lock()
        self._results: dict[str, bytes] = {}
        """The results that it has, by file name."""
        try:
            found: Any = fsspec.core
            self._files, self._root = found.url_to_fs(uri)
            if "://" not in uri:
                raise ValueError("not a URI")
        except Exception as error:  # each file system has its own
            raise UsageError(
                f"--storage {uri}: cannot be opened: {type(error).__name__}: {error}",
                hint="give a URI that fsspec opens, such as s3://BUCKET/FOLDER or file:///FOLDER, and install its "
                "package: s3fs for s3://, gcsfs for gs://",
            ) from error

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """Turn errors of any file system's package into ours."""
        try:
            yield
        except Exception as error:
            raise EnvironmentFailureError(
                f"--storage {self._uri}: cannot {what}: {type(error).__name__}: {error}",
                hint="check the address and your rights; everything is in --out, and the same command continues",
            ) from error

    def fetch_results(self, results: Path) -> None:
        """Copy those results that are not in the folder `results`, or that are ok where those there are not."""
        with self._telling("read its results"):
            folder = f"{self._root}/{RESULTS}"
            self._files.invalidate_cache()
            paths: list[str] = []
            if self._files.exists(folder):
                paths = [
                    str(path) for path in self._files.ls(folder, detail=False) if str(path).endswith(".json")
                ]
            found: dict[str, bytes] = self._files.cat(paths) if paths else {}
            self._results = {path.rpartition("/")[2]: data for path, data in found.items()}
        here = {f"{name}.json" for name, result in stored(results).items() if result.status == "ok"}
        for name, data in self._results.items():
            if name not in here:
                with replacing(results / name) as temporary:
                    temporary.write_bytes(data)

    def has(self, bundle: str) -> bool:
        """Whether it has a whole bundle of this name."""
        with self._telling("look for bundles"):
            return bool(self._files.exists(f"{self._root}/{BUNDLES}/{bundle}/{MANIFEST}"))

    def fetch_bundle(self, bundle: Path) -> None:
        """Copy the bundle of this name to the path `bundle`, which does not exist."""
        with self._telling(f"read {bundle.name}"):
            folder = f"{self._root}/{BUNDLES}/{bundle.name}"
            new = bundle.with_name(f".new-{bundle.name}")
            shutil.rmtree(new, ignore_errors=True)
            for path in self._files.find(folder):
                place = new / str(path)[len(folder) :].lstrip("/")
                place.parent.mkdir(parents=True, exist_ok=True)
                self._files.get_file(path, str(place))
            new.rename(bundle)

    def lacks(self, results: Sequence[Path]) -> bool:
        """Whether it lacks one of these results, or has another: an earlier run may have failed to copy it."""
        return any(self._results.get(path.name) != path.read_bytes() for path in results)

    def put(self, bundle: Path, results: Sequence[Path]) -> None:
        """Copy a bundle, or the one of a failed gate, as far as they exist, and then its results."""
        with self._telling("write"), self._lock:  # a transaction is one of the whole file system
            for path in results:  # an old result must not seem to belong to the new bundle
                if self._results.pop(path.name, None) is not None:
                    self._files.rm_file(f"{self._root}/{RESULTS}/{path.name}")
            for place in (bundle, failed_place(bundle)):
                if (place / MANIFEST).exists():
                    self._put_bundle(place)
            for path in results:
                self._put(path, f"{self._root}/{RESULTS}/{path.name}")
                self._results[path.name] = path.read_bytes()

    def _put_bundle(self, bundle: Path) -> None:
        folder = f"{self._root}/{BUNDLES}/{bundle.name}"
        files = {
            path.relative_to(bundle).as_posix(): path for path in sorted(bundle.rglob("*")) if path.is_file()
        }
        for name, path in sorted(files.items(), key=lambda item: item[0] == MANIFEST):
            self._put(path, f"{folder}/{name}")
        for old in self._files.find(folder):
            if str(old)[len(folder) :].lstrip("/") not in files:
                self._files.rm_file(old)

    def _put(self, path: Path, place: str) -> None:
        """Copy a file, whole or not at all."""
        self._files.makedirs(place.rpartition("/")[0], exist_ok=True)
        with self._files.transaction, path.open("rb") as source, self._files.open(place, "wb") as target:
            shutil.copyfileobj(source, target)
