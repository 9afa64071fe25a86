"""Image folders: scan, split into disjoint sets, decode in a stream that overlaps with inference."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from export_zoo.base.errors import BadInputError
from export_zoo.calibration.decode import UnreadableImageError, check_header, register_heif
from export_zoo.calibration.preprocess import Pixels, Preprocess, read_pixels

Progress = Callable[[int], None]
"""Called with the number of items done since the last call."""

IMAGE_SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".bmp",
        ".webp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".jp2",
        ".avif",
        ".tga",
    ]
)

HEIF_SUFFIXES = frozenset([".heic", ".heif"])
"""Suffixes of images that are read if pillow-heif is installed."""

MAX_UNREADABLE_SHARE = 0.10
"""Maximum share of unreadable files. A folder with more is refused: it is probably the wrong one, or damaged."""

DECODE_THREADS = 2

Splits = dict[str, tuple["ImageFile", ...]]


@dataclass(frozen=True)
class ImageFile:
    """One image on disk. `name` is the path below the folder, `sha256` that of the file's bytes."""

    path: Path
    name: str
    sha256: str
    folder: str | None
    """First directory below the root, the class in an ImageFolder layout; None directly under the root."""


@dataclass(frozen=True)
class Unreadable:
    name: str
    reason: str


@dataclass(frozen=True)
class ImageFolder:
    """Result of a scan: unique images sorted by name, and the names of all files that were left out."""

    root: Path
    images: tuple[ImageFile, ...]
    unreadable: tuple[Unreadable, ...]
    duplicates: tuple[str, ...]
    ignored: tuple[str, ...]
    """Files without an image suffix (labels, .DS_Store, ...)."""

    def left_out(self) -> list[str]:
        """Numbers of files that were left out, by kind, such as "3 duplicates" and "2 .csv files"."""
        told = [f"{len(self.duplicates)} duplicates"] if self.duplicates else []
        return told + kinds(self.ignored)


def kinds(names: Sequence[str]) -> list[str]:
    """Numbers of files by suffix, the most frequent first: "120 .heic files (pip install pillow-heif)"."""
    suffixes = Counter(Path(name).suffix.lower() for name in names)
    return [
        f"{count} {f'{suffix} files' if suffix else 'files without a suffix'}"
        + (" (to read them: pip install pillow-heif)" if suffix in HEIF_SUFFIXES else "")
        for suffix, count in sorted(suffixes.items(), key=lambda item: (-item[1], item[0]))
    ]


def describe(unreadable: Sequence[Unreadable]) -> str:
    """The first five names, with reasons."""
    shown = "; ".join(f"{u.name} ({u.reason})" for u in unreadable[:5])
    return shown + (f"; and {len(unreadable) - 5} more" if len(unreadable) > 5 else "")


def read_unchanged(path: Path, sha256: str) -> bytes:
    """Bytes of a file that was scanned. Raises BadInputError if it has changed or vanished since."""
    hint = "run the command again when nothing changes the folder"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInputError(f"{path}: can no longer be read: {error.strerror}", hint=hint) from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise BadInputError(f"{path}: has changed while it was used", hint=hint)
    return data


def refuse_if_too_many_unreadable(
    where: str, unreadable: Sequence[Unreadable], total: int, read: int | None = None
) -> None:
    """Raise BadInputError when more than MAX_UNREADABLE_SHARE of `total` files cannot be read.

    Args:
        read: number of files that were read until now, if not all of them.
    """
    if unreadable and len(unreadable) > MAX_UNREADABLE_SHARE * total:
        hint = f"repair or remove them; up to {MAX_UNREADABLE_SHARE:.0%} unreadable files are tolerated"
        if all("`mode" in file.reason or "band(s)" in file.reason for file in unreadable):
            hint = (
                "give `mode`, `scale`, and as many values of mean and std in the --preprocess file as the images have "
                "bands"
            )
        raise BadInputError(
            f"{where}: {len(unreadable)} of {read or total} image files cannot be read: {describe(unreadable)}",
            hint=hint,
        )


