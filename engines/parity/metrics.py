"""Compare an engine's logits with a reference, and judge the figures by tolerances.

A comparison that compared nothing fails. See docs/parity.md for each metric and default, and its reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from export_zoo.base.errors import ParityError

Logits = npt.NDArray[np.float32]
Size = tuple[int, int]
"""Height and width of the input, in pixels."""

MIN_RELATIVE_SPREAD = 1e-4
"""Minimum spread of a reference's logits between images, as a share of the largest logit, for a comparison."""

WITHOUT_NOISE = 200.0
"""Maximum SQNR, in dB: the value for equal logits. Its negative is the value for logits that are not finite."""

MIN_SPREAD = 1e-6
MISPLACED_FACTOR, STANDS_OUT = 4.0, 2.0
_CLASS_BLOCK = 512


@dataclass(frozen=True)
class Metrics:
    """Figures of one comparison; all are over `images` x `classes` logits.

    Reference logits r and engine logits e; c is r minus its mean over the images, per class, so that a
    constant vector scores nothing.
    """

    images: int
    classes: int
    max_abs: float
    """max |e - r|, in logits."""
    max_rel: float
    """max_abs over the spread of the reference: the standard deviation of c."""
    sqnr: float
    """10 log10(sum c^2 / sum (e - r)^2), in dB; capped at 200."""
    cosine: float
    """Cosine between c and e minus the reference's means."""
    top1: float
    """Share of images whose best class is the same."""
    top5: float
    """Mean share of the reference's five best classes (fewer where there are fewer) among the engine's."""
    misplaced: int
    """Classes whose logits lie far closer to another class's reference than to their own: permuted labels."""
    accuracy: float | None = None
    """Top-1 accuracy of the engine, where labels are known."""
    reference_accuracy: float | None = None
    accuracy_drop: float | None = None
    """reference_accuracy - accuracy, as a share (0.01 is one point)."""

    def as_dict(self) -> dict[str, float | int | None]:
        """Figures for JSON: those that are not finite become None."""
        return {k: v if v is None or np.isfinite(v) else None for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Limit:
    """One tolerance: `metric` must be at least (or at most) `value`."""

    metric: str
    value: float

    @property
    def at_least(self) -> bool:
        return self.metric in AT_LEAST

    def holds(self, metrics: Metrics) -> bool | None:
        """Whether the limit holds; None if the metric was not measured (accuracy without labels). NaN never holds."""
        measured = getattr(metrics, self.metric)
        if measured is None:
            return None
        return bool(measured >= self.value if self.at_least else measured <= self.value)

    def __str__(self) -> str:
        return f"{self.metric} {'>=' if self.at_least else '<='} {self.value:g}"


AT_LEAST = frozenset({"sqnr", "cosine", "top1", "top5", "accuracy"})
AT_MOST = frozenset({"max_abs", "max_rel", "misplaced", "accuracy_drop"})
METRICS = AT_LEAST | AT_MOST

MIN_UNFUSED_COSINE = 0.5
"""Minimum cosine to eager for an engine with random weights (1 dB of SQNR). A wrong precision graph is below it."""

UNFUSED_SQNR_DB = (6.0, 20.0)
"""Bounds of the SQNR limit for engines with random weights; see `unfused_tolerances`."""


def unfused_tolerances(graph_sqnr: float) -> dict[str, float]:
    """Limits for an engine with random weights against its own precision graph, run without fusing.

    Engine and graph differ by rounding ties only, but a network of random weights amplifies each flipped tie
    nearly up to the quantization noise itself. So the engine must be at least as close to its graph as the graph
    is to eager (`graph_sqnr`, in dB), within 6 to 20 dB; a wrong scale or a wrong kernel gives 0 dB.
    """
    return {"sqnr": float(np.clip(graph_sqnr, *UNFUSED_SQNR_DB))}


def limits_of(tolerances: Mapping[str, float]) -> list[Limit]:
    return [Limit(metric, value) for metric, value in sorted(tolerances.items())]


def check_reference(reference: Logits, where: str = "") -> None:
    """Refuse a reference that no comparison can use.

    Args:
        where: text before the problem in the message, for example "at 64x64, ".

    Raises:
        ParityError: fewer than two images or classes, a logit that is not finite, or logits that hardly vary between
            images.
    """
    if reference.ndim != 2 or reference.shape[0] < 2 or reference.shape[1] < 2:
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


def compare(reference: Logits, engine: Logits, labels: Sequence[int] | None = None) -> Metrics:
    """Figures of engine logits against reference logits, both float32 [images, classes].

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
    best = _top(reference, 1)[:, 0], _top(engine, 1)[:, 0]
    finite = bool(np.isfinite(engine).all())
    accuracy = reference_accuracy = drop = None
    if labels is not None and len(labels) != images:
        raise ParityError(f"nothing to compare: {len(labels)} labels for {images} images")
    if labels is not None:
        truth = np.asarray(labels)
        reference_accuracy = float((best[0] == truth).mean())
        accuracy = float((best[1] == truth).mean()) if finite else 0.0
        drop = reference_accuracy - accuracy
    if not finite:
        inf = float("inf")
        worst = (inf, inf, -WITHOUT_NOISE, 0.0, 0.0, 0.0, classes)
        return Metrics(images, classes, *worst, accuracy, reference_accuracy, drop)
    r, e = reference.astype(np.float64), engine.astype(np.float64)
    mean = r.mean(axis=0)
    centred, other = r - mean, e - mean
    signal, noise = float((centred**2).sum()), float(((e - r) ** 2).sum())
    norms = float(np.linalg.norm(centred) * np.linalg.norm(other))
    max_abs = float(np.abs(e - r).max())
    five = min(5, classes)
    top_r, top_e = _top(reference, five), _top(engine, five)
    shared = [len(set(a) & set(b)) / five for a, b in zip(top_r.tolist(), top_e.tolist(), strict=True)]
    return Metrics(
        images=images,
        classes=classes,
        max_abs=max_abs,
        max_rel=max_abs / float(centred.std()),
        sqnr=WITHOUT_NOISE if noise == 0 else min(WITHOUT_NOISE, 10.0 * float(np.log10(signal / noise))),
        cosine=0.0 if norms == 0 else float((centred * other).sum()) / norms,
        top1=float((best[0] == best[1]).mean()),
        top5=float(np.mean(shared)),
        misplaced=_misplaced(reference, engine),
        accuracy=accuracy,
        reference_accuracy=reference_accuracy,
        accuracy_drop=drop,
    )


def failures(metrics: Metrics, tolerances: Mapping[str, float]) -> list[str]:
    """Descriptions of the tolerances that do not hold, for people; empty if the gate passes.

    Raises:
        ParityError: a tolerance cannot be applied, or there is none (the gate would pass without a check).
    """
    judged = [(limit, limit.holds(metrics)) for limit in limits_of(tolerances)]
    unmeasured = [limit.metric for limit, holds in judged if holds is None]
    if unmeasured or not judged:
        raise ParityError(
            "the parity gate has nothing to judge by: " + (", ".join(unmeasured) or "no tolerance given"),
            hint="give a tolerance on a metric that is measured; accuracy needs labels",
        )
    return [
        f"{limit.metric} is {getattr(metrics, limit.metric):.6g}, must be {limit}"
        for limit, holds in judged
        if holds is False
    ]


def odd_batch(minimum: int, maximum: int, beside: Sequence[int]) -> int | None:
    """An odd batch size in [minimum, maximum] that is not in `beside`, near the middle; None if there is none."""
    middle = (minimum + maximum) / 2
    odd = [n for n in range(minimum, maximum + 1) if n % 2 and n not in beside]
    return min(odd, key=lambda n: abs(n - middle), default=None)


def batches_to_check(minimum: int, optimum: int, maximum: int) -> list[int]:
    """Batch sizes of the gate: min, opt, max and an odd one in the range; sorted, each once."""
    sizes = {minimum, optimum, maximum}
    odd = odd_batch(minimum, maximum, sorted(sizes))
    return sorted(sizes | ({odd} if odd is not None else set()))


def odd_size(least: Size, most: Size) -> Size | None:
    """An input size (height, width) in the range and unlike its ends; None if there is none.

    Height and width are odd and differ if the range allows it. They divide the range by the golden section: thirds of
    round numbers are close to multiples of 32, where strided layers round as they do at those multiples.
    """

    def near(axis: int, share: float, beside: int) -> int:
        low, high = least[axis], most[axis]
        wanted = low + share * (high - low)
        return min(range(low, high + 1), key=lambda n: (n % 2 == 0, n == beside, abs(n - wanted)))

    height = near(0, 0.382, 0)
    found = height, near(1, 0.618, height)
    return found if found not in (least, most) else None


def sizes_to_check(least: Size, optimum: Size, most: Size) -> list[Size]:
    """Input sizes of the gate in addition to opt: min, an odd one in the range, and max; each once."""
    sizes = (least, odd_size(least, most), most)
    return list(dict.fromkeys(size for size in sizes if size is not None and size != optimum))
