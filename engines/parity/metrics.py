"""Compare an engine's logits with a reference.

A comparison that compared nothing fails. See docs/parity.md for each metric and default, and its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt

from export_zoo.base.errors import ParityError
from export_zoo.engines.parity.tasks import Head

Logits = npt.NDArray[np.float32]

MIN_RELATIVE_SPREAD = 1e-4
"""Minimum spread of a reference's logits between images, as a share of the largest logit, for a comparison."""

WITHOUT_NOISE = 200.0
"""Maximum SQNR, in dB: the value for equal logits. Its negative is the value for logits that are not finite."""

MIN_SPREAD = 1e-6
MISPLACED_FACTOR, STANDS_OUT = 4.0, 2.0
_CLASS_BLOCK = 512


TIE = 1e-6
"""Two values are tied if they differ by less than this share of the largest value: some roundings of float32."""


@dataclass(frozen=True)
class Metrics:
    """Figures of one comparison; all are over `images` x `classes` values. Those that do not fit the task are None.

    Reference values r and engine values e; c is r minus its mean over the images, per class, so that a constant
    vector scores nothing.
    """

    images: int
    """Number of rows: images, or sampled pixels or tokens."""
    classes: int
    max_abs: float
    """max |e - r|, in logits."""
    max_rel: float
    """max_abs over the spread of the reference: the standard deviation of c."""
    sqnr: float
    """10 log10(sum c^2 / sum (e - r)^2), in dB; capped at 200."""
    cosine: float
    """Cosine between c and e minus the reference's means."""
    top1: float | None = None
    """Share of images whose best class is the same. A class that ties with the best counts as the same."""
    top5: float | None = None
    """Mean share of the reference's five best classes (fewer where there are fewer) among the engine's, with ties."""
    misplaced: int | None = None
    """Classes whose logits lie far closer to another class's reference than to their own: permuted labels."""
    agreement: float | None = None
    """Share of yes-or-no decisions that are the same. A reference at the threshold agrees with both."""
    correlation: float | None = None
    """Smallest Pearson correlation of one quantity over the images; quantities that hardly vary are left out."""
    relative_error: float | None = None
    """sum |e - r| / sum |r|, the weighted absolute percentage error as a share."""
    similarity: float | None = None
    """Mean over images of the cosine between r and e, of one image's features."""
    nearest: float | None = None
    """Share of images whose nearest other image, by cosine, is the same. Ties count as the same."""
    accuracy: float | None = None
    """Accuracy of the engine (top-1, or by the threshold), where labels are known."""
    reference_accuracy: float | None = None
    accuracy_drop: float | None = None
    """reference_accuracy - accuracy, as a share (0.01 is one point)."""

    def as_dict(self) -> dict[str, float | int | None]:
        """Figures for JSON: those that are not finite become None."""
        return {k: v if v is None or np.isfinite(v) else None for k, v in asdict(self).items()}


def check_reference(reference: Logits, where: str = "") -> None:
    """Refuse a reference that no comparison can use.

    Args:
        where: text before the problem in the message, for example "at 64x64, ".

    Raises:
        ParityError: fewer than two images, no class, a logit that is not finite, or logits that hardly vary between
            images.
    """
    if reference.ndim != 2 or reference.shape[0] < 2 or reference.shape[1] < 1:
        raise ParityError(
            f"nothing to compare: {where}reference logits of shape {list(reference.shape)}",
            hint="give more images to verify on (--calib or --verify)",
        )
    if not np.isfinite(reference).all():
        raise ParityError(
            f"nothing to compare: {where}the eager model's own logits are not finite",
            hint="check the weights and the preprocessing",
        )
    spread = float((reference - reference.mean(axis=0)).std())
    size = float(np.abs(reference).max())
    if spread < max(MIN_SPREAD, MIN_RELATIVE_SPREAD * size):
        raise ParityError(
            f"nothing to compare: {where}the eager logits hardly vary between images (spread {spread:.2e}, largest "
            f"logit {size:.2e})",
            hint="check that the images differ, and use trained weights (--weights DEFAULT or a file): images that "
            "are all alike, and random or collapsed weights, cause this",
        )