def _printable(name: str) -> str:
    """Escape line breaks and bytes that are not UTF-8 in a name: they must not break reports and JSON."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _visible_files(root: Path, option: str) -> Iterator[Path]:
    """All files below a folder except hidden ones. Linked folders are followed, each once."""

    def refuse(error: OSError) -> None:
        raise BadInputError(
            f"{option} {error.filename}: cannot be listed: {error.strerror}", hint="check its permissions"
        ) from error

    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        yield from (path for path in paths if not path.exists() or path.is_file())  # no pipes, no devices


def check_folder(root: Path, option: str) -> None:
    """Refuse a folder that cannot be scanned, before any costly work.

    Raises:
        BadInputError: no such folder, not a folder, or not readable; the message names `option`.
    """
    if not root.exists():
        raise BadInputError(f"{option} {root}: no such folder", hint="pass a folder of JPEG or PNG images")
    if not root.is_dir():
        raise BadInputError(f"{option} {root}: not a folder", hint="pass the folder that holds the images")
    if not os.access(root, os.R_OK | os.X_OK):
        raise BadInputError(f"{option} {root}: may not be read", hint="check its permissions")


def scan(root: Path, *, option: str, bands: bool = False, progress: Progress = lambda _: None) -> ImageFolder:
    """List a folder's images, nested or not, with the hash of each file's bytes.

    Files with the same bytes are kept once (they must not fall into two splits). `option` is the command
    line option to name in messages; `bands` as in `decode.check_header`.

    Raises:
        BadInputError: no such folder, not a folder, no image in it, or too many unreadable files.
    """
    check_folder(root, option)
    suffixes = IMAGE_SUFFIXES | (HEIF_SUFFIXES if register_heif() else frozenset())
    files = sorted(_visible_files(root, option))
    candidates = [p for p in files if p.suffix.lower() in suffixes]
    ignored = tuple(p.relative_to(root).as_posix() for p in files if p.suffix.lower() not in suffixes)
    if not candidates:
        found = ", ".join(kinds(ignored)) or "nothing"
        raise BadInputError(
            f"{option} {root}: no images (found {found})",
            hint="images are recognised by suffix: " + " ".join(sorted(suffixes)),
        )

    def inspect(path: Path) -> tuple[str, str | None]:
        try:
            data = path.read_bytes()
            check_header(data, bands=bands)
        except UnreadableImageError as error:
            return "", str(error)
        except OSError as error:
            return "", f"{type(error).__name__}: {error.strerror}"
        return hashlib.sha256(data).hexdigest(), None

    images: dict[str, ImageFile] = {}
    unreadable: list[Unreadable] = []
    duplicates: list[str] = []
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        for path, (sha256, reason) in zip(candidates, pool.map(inspect, candidates), strict=True):
            relative = path.relative_to(root)
            name = _printable(relative.as_posix())
            if reason is not None:
                unreadable.append(Unreadable(name, reason))
            elif sha256 in images:
                duplicates.append(name)
            else:
                images[sha256] = ImageFile(
                    path, name, sha256, relative.parts[0] if len(relative.parts) > 1 else None
                )
            progress(1)
    refuse_if_too_many_unreadable(f"{option} {root}", unreadable, len(candidates))
    return ImageFolder(root, tuple(images.values()), tuple(unreadable), tuple(duplicates), ignored)


def shuffled(images: Sequence[ImageFile], seed: int) -> list[ImageFile]:
    """Order images by a hash of content and seed: the same bytes give the same order wherever they are stored."""
    return sorted(images, key=lambda i: hashlib.sha256(f"{seed}:{i.sha256}".encode()).hexdigest())


MIN_CALIBRATE, MIN_SELECT, MIN_VERIFY = 16, 8, 32
"""Minimum number of images of each split: calibration needs a range, and the gate needs images to compare."""

MAX_SELECT = 256


def split(
    folder: ImageFolder, *, calibrate: int, verify: int, seed: int, with_verify: bool = True, select: int = 0
) -> Splits:
    """Divide a folder into disjoint `calibrate`, `select`, `verify` and `spare` sets, by content hash and seed.

    A quarter goes to *verify* (32 to `verify` images), an eighth to *select* (8 to 256, or to `select` if that is
    more), the rest, up to `calibrate` images, to *calibrate*. With `with_verify=False` (a separate verify folder is
    given) the verify set is empty. *spare* images take the place of verify images that cannot be decoded:
    `spare_count` of what is left, or of the calibration set above its minimum.

    Raises:
        BadInputError: too few images for every set to have its minimum.
    """
    images = shuffled(folder.images, seed)
    minimum_verify = MIN_VERIFY if with_verify else 0
    needed = MIN_CALIBRATE + MIN_SELECT + minimum_verify
    if len(images) < needed:
        raise BadInputError(
            f"--calib {folder.root}: {len(images)} different images, at least {needed} are needed ({MIN_CALIBRATE} "
            f"to calibrate, {MIN_SELECT} to select, {minimum_verify} to verify)",
            hint="add images (300 to 1,000 are usual)" + (", or give --verify DIR" if with_verify else ""),
        )
    n_verify = min(max(len(images) // 4, MIN_VERIFY), verify) if with_verify else 0
    n_select = min(max(len(images) // 8, MIN_SELECT), max(MAX_SELECT, select))
    held = n_verify + n_select
    n_calibrate = min(calibrate, len(images) - held)
    n_spare = min(spare_count(n_verify), len(images) - held - MIN_CALIBRATE)
    n_calibrate = min(n_calibrate, len(images) - held - n_spare)
    return {
        "verify": tuple(images[:n_verify]),
        "select": tuple(images[n_verify:held]),
        "calibrate": tuple(images[held : held + n_calibrate]),
        "spare": tuple(images[len(images) - n_spare :]) if n_spare else (),
    }


def spare_count(verify: int) -> int:
    """Number of spare images for a number of verify images: as many as may be unreadable."""
    return math.ceil(MAX_UNREADABLE_SHARE * verify)


def overlap(first: Sequence[ImageFile], second: Sequence[ImageFile]) -> list[tuple[str, str]]:
    """Pairs of names with the same bytes in both sequences."""
    by_hash = {image.sha256: image.name for image in first}
    return [(by_hash[i.sha256], i.name) for i in second if i.sha256 in by_hash]


@dataclass
class ImageStream:
    """Batches of decoded images, prefetched by threads while the caller computes.

    Iterating yields `Pixels` [n, crop_height, crop_width, channels] with n <= batch_size, and fills `images` (those
    that were yielded, in order) and `unreadable`. At most three batches are in memory. It ends after `limit` images.

    Args:
        whole: number of files of the set that `files` are a shard of, by default their own: the share of unreadable
            ones that is tolerated is one of the set.

    Raises (while iterating):
        BadInputError: too many of the files cannot be decoded; or one has changed or vanished since the scan. Results
            are kept under the hashes of the scan, and would be wrong.
    """

    files: Sequence[ImageFile]
    preprocess: Preprocess
    batch_size: int
    root: Path
    limit: int | None = None
    whole: int | None = None
    images: list[ImageFile] = field(default_factory=list, init=False)
    unreadable: list[Unreadable] = field(default_factory=list, init=False)
    _largest: list[int] = field(default_factory=list, init=False)

    @property
    def largest(self) -> int:
        """Largest value of the images of 16 bits that were cut to 8; 0 if there were none."""
        return max(self._largest, default=0)

    def _load(self, file: ImageFile) -> Pixels | Unreadable:
        data = read_unchanged(file.path, file.sha256)
        try:
            pixels, largest = read_pixels(data, self.preprocess)
            self._largest.append(largest)
            return pixels
        except UnreadableImageError as error:
            return Unreadable(file.name, str(error))

    def __iter__(self) -> Iterator[Pixels]:
        self.images.clear()
        self.unreadable.clear()
        batch: list[Pixels] = []
        waiting: deque[tuple[ImageFile, Future[Pixels | Unreadable]]] = deque()
        todo = iter(self.files)
        with ThreadPoolExecutor(DECODE_THREADS) as pool:
            try:
                while True:
                    while len(waiting) < 2 * self.batch_size and (file := next(todo, None)) is not None:
                        waiting.append((file, pool.submit(self._load, file)))
                    if not waiting or len(self.images) == self.limit:
                        break
                    file, future = waiting.popleft()
                    loaded = future.result()
                    if isinstance(loaded, Unreadable):
                        self.unreadable.append(loaded)
                        read = len(self.images) + len(self.unreadable)
                        total = self.whole or len(self.files)
                        refuse_if_too_many_unreadable(str(self.root), self.unreadable, total, read)
                        continue
                    self.images.append(file)
                    batch.append(loaded)
                    del loaded, future  # the batch's own copy is enough while the caller computes
                    if len(batch) == self.batch_size:
                        stacked = np.stack(batch)
                        batch.clear()
                        yield stacked
                        del stacked
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        if batch:
            yield np.stack(batch)

    def all(self) -> Pixels:
        """All images at once, `Pixels` [N, crop_height, crop_width, channels].

        Raises:
            BadInputError: none can be decoded, or too many cannot.
        """
        batches = list(self)
        if not batches:
            raise BadInputError(f"{self.root}: no image could be decoded", hint="check the folder")
        return np.concatenate(batches)
