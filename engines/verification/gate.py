"""The parity gate: run an engine on the verify set at several batch sizes and judge its logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from export_zoo.base.errors import ParityError
from export_zoo.calibration.images import Progress
from export_zoo.calibration.preprocess import Pixels, Preprocess, normalize
from export_zoo.engines.bundle.manifest import Batch, FurtherMetrics, Gate
from export_zoo.engines.parity.checked_sizes import batches_to_check
from export_zoo.engines.parity.limits import MIN_UNFUSED_COSINE, failures, fitting, unfused_tolerances
from export_zoo.engines.parity.metrics import WITHOUT_NOISE, Metrics, check_reference, compare, metrics_of
from export_zoo.engines.parity.outputs import sampled
from export_zoo.engines.parity.sums import Sums
from export_zoo.engines.parity.tasks import Head
from export_zoo.engines.targets.base import Runner

Float32Array = npt.NDArray[np.float32]

SUBSET = 32
"""Number of images compared at batch sizes other than `opt`; at `opt`, all images are compared."""

MIN_LABELLED = 100
"""Minimum number of labelled images for the default accuracy limit: fewer do not resolve an accuracy of one point."""


def run_in_batches(
    engine: Runner,
    pixels: Pixels,
    preprocess: Preprocess,
    batch: int,
    progress: Progress = lambda _: None,
) -> tuple[Float32Array, ...]:
    """Outputs of all images, `sampled`, in full batches of exactly `batch` (the last is filled by repeating images)."""
    outputs = []
    for start in range(0, len(pixels), batch):
        index = np.arange(start, start + batch) % len(pixels)
        wanted = min(batch, len(pixels) - start)
        found = engine.run_all(normalize(pixels[index], preprocess))
        outputs.append([sampled(output)[:wanted] for output in found])
        progress(wanted)
    return tuple(np.concatenate(parts) for parts in zip(*outputs, strict=True))


def images_compared(count: int, batch: Batch, further: int = 0, patterns: int = 0) -> int:
    """Number of images that `judge` runs in all, for a progress bar.

    Args:
        count: verify images.
        further: images of further sizes.
        patterns: test patterns.
    """
    sizes = batches_to_check(batch.min, batch.opt, batch.max)
    elsewhere = further * len({batch.opt, batch.max})
    return (
        count
        + sum(min(count, max(SUBSET, size)) for size in sizes if size != batch.opt)
        + elsewhere
        + patterns
    )


Unfused = Callable[[Pixels], tuple[Float32Array, ...]]


def _judges(
    pixels: Pixels,
    eager: Mapping[str, Float32Array],
    heads: Mapping[str, Head],
    labels: Sequence[int] | None,
    tolerances: Mapping[str, float],
    unfused: Unfused | None,
    where: str = "",
) -> dict[str, _OutputJudge]:
    """A judge for each output, by name. Labels and accuracy limits apply to the first output only.

    Further outputs are held to the limits that fit their task: at least to that on SQNR, which has a default.
    """
    for name, logits in eager.items():
        check_reference(heads[name].rows(logits), where)
    references = tuple(eager.values()) if unfused is None else unfused(pixels)
    if not all(np.isfinite(logits).all() for logits in references):
        raise ParityError(
            "nothing to compare: the unfused precision graph's logits are not finite",
            hint="the precision graph is wrong or overflows; try other --calib images, or another --precision",
        )
    first = next(iter(eager))
    return {
        name: _OutputJudge(
            reference,
            eager[name],
            heads[name],
            labels if name == first else None,
            tolerances if name == first else fitting(_without_accuracy(tolerances), heads[name]),
            unfused=unfused is not None,
        )
        for name, reference in zip(eager, references, strict=True)
    }


def _judge_size(
    engine: Runner,
    pixels: Pixels,
    eager: Mapping[str, Float32Array],
    heads: Mapping[str, Head],
    preprocess: Preprocess,
    batch: Batch,
    tolerances: Mapping[str, float],
    unfused: Unfused | None,
    progress: Progress,
) -> list[str]:
    """Failures at one further size, at batches opt and max."""
    height, width = pixels.shape[1:3]
    judges = _judges(pixels, eager, heads, None, tolerances, unfused, f"at {height}x{width}, ")
    found = []
    for size in sorted({batch.opt, batch.max}):
        outputs = run_in_batches(engine, pixels, preprocess, size, progress)
        for (name, judge_of), logits in zip(judges.items(), outputs, strict=True):
            where = f"size {height}x{width}, batch {size}: " + _of_output(name, eager)
            found += [where + text for text in judge_of.elsewhere(logits)]
    return found


class Patterns(NamedTuple):
    """Test patterns (`calibration.synthetic.test_patterns`) and what is asked of an engine there."""

    names: Sequence[str]
    pixels: Pixels
    eager: Mapping[str, Float32Array]
    min_sqnr: float | None
    """Limit on the SQNR of each image, in dB; None: outputs must be finite, no more.

    INT8 clips outside its ranges by design, and half is coarse there, so only FP32 has a limit.
    """


def _judge_patterns(
    engine: Runner,
    patterns: Patterns,
    held_out: Mapping[str, Float32Array],
    preprocess: Preprocess,
    batch: Batch,
    progress: Progress,
) -> tuple[dict[str, float], list[str]]:
    """SQNR of the first output on each pattern, and failures of all outputs.

    The error on a pattern is compared with the signal of the held-out images, as even images have none of their own.
    """
    outputs = run_in_batches(engine, patterns.pixels, preprocess, batch.opt, progress)
    figures: dict[str, float] = {}
    found = []
    for (name, eager), output in zip(patterns.eager.items(), outputs, strict=True):
        reference = held_out[name].astype(np.float64)
        signal = float(((reference - reference.mean(axis=0)) ** 2).sum()) / len(reference)
        for pattern, wanted, logits in zip(patterns.names, eager, output, strict=True):
            if not np.isfinite(wanted).all():
                continue
            noise = float(((logits.astype(np.float64) - wanted) ** 2).sum())
            sqnr = WITHOUT_NOISE if noise == 0 else -WITHOUT_NOISE
            if noise > 0 and np.isfinite(noise):
                sqnr = float(np.clip(10 * np.log10(signal / noise), -WITHOUT_NOISE, WITHOUT_NOISE))
            if name == next(iter(patterns.eager)):
                figures[pattern] = sqnr
            where = f"test pattern {pattern!r}: " + _of_output(name, patterns.eager)
            if not np.isfinite(logits).all():
                found.append(f"{where}not finite, but eager's is")
            elif patterns.min_sqnr is not None and sqnr < patterns.min_sqnr:
                found.append(f"{where}sqnr is {sqnr:.6g}, must be >= {patterns.min_sqnr:g}")
    return figures, found


def _of_output(name: str, eager: Mapping[str, Float32Array]) -> str:
    return "" if name == next(iter(eager)) else f"output {name}: "


def judge(
    engine: Runner,
    *,
    pixels: Pixels,
    eager: Mapping[str, Float32Array],
    heads: Mapping[str, Head],
    labels: Sequence[int] | None,
    preprocess: Preprocess,
    batch: Batch,
    tolerances: Mapping[str, float],
    ran: Literal["engine", "precision graph"] = "engine",
    unfused: Unfused | None = None,
    sizes: Sequence[tuple[Pixels, Mapping[str, Float32Array]]] = (),
    patterns: Patterns | None = None,
    whole: Mapping[str, Sums] | None = None,
    progress: Progress = lambda _: None,
) -> Gate:
    """Compare all of an engine's outputs with the reference at batches min, opt, max and an odd one.

    If the input size is dynamic, outputs at further sizes are also compared, each at batches opt and max. The limits
    are the same, without accuracy.

    Args:
        pixels: [N, H, W, C], images that were not used for calibration.
        eager: eager PyTorch's outputs for the same images by name, the logits first: float32 [N], [N, classes],
            [N, tokens, classes] or [N, classes, h, w], `sampled`.
        heads: what each output means, by name.
        labels: class index per image, or None.
        tolerances: limits by metric; see `parity.metrics`.
        ran: whether `engine` is the engine itself or only its precision graph.
        unfused: for random weights: computes the unfused precision graph's outputs for images. The gate compares with
            these, by `unfused_tolerances` unless overridden. Figures against eager are still reported.
        sizes: images of further sizes, and eager's outputs for them.
        patterns: test patterns. Outputs must be finite where eager's are.
        whole: sums over more verify images than `pixels`, at batch opt against eager, by output. Figures and limits at
            batch opt are of these then, but for metrics that need all rows at once.

    Raises:
        ParityError: there is nothing to compare, or no tolerance to apply.
    """
    counts = [len(logits) for logits in eager.values()]
    if len(pixels) == 0 or any(count != len(pixels) for count in counts):
        raise ParityError(
            f"nothing to compare: {len(pixels)} inputs, {min(counts)} reference logits",
            hint="give images to verify on (--calib or --verify)",
        )
    names = list(eager)
    judges = _judges(pixels, eager, heads, labels, tolerances, unfused)
    batches = batches_to_check(batch.min, batch.opt, batch.max)
    found: list[str] = []
    figures: dict[str, FurtherMetrics] = {}
    for size in batches:
        full = size == batch.opt
        count = len(pixels) if full else min(len(pixels), max(SUBSET, size))
        outputs = run_in_batches(engine, pixels[:count], preprocess, size, progress)
        if len(outputs) != len(names):
            raise ParityError(
                f"nothing to compare: the engine has {len(outputs)} outputs, eager PyTorch {len(names)}"
            )
        for name, logits in zip(names, outputs, strict=True):
            where = f"batch {size}: " + _of_output(name, eager)
            if full:
                figures[name], problems = judges[name].whole(logits, whole[name] if whole else None)
            else:
                problems = judges[name].part(logits)
            found += [where + text for text in problems]
    for images, outputs_of in sizes:
        found += _judge_size(
            engine, images, outputs_of, heads, preprocess, batch, tolerances, unfused, progress
        )
    on_patterns: dict[str, float] = {}
    if patterns is not None:
        on_patterns, problems = _judge_patterns(engine, patterns, eager, preprocess, batch, progress)
        found += problems
    return Gate(
        ran=ran,
        reference="eager" if unfused is None else "unfused precision graph",
        tolerances=judges[names[0]].limits,
        batches=batches,
        sizes=[images.shape[1:3] for images, _ in sizes],
        metrics=figures[names[0]].metrics,
        eager_metrics=figures[names[0]].eager_metrics,
        further={name: figures[name] for name in names[1:]},
        patterns=on_patterns,
        failures=found,
    )


def _without_accuracy(limits: Mapping[str, float]) -> dict[str, float]:
    return {metric: value for metric, value in limits.items() if "accuracy" not in metric}


class _OutputJudge:
    """Compares one output with its reference."""

    def __init__(
        self,
        reference: Float32Array,
        eager: Float32Array,
        head: Head,
        labels: Sequence[int] | None,
        tolerances: Mapping[str, float],
        *,
        unfused: bool,
    ) -> None:
        self._reference, self._eager, self._labels, self._unfused = reference, eager, labels, unfused
        self._head = head
        self.limits = dict(tolerances)
        if unfused:
            graph = self._compare(eager, reference)
            self.limits = {**unfused_tolerances(graph.sqnr), **self.limits}

    def _compare(
        self, reference: Float32Array, found: Float32Array, labels: Sequence[int] | None = None
    ) -> Metrics:
        return compare(self._head.rows(reference), self._head.rows(found), labels, self._head)

    def part(self, logits: Float32Array) -> list[str]:
        """Limits that do not hold on the first images; accuracy is left out."""
        limits = _without_accuracy(self.limits)
        metrics = self._compare(self._reference[: len(logits)], logits)
        return failures(metrics, limits) if limits else []

    def whole(self, logits: Float32Array, sums: Sums | None) -> tuple[FurtherMetrics, list[str]]:
        """Figures over all images, and the limits that do not hold.

        Args:
            sums: over more images, if there are more.
        """
        metrics = self._compare(self._reference, logits, self._labels)
        images, rows = len(logits), metrics.images
        if sums is not None:
            metrics = metrics_of(sums, self._head, misplaced=metrics.misplaced, nearest=metrics.nearest)
            images = sums.rows * images // rows
        counts = {}
        if metrics.images > images:
            counts = {"images": images, ("pixels" if logits.ndim == 4 else "tokens"): metrics.images}
        problems, eager = failures(metrics, self.limits), metrics
        if self._unfused:
            eager = self._compare(self._eager, logits, self._labels)
            problems += _astray(eager)
        figures = FurtherMetrics(
            metrics={**metrics.as_dict(), **counts}, eager_metrics={**eager.as_dict(), **counts}
        )
        return figures, problems

    def elsewhere(self, logits: Float32Array) -> list[str]:
        """Limits that do not hold at another size."""
        far = _astray(self._compare(self._eager, logits)) if self._unfused else []
        return [*self.part(logits), *far]


def _astray(eager: Metrics) -> list[str]:
    """Failure text if an engine is too far from eager; empty otherwise.

    An engine that is compared with its own unfused graph must also be close to eager; otherwise, that graph is wrong.
    """
    if eager.cosine >= MIN_UNFUSED_COSINE:
        return []
    return [f"cosine to eager is {eager.cosine:.3g}, must be >= {MIN_UNFUSED_COSINE}"]