def relative_errors(reference: Logits, found: Logits) -> list[float]:
    """Largest difference of each image's values, relative to the largest value of the reference's finite images.

    It is 0 for images where the reference itself is not finite, and infinite where only `found` is not finite.

    Args:
        reference, found: float32 [N, ...], of the same shape.
    """
    axes = tuple(range(1, reference.ndim))
    usable = np.isfinite(reference).all(axis=axes)
    largest = float(np.abs(reference[usable]).max(initial=0.0)) + 1e-12
    with np.errstate(invalid="ignore"):  # inf - inf
        differences = np.abs(found - reference).max(axis=axes) / largest
    return [
        0.0 if not finite else float(difference) if np.isfinite(difference) else float("inf")
        for finite, difference in zip(np.atleast_1d(usable), differences, strict=True)
    ]


def _top(logits: Logits, count: int) -> npt.NDArray[np.intp]:
    return np.argsort(-logits, axis=1, kind="stable")[:, :count]


def _misplaced(reference: Logits, engine: Logits) -> int:
    """Number of classes i with |e_i - r_i|^2 > 4 |e_i - r_j|^2 for some j: swapped rows or labels.

    Needed because swapping two classes out of a thousand hardly changes SQNR and top-1. Classes whose error does not
    stand out from the engine's mean error do not count, because nearly constant logits are all close to each other.
    (If most classes are permuted, SQNR is below 0 dB.)
    """
    r, e = reference.astype(np.float64), engine.astype(np.float64)
    own = ((e - r) ** 2).sum(axis=0)
    suspects = np.flatnonzero(own > STANDS_OUT * own.mean())
    r2 = (r * r).sum(axis=0)
    rounding = 1e-9 * (r2.mean() + 1e-30)  # of the expanded square
    count = 0
    for start in range(0, len(suspects), _CLASS_BLOCK):
        block = suspects[start : start + _CLASS_BLOCK]
        chosen = e[:, block]
        distance = (chosen * chosen).sum(axis=0)[:, None] + r2[None, :] - 2.0 * chosen.T @ r
        nearest = np.maximum(distance, 0.0).min(axis=1) + rounding
        count += int((own[block] > MISPLACED_FACTOR * nearest).sum())
    return count


def _share_agreeing(reference: Logits, engine: Logits, five: int) -> tuple[float, float]:
    """`top1` and `top5`. A class that ties with the last of the best, in either, counts among them."""

    def level(logits: Logits, count: int) -> Logits:
        """Least value of each image that is among its `count` best, ties included."""
        best = np.partition(logits, -count, axis=1)[:, -count]
        return np.asarray(best - TIE * np.abs(logits).max(), dtype=np.float32)[:, None]

    shares = []
    for count in (1, five):
        top_r, top_e = _top(reference, count), _top(engine, count)
        among_r = np.take_along_axis(reference, top_e, 1) >= level(reference, count)
        among_e = np.take_along_axis(engine, top_r, 1) >= level(engine, count)
        shares.append(float(np.maximum(among_r.sum(axis=1), among_e.sum(axis=1)).mean()) / count)
    return shares[0], shares[1]


def _agreement(reference: Logits, engine: Logits, threshold: float) -> float:
    at_threshold = np.abs(reference - threshold) <= TIE * max(float(np.abs(reference).max()), threshold)
    return float((((reference > threshold) == (engine > threshold)) | at_threshold).mean())


def _correlation(reference: Logits, engine: Logits) -> float:
    r, e = (x.astype(np.float64) - x.mean(axis=0, dtype=np.float64) for x in (reference, engine))
    varying = r.std(axis=0) >= max(MIN_SPREAD, MIN_RELATIVE_SPREAD * float(np.abs(reference).max()))
    norms = np.linalg.norm(r, axis=0) * np.linalg.norm(e, axis=0)
    found = (r * e).sum(axis=0) / np.where(norms == 0, 1.0, norms)
    return float(found[varying].min(initial=1.0))


