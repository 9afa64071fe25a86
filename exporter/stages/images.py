"""Stage: choose the images for calibration, selection and verification, and the class labels of the verify images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from export_zoo.base.errors import BadInputError
from export_zoo.calibration import images
from export_zoo.calibration.images import ImageFolder, Splits
from export_zoo.exporter.options import DEFAULT_CALIB_IMAGES, DEFAULT_VERIFY_IMAGES
from export_zoo.exporter.run.context import Context
from export_zoo.exporter.stages.labels import FolderLabels, folder_labels

if TYPE_CHECKING:
    from export_zoo.exporter.models.spec import ModelSpec

SYNTHETIC_IMAGES = 64

MAX_HELD_OUT = 512
"""Maximum number of verify images in a bundle (77 MB at 224x224). On further ones, engines are compared at export only.
"""


@dataclass(frozen=True)
class ChosenImages:
    """Disjoint splits. If `synthetic`, they are empty, and seeded synthetic images replace *verify*."""

    splits: Splits
    verify_root: Path | None
    synthetic: bool
    labels: list[int] | None
    """Class index per verify image and spare; None if the folders give no labels."""
    categories: tuple[str, ...]
    """Class names by index, if known."""
    select_labels: list[int] | None = None
    """Class index per select image; None if the folders give no labels."""


def _scan(context: Context, folder: Path, option: str, *, bands: bool) -> ImageFolder:
    with context.reporter.stage("images") as stage, context.reporter.bar("images", None) as progress:
        found = images.scan(folder, option=option, bands=bands, progress=progress)
        stage.detail = f"{option} {folder}: {len(found.images)} images"
        if left_out := found.left_out():
            stage.detail += f", left out: {', '.join(left_out)}"
    context.warn_unreadable(folder, [(u.name, u.reason) for u in found.unreadable])
    return found


def choose_images(context: Context, spec: ModelSpec) -> ChosenImages:
    """Scan and split the folders of --calib and --verify. Without folders, synthetic images are used.

    Raises:
        BadInputError: a folder is unusable, has too few images, or both share images.
    """
    options, categories = context.options, spec.labels
    splits: Splits = {"calibrate": (), "select": (), "verify": (), "spare": ()}
    bands = spec.preprocess.keeps_values
    if options.calib is None and options.calib_images != DEFAULT_CALIB_IMAGES:
        context.reporter.warn("--calib-images has no effect without --calib")
    if options.calib is None and options.verify is None:
        if options.verify_images != DEFAULT_VERIFY_IMAGES:
            context.reporter.warn("--verify-images has no effect without --calib or --verify")
        context.reporter.warn(
            f"no --calib or --verify: parity is checked on {SYNTHETIC_IMAGES} seeded synthetic images"
        )
        return ChosenImages(splits, None, True, None, categories)
    calib = _scan(context, options.calib, "--calib", bands=bands) if options.calib is not None else None
    check = _scan(context, options.verify, "--verify", bands=bands) if options.verify is not None else None
    if calib is not None:
        splits = images.split(
            calib,
            calibrate=options.calib_images,
            verify=options.verify_images,
            seed=options.seed,
            with_verify=check is None,
            select=options.aim.images if options.aim is not None else 0,
        )
    if check is not None:
        _check_verify_folder(calib, check)
        shuffled, wanted = images.shuffled(check.images, options.seed), options.verify_images
        splits["verify"] = tuple(shuffled[:wanted])
        splits["spare"] = tuple(shuffled[wanted : wanted + images.spare_count(wanted)])
    source = check or calib
    assert source is not None
    classes = 2 if spec.head.task == "binary" else spec.num_classes
    found = FolderLabels({}, "no labels per pixel")
    if not spec.head.labelled:
        found = FolderLabels({}, f"none for {spec.head.task}")
    elif not spec.dense:
        found = folder_labels(source.images, categories, classes)
    with context.reporter.stage("splits") as stage:
        stage.detail = ", ".join(f"{name} {len(files)}" for name, files in splits.items() if files)
        stage.detail += f"; labels: {found.explanation}"
        if spec.head.task == "binary" and found.by_folder:
            named = {index: folder for folder, index in found.by_folder.items()}
            stage.detail += f": {named.get(0, '-')} = no, {named.get(1, '-')} = yes"
    if found.warning:
        context.reporter.warn(found.warning)
    if not categories and len(found.by_folder) == classes:
        categories = tuple(sorted(found.by_folder, key=lambda name: found.by_folder[name]))
    labels = found.of((*splits["verify"], *splits["spare"]))
    select = found
    if calib is not None and check is not None and found.by_folder:
        select = folder_labels(calib.images, categories, classes)
    return ChosenImages(
        splits,
        source.root,
        False,
        labels,
        categories,
        select.of(splits["select"]) if splits["select"] else None,
    )


def _check_verify_folder(calib: ImageFolder | None, check: ImageFolder) -> None:
    if calib is not None and (both := images.overlap(calib.images, check.images)):
        raise BadInputError(
            f"--verify {check.root}: {len(both)} of its images are also in --calib, {both[0][1]} for example",
            hint="verify on images that do not calibrate, or leave out --verify: the images of --calib are split then",
        )
    if len(check.images) < images.MIN_VERIFY:
        raise BadInputError(
            f"--verify {check.root}: {len(check.images)} different images, at least {images.MIN_VERIFY} are needed",
            hint="add images",
        )
