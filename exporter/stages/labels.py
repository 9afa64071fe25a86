"""Class labels of a verify set, from the names of its folders (ImageFolder layout)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from export_zoo.calibration.images import ImageFile

SPLITS = frozenset("train training trainset val valid validation test testing eval dev".split())
"""Names of folders that divide a data set. They are no classes, unless the network has a class of that name."""

_WORDNET = re.compile(r"n\d{8}")
"""ImageNet's folder names. Their sorted order is the order of the classes."""


@dataclass(frozen=True)
class FolderLabels:
    """Class index of each folder, or the reason why there is none."""

    by_folder: dict[str, int]
    explanation: str
    depth: int = 0
    """Number of folders above those that name the classes."""
    warning: str = ""

    def of(self, images: Sequence[ImageFile]) -> list[int] | None:
        """Class index per image; None if the folders give no labels."""
        folders = [_folder(image, self.depth) for image in images]
        if not self.by_folder or any(folder not in self.by_folder for folder in folders):
            return None
        return [self.by_folder[str(folder)] for folder in folders]


def _folder(image: ImageFile, depth: int) -> str | None:
    """The folder of an image at a depth below the root; None if the image lies above it."""
    folders = PurePosixPath(image.name).parts[:-1]
    return folders[depth] if len(folders) > depth else None


def folder_labels(images: Sequence[ImageFile], categories: Sequence[str], num_classes: int) -> FolderLabels:
    """Find the class of each folder.

    Folders that are splits (`train`, `val`), and a single folder around all others, are passed over. If the names of
    the classes are known, they decide: exactly, otherwise whatever their case, separators and plural, with a warning.
    Folders named by class index, or by ImageNet's WordNet ids, are labels as well. If the names are not known, as many
    folders as the network has classes are the classes in sorted order, as in torchvision's ImageFolder.

    Otherwise, there are no labels. There are none either if `10` would be class 2 by sorted order and class 10 by
    index.
    """
    if all(image.folder is None for image in images):
        return FolderLabels({}, "no class folders")
    names = {name: index for index, name in enumerate(categories) if list(categories).count(name) == 1}
    depth = _depth(images, set(names))
    folders = sorted({folder for image in images if (folder := _folder(image, depth)) is not None})
    if any(_folder(image, depth) is None for image in images):
        return FolderLabels({}, "some images lie outside of the class folders")
    below = f" below {_shown(sorted({str(_folder(image, depth - 1)) for image in images}))}" if depth else ""
    if names and all(folder in names for folder in folders):
        return FolderLabels(
            {f: names[f] for f in folders}, f"{len(folders)} class folders, by name{below}", depth
        )
    if alike := _alike(folders, names):
        pairs = ", ".join(f"{folder} = {categories[index]}" for folder, index in list(alike.items())[:5])
        more = ", ..." if len(alike) > 5 else ""
        return FolderLabels(
            alike,
            f"{len(folders)} class folders, by similar name{below}",
            depth,
            f"labels: folders are not named exactly as the network's classes; taken are {pairs}{more}",
        )
    indices = all(folder.isdecimal() and int(folder) < num_classes for folder in folders)
    if len(folders) == num_classes and indices and sorted(folders, key=int) != folders:
        return FolderLabels({}, "numbered folders: sorted order and index differ, write 02 for 2")
    wordnet = all(map(_WORDNET.fullmatch, folders))
    if len(folders) == num_classes and (not categories or wordnet or indices):
        order = {f: i for i, f in enumerate(folders)}
        return FolderLabels(order, f"{num_classes} class folders, sorted{below}", depth)
    if indices:
        order = {f: int(f) for f in folders}
        return FolderLabels(order, f"{len(folders)} class folders, by index{below}", depth)
    unknown = [folder for folder in folders if folder not in names]
    if names and not wordnet:
        return FolderLabels(
            {},
            f"{len(folders)} folders do not name the network's {num_classes} classes: {_shown(unknown)} "
            f"{'is' if len(unknown) == 1 else 'are'} not among {_shown(list(categories))}",
        )
    return FolderLabels({}, f"{len(folders)} folders do not name the network's {num_classes} classes")


def _depth(images: Sequence[ImageFile], names: set[str]) -> int:
    """Number of folders above those that name the classes."""
    depth = 0
    while True:
        folders = {_folder(image, depth) for image in images}
        deeper = all(_folder(image, depth + 1) for image in images)
        splits = all(folder is not None and folder.casefold() in SPLITS for folder in folders)
        if folders & names or not deeper or not (splits or len(folders) == 1):
            return depth
        depth += 1


def _alike(folders: Sequence[str], names: dict[str, int]) -> dict[str, int]:
    """Class index of each folder by its name's plain form; empty unless each folder is exactly one class's."""
    plain = [_plain(name) for name in names]
    indices = {key: index for key, index in zip(plain, names.values(), strict=True) if plain.count(key) == 1}
    found = {folder: indices[_plain(folder)] for folder in folders if _plain(folder) in indices}
    return found if len(found) == len(folders) == len(set(found.values())) else {}


def _plain(name: str) -> str:
    """A name in lower case and singular, with spaces between its words."""
    text = " ".join(re.split(r"[\s_.-]+", name.casefold().strip()))
    for ending, singular in (("ies", "y"), ("ches", "ch"), ("shes", "sh"), ("sses", "ss"), ("xes", "x")):
        if text.endswith(ending):
            return text.removesuffix(ending) + singular
    return text if text.endswith(("ss", "us", "is")) else text.removesuffix("s")


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
