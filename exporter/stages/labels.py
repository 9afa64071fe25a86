"""Class labels of a verify set, from the names of its folders (ImageFolder layout)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from export_zoo.calibration.images import ImageFile


@dataclass(frozen=True)
class FolderLabels:
    """Class index of each folder, or the reason why there is none."""

    by_folder: dict[str, int]
    explanation: str

    def of(self, images: Sequence[ImageFile]) -> list[int] | None:
        """Class index per image; None if the folders give no labels."""
        if not self.by_folder or any(image.folder not in self.by_folder for image in images):
            return None
        return [self.by_folder[str(image.folder)] for image in images]


def folder_labels(images: Sequence[ImageFile], categories: Sequence[str], num_classes: int) -> FolderLabels:
    """Find the class of each first-level folder.

    In this order: folders named by class; as many folders as the network has classes, in sorted order
    (torchvision's ImageFolder, ImageNet's wnids); folders named by class index. Otherwise, there are no
    labels. There are none either if `10` would be class 2 by sorted order and class 10 by index.
    """
    folders = sorted({image.folder for image in images if image.folder is not None})
    if not folders:
        return FolderLabels({}, "no class folders")
    if any(image.folder is None for image in images):
        return FolderLabels({}, "some images lie outside of the class folders")
    names = {name: index for index, name in enumerate(categories) if list(categories).count(name) == 1}
    if categories and all(folder in names for folder in folders):
        return FolderLabels({f: names[f] for f in folders}, f"{len(folders)} class folders, by name")
    indices = all(folder.isdecimal() and int(folder) < num_classes for folder in folders)
    if len(folders) == num_classes and indices and sorted(folders, key=int) != folders:
        return FolderLabels({}, "numbered folders: sorted order and index differ, write 02 for 2")
    if len(folders) == num_classes:
        return FolderLabels({f: i for i, f in enumerate(folders)}, f"{num_classes} class folders, sorted")
    if indices:
        return FolderLabels({f: int(f) for f in folders}, f"{len(folders)} class folders, by index")
    return FolderLabels({}, f"{len(folders)} folders do not name the network's {num_classes} classes")