def _nearest(reference: Logits, engine: Logits) -> tuple[float, float]:
    """`similarity` and `nearest`."""

    def directions(rows: Logits) -> npt.NDArray[np.float64]:
        long = rows.astype(np.float64)
        return np.asarray(long / np.maximum(np.linalg.norm(long, axis=1, keepdims=True), 1e-300))

    r, e = directions(reference), directions(engine)
    similarity = float((r * e).sum(axis=1).mean())
    to_r, to_e = r @ r.T, e @ e.T
    for table in (to_r, to_e):
        np.fill_diagonal(table, -np.inf)
    chosen = np.take_along_axis(to_r, to_e.argmax(axis=1)[:, None], 1)[:, 0]
    return similarity, float((chosen >= to_r.max(axis=1) - TIE).mean())


def _of_task(reference: Logits, engine: Logits, head: Head) -> dict[str, float]:
    """The metrics that fit the task; 0 if the engine's values are not finite."""
    if not np.isfinite(engine).all():
        worst = {"misplaced": reference.shape[1], "relative_error": float("inf")}
        return {metric: worst.get(metric, 0.0) for metric in head.figures if "accuracy" not in metric}
    found: dict[str, float] = {}
    if head.by_class:
        found["top1"], found["top5"] = _share_agreeing(reference, engine, min(5, head.classes))
    if head.by_threshold:
        found["agreement"] = _agreement(reference, engine, head.threshold)
    if "misplaced" in head.figures:
        found["misplaced"] = _misplaced(reference, engine)
    if "correlation" in head.figures:
        found["correlation"] = _correlation(reference, engine)
        magnitude = float(np.abs(reference).sum(dtype=np.float64))
        found["relative_error"] = float(np.abs(engine - reference).sum(dtype=np.float64)) / magnitude
    if "nearest" in head.figures:
        found["similarity"], found["nearest"] = _nearest(reference, engine)
    return found


def _accuracy(logits: Logits, labels: Sequence[int], head: Head) -> float:
    decided = _top(logits, 1)[:, 0] if head.by_class else (logits[:, 0] > head.threshold).astype(np.intp)
    return float((decided == np.asarray(labels)).mean())


def compare(
    reference: Logits, engine: Logits, labels: Sequence[int] | None = None, head: Head | None = None
) -> Metrics:
    """Figures of engine values against reference values, both float32 [rows, classes].

    Args:
        labels: class index per row; 0 or 1 for binary.
        head: meaning of the values. Default: logits of a classification.

    Raises:
        ParityError: shapes differ, the number of labels is wrong, or the reference is unusable (`check_reference`).
    """
    if reference.shape != engine.shape:
        raise ParityError(
            f"nothing to compare: reference {list(reference.shape)}, engine {list(engine.shape)}",
            hint="check that the engine's output is the model's logits",
        )
    check_reference(reference)
    images, classes = reference.shape
    head = replace(head or Head(), classes=classes)
    if labels is not None and len(labels) != images:
        raise ParityError(f"nothing to compare: {len(labels)} labels for {images} images")
    finite = bool(np.isfinite(engine).all())
    figures: dict[str, float] = _of_task(reference, engine, head)
    if labels is not None and head.labelled:
        figures["reference_accuracy"] = _accuracy(reference, labels, head)
        figures["accuracy"] = _accuracy(engine, labels, head) if finite else 0.0
        figures["accuracy_drop"] = figures["reference_accuracy"] - figures["accuracy"]
    if not finite:
        inf = float("inf")
        return Metrics(images, classes, inf, inf, -WITHOUT_NOISE, 0.0, **figures)  # type: ignore[arg-type]
    r, e = reference.astype(np.float64), engine.astype(np.float64)
    mean = r.mean(axis=0)
    centred, other = r - mean, e - mean
    signal, noise = float((centred**2).sum()), float(((e - r) ** 2).sum())
    norms = float(np.linalg.norm(centred) * np.linalg.norm(other))
    max_abs = float(np.abs(e - r).max())
    return Metrics(
        images=images,
        classes=classes,
        max_abs=max_abs,
        max_rel=max_abs / float(centred.std()),
        sqnr=WITHOUT_NOISE if noise == 0 else min(WITHOUT_NOISE, 10.0 * float(np.log10(signal / noise))),
        cosine=0.0 if norms == 0 else float((centred * other).sum()) / norms,
        **figures,  # type: ignore[arg-type]
    )
