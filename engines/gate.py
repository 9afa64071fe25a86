"""The parity gate: run an engine on the verify set at several batch sizes and judge its logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from calibration.errors import ParityError
from calibration.images import Progress
from calibration.preprocess import Preprocess, UInt8Array, normalize
from engines.bundle import HeldOut
from engines.manifest import Batch, Gate
from engines.parity import (
    MIN_UNFUSED_COSINE,
    Metrics,
    batches_to_check,
    check_reference,
    compare,
    failures,
    unfused_tolerances,
)

Float32Array = npt.NDArray[np.float32]

SUBSET = 32
"""Images compared at the batch sizes other than `opt`, which gets all of them."""

MIN_LABELLED = 100
"""Fewer labelled images do not resolve an accuracy of one point: the default accuracy limit is left out."""


class Runnable(Protocol):
    def run(self, batch: Float32Array) -> Float32Array: ...


def run_in_batches(
    engine: Runnable,
    pixels: UInt8Array,
    preprocess: Preprocess,
    batch: int,
    progress: Progress = lambda _: None,
) -> Float32Array:
    """Logits of all images, run in full batches of exactly `batch` (the last is filled up by cycling)."""
    outputs = []
    for start in range(0, len(pixels), batch):
        index = np.arange(start, start + batch) % len(pixels)
        wanted = min(batch, len(pixels) - start)
        outputs.append(engine.run(normalize(pixels[index], preprocess))[:wanted])
        progress(wanted)
    return np.concatenate(outputs)


def images_compared(count: int, batch: Batch, further: int = 0) -> int:
    """How many images `judge` runs in all, for a progress bar; `further` are those of further sizes."""
    sizes = batches_to_check(batch.min, batch.opt, batch.max)
    elsewhere = further * len({batch.opt, batch.max})
    return count + sum(min(count, max(SUBSET, size)) for size in sizes if size != batch.opt) + elsewhere


def _reference(
    pixels: UInt8Array,
    eager: Float32Array,
    tolerances: Mapping[str, float],
    unfused: Callable[[UInt8Array], Float32Array] | None,
) -> tuple[Float32Array, dict[str, float]]:
    """What logits are gated against, and by which limits."""
    if unfused is None:
        return eager, dict(tolerances)
    reference = unfused(pixels)
    if not np.isfinite(reference).all():
        raise ParityError(
            "nothing to compare: the unfused precision graph's logits are not finite",
            hint="the precision graph is wrong or overflows; try other --calib images, or another --precision",
        )
    return reference, {**unfused_tolerances(compare(eager, reference).sqnr), **tolerances}


def _without_labels(limits: Mapping[str, float]) -> dict[str, float]:
    return {metric: value for metric, value in limits.items() if "accuracy" not in metric}


def _judge_size(
    engine: Runnable,
    held: HeldOut,
    preprocess: Preprocess,
    batch: Batch,
    tolerances: Mapping[str, float],
    unfused: Callable[[UInt8Array], Float32Array] | None,
    progress: Progress,
) -> list[str]:
    """What fails at one further size, at batches opt and max."""
    height, width = held.pixels.shape[1:3]
    check_reference(held.logits, f"at {height}x{width}, ")
    reference, limits = _reference(held.pixels, held.logits, tolerances, unfused)
    found = []
    for size in sorted({batch.opt, batch.max}):
        where = f"size {height}x{width}, batch {size}"
        logits = run_in_batches(engine, held.pixels, preprocess, size, progress)
        if here := _without_labels(limits):
            found += [f"{where}: {text}" for text in failures(compare(reference, logits), here)]
        if unfused is not None:
            cosine = compare(held.logits, logits).cosine
            if not cosine >= MIN_UNFUSED_COSINE:
                found.append(f"{where}: cosine to eager is {cosine:.3g}, must be >= {MIN_UNFUSED_COSINE}")
    return found


def judge(
    engine: Runnable,
    *,
    pixels: UInt8Array,
    eager: Float32Array,
    labels: Sequence[int] | None,
    preprocess: Preprocess,
    batch: Batch,
    tolerances: Mapping[str, float],
    ran: Literal["engine", "precision graph"] = "engine",
    unfused: Callable[[UInt8Array], Float32Array] | None = None,
    further: Sequence[HeldOut] = (),
    progress: Progress = lambda _: None,
) -> Gate:
    """Compare an engine's logits with the reference at batches min, opt, max and an odd one.

    Where the input's size is dynamic, also at further sizes, each at batches opt and max; accuracy aside, by the same
    limits.

    Args:
        pixels: uint8 [N, H, W, 3], images that were not calibrated on.
        eager: float32 [N, classes], eager PyTorch's logits of the same images.
        labels: class index per image, or None.
        tolerances: limits by metric, see `engines.parity`.
        ran: what `engine` is: the engine itself, or only its precision graph.
        unfused: for random weights: makes the unfused precision graph's logits of images, the reference to gate
            against by `unfused_tolerances` unless overridden; figures against eager are reported all the same.
        further: images of other sizes, and eager's logits of them.

    Raises:
        ParityError: there is nothing to compare or to judge by.
    """
    if len(pixels) == 0 or len(pixels) != len(eager):
        raise ParityError(
            f"nothing to compare: {len(pixels)} inputs, {len(eager)} reference logits",
            hint="give images to verify on (--calib or --verify)",
        )
    check_reference(eager)
    reference, limits = _reference(pixels, eager, tolerances, unfused)
    sizes = batches_to_check(batch.min, batch.opt, batch.max)
    found: list[str] = []
    whole: Metrics | None = None
    eager_metrics: Metrics | None = None
    for size in sizes:
        full = size == batch.opt
        count = len(pixels) if full else min(len(pixels), max(SUBSET, size))
        logits = run_in_batches(engine, pixels[:count], preprocess, size, progress)
        known = labels if full else None
        metrics = compare(reference[:count], logits, known)
        here = limits if full else _without_labels(limits)
        if here or full:
            found += [f"batch {size}: {text}" for text in failures(metrics, here)]
        if full:
            whole = metrics
            eager_metrics = metrics if unfused is None else compare(eager, logits, known)
    assert whole is not None
    assert eager_metrics is not None
    if unfused is not None and not eager_metrics.cosine >= MIN_UNFUSED_COSINE:
        found.append(
            f"batch {batch.opt}: cosine to eager is {eager_metrics.cosine:.3g}, must be >= {MIN_UNFUSED_COSINE}"
        )
    for held in further:
        found += _judge_size(engine, held, preprocess, batch, tolerances, unfused, progress)
    return Gate(
        ran=ran,
        reference="eager" if unfused is None else "unfused precision graph",
        tolerances=limits,
        batches=sizes,
        sizes=[held.pixels.shape[1:3] for held in further],
        metrics=whole.as_dict(),
        eager_metrics=eager_metrics.as_dict(),
        failures=found,
    )
