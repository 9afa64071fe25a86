"""Compare an engine's logits with a reference.

A comparison that compared nothing fails. See docs/parity.md for each metric and default, and its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt

from export_zoo.base.errors import ParityError
from export_zoo.engines.parity.sums import TIE, Sums, directions, sums_of
from export_zoo.engines.parity.tasks import Head

Logits = npt.NDArray[np.float32]

MIN_RELATIVE_SPREAD = 1e-4
"""Minimum spread of a reference's logits between images, as a share of the largest logit, for a comparison."""

WITHOUT_NOISE = 200.0
"""Maximum SQNR, in dB: the value for equal logits. Its negative is the value for logits that are not finite."""

MIN_SPREAD = 1e-6
MISPLACED_FACTOR, STANDS_OUT = 4.0, 2.0
_CLASS_BLOCK = 512


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


def _nearest(reference: Logits, engine: Logits) -> float:
    """`nearest`."""
    r, e = directions(reference), directions(engine)
    to_r, to_e = r @ r.T, e @ e.T
    for table in (to_r, to_e):
        np.fill_diagonal(table, -np.inf)
    chosen = np.take_along_axis(to_r, to_e.argmax(axis=1)[:, None], 1)[:, 0]
    return float((chosen >= to_r.max(axis=1) - TIE).mean())


def _correlation(sums: Sums) -> float:
    """Smallest correlation of one quantity; those that hardly vary are left out."""
    spread = np.sqrt(sums.squares / sums.rows)
    varying = spread >= max(MIN_SPREAD, MIN_RELATIVE_SPREAD * sums.largest)
    engine_squares = sums.squares + 2 * sums.products + sums.error_squares
    norms = np.sqrt(sums.squares * np.maximum(engine_squares, 0.0))
    found = (sums.squares + sums.products) / np.where(norms == 0, 1.0, norms)
    return float(found[varying].min(initial=1.0))


def metrics_of(
    sums: Sums, head: Head, *, misplaced: int | None = None, nearest: float | None = None
) -> Metrics:
    """Metrics of sums.

    Args:
        head: meaning of the values.
        misplaced, nearest: these metrics, which need all rows at once.
    """
    head = replace(head, classes=sums.classes)
    rows, classes, figures = sums.rows, sums.classes, dict[str, float]()
    if sums.labelled:
        figures["reference_accuracy"] = sums.reference_right / sums.labelled
        figures["accuracy"] = sums.right / sums.labelled
        figures["accuracy_drop"] = figures["reference_accuracy"] - figures["accuracy"]
    if not sums.finite:
        worst = {"misplaced": classes, "relative_error": float("inf")}
        figures |= {metric: worst.get(metric, 0.0) for metric in head.figures if "accuracy" not in metric}
        inf = float("inf")
        return Metrics(rows, classes, inf, inf, -WITHOUT_NOISE, 0.0, **figures)  # type: ignore[arg-type]
    if head.by_class:
        figures["top1"], figures["top5"] = sums.top1 / rows, sums.top5 / (rows * min(5, classes))
    if head.by_threshold:
        figures["agreement"] = sums.agreeing / (rows * classes)
    if "misplaced" in head.figures and misplaced is not None:
        figures["misplaced"] = misplaced
    if "correlation" in head.figures:
        figures["correlation"] = _correlation(sums)
        figures["relative_error"] = sums.error_magnitudes / sums.magnitudes
    if "similarity" in head.figures:
        figures["similarity"] = sums.similarity / rows
    if "nearest" in head.figures and nearest is not None:
        figures["nearest"] = nearest
    # The engine's values minus the reference's means are c + d; the sum of c is 0.
    signal, product = float(sums.squares.sum()), float(sums.products.sum())
    norms = float(np.sqrt(signal * max(signal + 2 * product + sums.noise, 0.0)))
    decibels = 10.0 * float(np.log10(signal / sums.noise)) if sums.noise else WITHOUT_NOISE
    return Metrics(
        images=rows,
        classes=classes,
        max_abs=sums.largest_error,
        max_rel=sums.largest_error / float(np.sqrt(signal / (rows * classes))),
        sqnr=min(WITHOUT_NOISE, decibels),
        cosine=0.0 if norms == 0 else (signal + product) / norms,
        **figures,  # type: ignore[arg-type]
    )


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
    head = replace(head or Head(), classes=reference.shape[1])
    if labels is not None and len(labels) != len(reference):
        raise ParityError(f"nothing to compare: {len(labels)} labels for {len(reference)} images")
    sums = sums_of(reference, engine, head, labels)
    misplaced, nearest = None, None
    if sums.finite and "misplaced" in head.figures:
        misplaced = _misplaced(reference, engine)
    if sums.finite and "nearest" in head.figures:
        nearest = _nearest(reference, engine)
    return metrics_of(sums, head, misplaced=misplaced, nearest=nearest)
