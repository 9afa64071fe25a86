"""Sums over rows of values, from which metrics follow: those of parts can be merged.

Rows of engines are compared part by part, on any number of machines and in constant memory. The same parts, merged in
the same order, give the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from export_zoo.engines.parity.tasks import Head

Logits = npt.NDArray[np.float32]
Vector = npt.NDArray[np.float64]
"""float64 [classes]"""

TIE = 1e-6
"""Two values are tied if they differ by less than this share of the largest value: some roundings of float32."""


@dataclass(frozen=True)
class Sums:
    """Sums over rows of reference values r and of d = e - r, where e are the engine's.

    Means and squares about them are merged by the formula of Chan, Golub and LeVeque (1983), which does not cancel.

    Attributes:
        rows: number of rows.
        finite: whether all engine values are; if not, the other sums of its values mean nothing.
        largest_error: max |d|.
        largest: max |r|.
        mean, mean_error: means of r and d.
        squares, error_squares, products: sums of (r - mean)^2, (d - mean_error)^2, and (r - mean) (d - mean_error).
        noise: sum of d^2, over all classes.
        magnitudes, error_magnitudes: sums of |r| and |d|, over all classes.
        top1, top5: number of classes among the reference's best one and five that are among the engine's; see
            `Metrics`.
        agreeing: number of yes-or-no decisions that are the same.
        similarity: sum of the rows' cosines between r and e.
        labelled: number of rows with a label.
        right, reference_right: number of these where engine and reference decide for the label.
    """

    rows: int
    finite: bool
    largest_error: float
    largest: float
    mean: Vector
    mean_error: Vector
    squares: Vector
    error_squares: Vector
    products: Vector
    noise: float
    magnitudes: float
    error_magnitudes: float
    top1: int = 0
    top5: int = 0
    agreeing: int = 0
    similarity: float = 0.0
    labelled: int = 0
    right: int = 0
    reference_right: int = 0

    @property
    def classes(self) -> int:
        return len(self.mean)

    def merged(self, other: Sums) -> Sums:
        """Sums over both sets of rows."""
        rows = self.rows + other.rows
        share, weight = other.rows / rows, self.rows * other.rows / rows
        apart, errors_apart = other.mean - self.mean, other.mean_error - self.mean_error
        added = "noise magnitudes error_magnitudes top1 top5 agreeing similarity labelled right reference_right".split()
        return Sums(
            rows=rows,
            finite=self.finite and other.finite,
            largest_error=max(self.largest_error, other.largest_error),
            largest=max(self.largest, other.largest),
            mean=self.mean + share * apart,
            mean_error=self.mean_error + share * errors_apart,
            squares=self.squares + other.squares + weight * apart**2,
            error_squares=self.error_squares + other.error_squares + weight * errors_apart**2,
            products=self.products + other.products + weight * apart * errors_apart,
            **{name: getattr(self, name) + getattr(other, name) for name in added},
        )

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """All sums as arrays, for `numpy.savez`."""
        return {field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}

    def digest(self) -> str:
        """Hex SHA-256 of all sums."""
        return hashlib.sha256(b"".join(array.tobytes() for array in self.arrays().values())).hexdigest()

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Sums:
        """The sums of `arrays`."""
        values: dict[str, Any] = {
            name: array if array.ndim else array.item() for name, array in arrays.items()
        }
        return cls(**values)


def sums_of(
    reference: Logits,
    engine: Logits,
    head: Head,
    labels: Sequence[int] | None = None,
    largest: float | None = None,
) -> Sums:
    """Sums over rows of values, float32 [rows, classes].

    Args:
        head: meaning of the values.
        labels: class index per row; 0 or 1 for binary.
        largest: the value whose share makes ties (`TIE`); by default the largest magnitude of the reference.
    """
    head, r = replace(head, classes=reference.shape[1]), reference.astype(np.float64)
    magnitude = float(np.abs(reference).max())
    finite = bool(np.isfinite(engine).all())
    d = engine.astype(np.float64) - r if finite else np.zeros_like(r)
    mean, mean_error = r.mean(axis=0), d.mean(axis=0)
    centred, centred_error = r - mean, d - mean_error
    tie = TIE * (magnitude if largest is None else largest)
    counts: dict[str, int] = {}
    similarity = 0.0
    if finite and head.by_class:
        counts["top1"], counts["top5"] = _agreeing(reference, engine, min(5, head.classes), tie)
    if finite and head.by_threshold:
        at_threshold = np.abs(reference - head.threshold) <= max(tie, TIE * head.threshold)
        same = (reference > head.threshold) == (engine > head.threshold)
        counts["agreeing"] = int((same | at_threshold).sum())
    if finite and "similarity" in head.figures:
        similarity = float((directions(reference) * directions(engine)).sum())
    if labels is not None and head.labelled:
        counts["labelled"] = len(labels)
        counts["reference_right"] = _right(reference, labels, head)
        counts["right"] = _right(engine, labels, head) if finite else 0
    return Sums(
        rows=len(r),
        finite=finite,
        largest_error=float(np.abs(d).max()),
        largest=magnitude,
        mean=mean,
        mean_error=mean_error,
        squares=(centred**2).sum(axis=0),
        error_squares=(centred_error**2).sum(axis=0),
        products=(centred * centred_error).sum(axis=0),
        noise=float((d**2).sum()),
        magnitudes=float(np.abs(r).sum()),
        error_magnitudes=float(np.abs(d).sum()),
        similarity=similarity,
        **counts,
    )


def directions(rows: Logits) -> npt.NDArray[np.float64]:
    """Rows scaled to length 1, float64."""
    long = rows.astype(np.float64)
    return np.asarray(long / np.maximum(np.linalg.norm(long, axis=1, keepdims=True), 1e-300))


def _top(logits: Logits, count: int) -> npt.NDArray[np.intp]:
    return np.argsort(-logits, axis=1, kind="stable")[:, :count]


def _agreeing(reference: Logits, engine: Logits, five: int, tie: float) -> tuple[int, int]:
    """`top1` and `top5`. A class that ties with the last of the best, in either, counts among them.

    An engine whose classes all tie decides for none of them.
    """
    tie_of_engine = min(tie, TIE * float(np.abs(engine).max()))  # its logits may be far smaller
    decides = np.ptp(engine, axis=1)[:, None] > tie_of_engine

    def level(logits: Logits, count: int, tie: float) -> Logits:
        """Least value of each row that is among its `count` best, ties included."""
        best = np.partition(logits, -count, axis=1)[:, -count]
        return np.asarray(best - tie, dtype=np.float32)[:, None]

    counts = []
    for count in (1, five):
        top_r, top_e = _top(reference, count), _top(engine, count)
        among_r = np.take_along_axis(reference, top_e, 1) >= level(reference, count, tie)
        among_e = decides & (np.take_along_axis(engine, top_r, 1) >= level(engine, count, tie_of_engine))
        counts.append(int(np.maximum(among_r.sum(axis=1), among_e.sum(axis=1)).sum()))
    return counts[0], counts[1]


def _right(logits: Logits, labels: Sequence[int], head: Head) -> int:
    """Number of rows whose decision is the label."""
    decided = _top(logits, 1)[:, 0] if head.by_class else (logits[:, 0] > head.threshold).astype(np.intp)
    return int((decided == np.asarray(labels)).sum())
