"""The parity gate: its figures against brute force, what it must refuse, and the faults it must catch."""

from __future__ import annotations

import itertools
import math
from functools import reduce

import numpy as np
import pytest

from export_zoo.base.errors import ParityError
from export_zoo.calibration import synthetic
from export_zoo.calibration.preprocess import Preprocess, normalize
from export_zoo.engines.bundle.manifest import Batch
from export_zoo.engines.parity import intervals, limits
from export_zoo.engines.parity.checked_sizes import batches_to_check
from export_zoo.engines.parity.limits import Limit, failures, fitting
from export_zoo.engines.parity.metrics import check_reference, compare, metrics_of
from export_zoo.engines.parity.sums import Sums, sums_of
from export_zoo.engines.parity.tasks import TASKS, Head
from export_zoo.engines.precision.registry import PRECISIONS
from export_zoo.engines.verification.gate import Patterns, images_compared, judge, run_in_batches

PREPROCESS = Preprocess(
    resize_size=4,
    crop_height=4,
    crop_width=4,
    interpolation="bilinear",
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    source="a test",
)

TOLERANCES = {name: fitting(precision.tolerances, Head()) for name, precision in PRECISIONS.items()}
UNLABELLED = {p: {m: v for m, v in t.items() if "accuracy" not in m} for p, t in TOLERANCES.items()}


def _logits(images: int, classes: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(images, classes)) * 3 + rng.normal(size=classes)).astype(np.float32)


def _noisy(reference: np.ndarray, decibel: float, seed: int = 1) -> np.ndarray:
    """The reference plus white noise of that SQNR."""
    centred = reference - reference.mean(axis=0)
    noise = np.random.default_rng(seed).normal(size=reference.shape)
    noise *= np.sqrt((centred**2).sum() / (noise**2).sum()) * 10 ** (-decibel / 20)
    return (reference + noise).astype(np.float32)


# -- the figures, by formula, one number at a time -------------------------------------------------------------

CASES = [(2, 2, 3.0), (5, 3, -4.0), (17, 10, 12.0), (40, 600, 25.0), (33, 7, 60.0)]


@pytest.fixture(params=CASES, ids=lambda case: "x".join(map(str, case)))
def pair(request):
    """Reference and engine logits as lists of Python floats, and as arrays."""
    images, classes, decibel = request.param
    reference = _logits(images, classes, seed=images)
    return reference, _noisy(reference, decibel, seed=classes)


def _centred(reference: np.ndarray, other: np.ndarray) -> list[float]:
    """`other` minus the reference's mean over the images, per class; all numbers in one list."""
    rows, means = other.astype(float).tolist(), []
    for column in zip(*reference.astype(float).tolist(), strict=True):
        means.append(math.fsum(column) / len(column))
    return [value - mean for row in rows for value, mean in zip(row, means, strict=True)]


def _errors(reference: np.ndarray, engine: np.ndarray) -> list[float]:
    return [e - r for e, r in zip(engine.ravel().tolist(), reference.ravel().tolist(), strict=True)]


def test_max_abs_is_the_largest_difference(pair):
    assert compare(*pair).max_abs == pytest.approx(max(map(abs, _errors(*pair))), rel=1e-12)


def test_max_rel_is_max_abs_over_the_spread_of_the_reference(pair):
    centred = _centred(pair[0], pair[0])
    spread = math.sqrt(math.fsum(c * c for c in centred) / len(centred))
    assert compare(*pair).max_rel == pytest.approx(max(map(abs, _errors(*pair))) / spread, rel=1e-9)


def test_sqnr_is_centred_signal_over_error(pair):
    signal = math.fsum(c * c for c in _centred(pair[0], pair[0]))
    noise = math.fsum(error * error for error in _errors(*pair))
    assert compare(*pair).sqnr == pytest.approx(10 * math.log10(signal / noise), rel=1e-9, abs=1e-9)


def test_cosine_is_that_of_the_centred_logits(pair):
    first, second = _centred(pair[0], pair[0]), _centred(*pair)
    dot = math.fsum(a * b for a, b in zip(first, second, strict=True))
    norms = math.sqrt(math.fsum(a * a for a in first)) * math.sqrt(math.fsum(b * b for b in second))
    assert compare(*pair).cosine == pytest.approx(dot / norms, rel=1e-9)


def test_top1_is_the_share_of_equal_best_classes(pair):
    rows = list(zip(*(array.tolist() for array in pair), strict=True))
    same = sum(r.index(max(r)) == e.index(max(e)) for r, e in rows)
    assert compare(*pair).top1 == pytest.approx(same / len(rows))


def test_top5_is_the_mean_share_of_the_best_five_that_are_kept(pair):
    def best(row: list[float]) -> set[int]:
        return set(sorted(range(len(row)), key=lambda i: -row[i])[:5])

    rows = list(zip(*(array.tolist() for array in pair), strict=True))
    shares = [len(best(r) & best(e)) / len(best(r)) for r, e in rows]
    assert compare(*pair).top5 == pytest.approx(sum(shares) / len(shares))


def _misplaced(reference: np.ndarray, engine: np.ndarray) -> int:
    """Classes far nearer to another class's reference than to their own, whose error stands out."""
    r, e = reference.astype(np.float64), engine.astype(np.float64)
    errors = ((e - r) ** 2).sum(axis=0)
    count = 0
    for index, error in enumerate(errors):
        nearest = ((e[:, [index]] - r) ** 2).sum(axis=0).min()
        count += bool(error > 4 * nearest and error > 2 * errors.mean())
    return count


@pytest.mark.parametrize("rolled", [0, 2, 3])
def test_misplaced_counts_classes_nearer_to_another_by_far(pair, rolled):
    reference, engine = pair[0], pair[1].copy()
    engine[:, :rolled] = np.roll(engine[:, :rolled], 1, axis=1)
    assert compare(reference, engine).misplaced == _misplaced(reference, engine)


@pytest.mark.parametrize(("classes", "rolled"), [(10, 3), (513, 100), (600, 2), (3000, 1100)])
def test_misplaced_counts_every_class_of_a_permutation_among_many(classes, rolled):
    reference = _logits(64, classes)
    engine = _noisy(reference, 30.0)
    engine[:, -rolled:] = np.roll(engine[:, -rolled:], 1, axis=1)
    found = compare(reference, engine).misplaced
    assert found == _misplaced(reference, engine)
    assert 0.9 * rolled <= found <= rolled


def test_accuracies_are_counted_against_the_labels(pair):
    reference, engine = pair
    labels = [(3 * i) % reference.shape[1] for i in range(len(reference))]
    for index in range(0, len(labels), 2):
        labels[index] = reference[index].tolist().index(max(reference[index].tolist()))
    hits = [
        sum(row.index(max(row)) == label for row, label in zip(array.tolist(), labels, strict=True))
        for array in pair
    ]
    found = compare(reference, engine, labels)
    assert found.reference_accuracy == pytest.approx(hits[0] / len(labels))
    assert found.accuracy == pytest.approx(hits[1] / len(labels))
    assert found.accuracy_drop == pytest.approx((hits[0] - hits[1]) / len(labels))


def test_without_labels_no_accuracy_is_claimed(pair):
    found = compare(*pair)
    assert (found.accuracy, found.reference_accuracy, found.accuracy_drop) == (None, None, None)


def test_counts_are_those_of_the_reference(pair):
    assert (compare(*pair).images, compare(*pair).classes) == pair[0].shape


def test_equal_logits_score_the_cap_and_hold_every_default():
    reference = _logits(40, 100)
    found = compare(reference, reference.copy(), [0] * 40)
    assert (found.sqnr, found.max_abs, found.misplaced) == (200.0, 0.0, 0)
    assert found.cosine == pytest.approx(1.0)
    assert (found.top1, found.top5, found.accuracy_drop) == (1.0, 1.0, 0.0)
    for tolerances in UNLABELLED.values():
        assert failures(found, tolerances) == []


# -- what must not pass ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("constant", ["zero", "one number", "the mean", "the first image", "random"])
def test_constant_vector_scores_nothing(constant):
    reference = _logits(50, 30)
    vector = {
        "zero": np.zeros(30),
        "one number": np.full(30, 7.5),
        "the mean": reference.mean(axis=0, dtype=np.float64),
        "the first image": reference[0],
        "random": _logits(1, 30, seed=9)[0],
    }[constant]
    found = compare(reference, np.tile(vector, (50, 1)).astype(np.float32))
    assert found.sqnr <= 1e-9
    assert abs(found.cosine) < 1e-6
    assert all(failures(found, tolerances) for tolerances in UNLABELLED.values())


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["one logit", "all"])
@pytest.mark.parametrize("precision", sorted(TOLERANCES))
def test_logits_that_are_not_finite_fail_every_default_tolerance(precision, where, poison):
    reference = _logits(40, 10)
    engine = reference.copy()
    engine[np.s_[:] if where == "all" else (3, 4)] = poison
    measured = {m: v for m, v in TOLERANCES[precision].items() if m != "accuracy_drop"}
    for metric, value in measured.items():
        assert failures(compare(reference, engine), {metric: value}), metric


@pytest.mark.parametrize(
    ("metric", "value"), [("max_abs", 1e30), ("max_rel", 1e30), ("cosine", 0.1), ("top5", 0.1)]
)
def test_logits_that_are_not_finite_fail_the_other_metrics_too(metric, value):
    reference = _logits(40, 10)
    assert failures(compare(reference, np.full_like(reference, np.nan)), {metric: value})


@pytest.mark.parametrize(("metric", "value"), [("accuracy", 0.01), ("accuracy_drop", 0.5)])
def test_logits_that_are_not_finite_fail_accuracy_where_labels_are_known(metric, value):
    reference = _logits(40, 10)
    metrics = compare(reference, np.full_like(reference, np.nan), reference.argmax(axis=1).tolist())
    assert failures(metrics, {metric: value})


def test_two_swapped_classes_of_a_thousand_are_caught_by_misplaced_alone():
    reference = _logits(256, 1000)
    engine = _noisy(reference, 40.0)
    straight = compare(reference, engine)
    engine[:, [17, 803]] = engine[:, [803, 17]]
    swapped = compare(reference, engine)
    assert straight.misplaced == 0
    assert swapped.misplaced == 2
    assert swapped.sqnr > 20
    assert swapped.top1 >= straight.top1 - 0.02
    (failure,) = failures(swapped, UNLABELLED["int8"])
    assert failure.startswith("misplaced is 2,")


def test_two_swapped_classes_that_are_much_alike_are_caught_in_spite_of_noise():
    reference = _logits(256, 1000)
    reference[:, 803] = reference[:, 17] + 0.3 * reference[:, 803]
    engine = _noisy(reference, 20.0)
    engine[:, [17, 803]] = engine[:, [803, 17]]
    assert compare(reference, engine).misplaced == 2


@pytest.mark.parametrize("precision", sorted(TOLERANCES))
def test_no_permutation_of_classes_holds_the_defaults_however_many_are_permuted(precision):
    for classes in (2, 3, 4, 5, 8, 20, 100):
        reference = _logits(64, classes, seed=classes)
        for rolled in range(2, classes + 1):
            engine = _noisy(reference, 60.0)
            engine[:, :rolled] = np.roll(engine[:, :rolled], 1, axis=1)
            assert failures(compare(reference, engine), UNLABELLED[precision]), (classes, rolled)


@pytest.mark.parametrize("decibel", [10.0, 20.0, 60.0])
@pytest.mark.parametrize("classes", [10, 1000])
def test_noise_does_not_look_like_misplaced_classes(classes, decibel):
    for seed in range(5):
        reference = _logits(32, classes, seed)
        assert compare(reference, _noisy(reference, decibel, seed)).misplaced == 0


def test_noise_does_not_look_like_misplaced_classes_that_are_much_alike():
    rng = np.random.default_rng(0)
    alike = rng.normal(size=(64, 10)).repeat(50, axis=1) * 3  # 50 nearly equal columns for each of ten
    reference = (alike + 0.01 * rng.normal(size=alike.shape)).astype(np.float32)
    assert compare(reference, _noisy(reference, 20.0)).misplaced == 0


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        (np.zeros((8, 10)), "hardly vary"),
        (np.tile(np.arange(10.0), (8, 1)), "hardly vary"),
        (1000 + 0.01 * np.random.default_rng(0).normal(size=(8, 10)), "hardly vary"),
        (1e-9 * np.random.default_rng(0).normal(size=(8, 10)), "hardly vary"),
        (np.where(np.eye(8, 10) > 0, np.nan, 1.0), "not finite"),
        (np.where(np.eye(8, 10) > 0, np.inf, 1.0), "not finite"),
        (np.arange(10.0)[None], "shape"),
        (np.zeros((0, 10)), "shape"),
        (np.arange(8.0), "shape"),
    ],
    ids=["zero", "constant", "far", "tiny", "nan", "inf", "one image", "no image", "vector"],
)
def test_reference_that_compares_nothing_is_refused(reference, says):
    reference = reference.astype(np.float32)
    with pytest.raises(ParityError, match=says):
        check_reference(reference)
    with pytest.raises(ParityError, match=says):
        compare(reference, reference)


def test_reference_that_varies_a_little_is_accepted():
    check_reference((10 + 0.1 * np.random.default_rng(0).normal(size=(8, 10))).astype(np.float32))


@pytest.mark.parametrize("shape", [(40, 9), (39, 10), (40, 10, 1), (10, 40)])
def test_logits_of_another_shape_are_refused(shape):
    with pytest.raises(ParityError, match="nothing to compare"):
        compare(_logits(40, 10), np.ones(shape, dtype=np.float32))


@pytest.mark.parametrize("task", [*TASKS])
@pytest.mark.parametrize("sizes", [(40,), (7, 32, 1), (1,) * 40])
def test_sums_of_parts_give_the_metrics_of_the_whole(task, sizes):
    """Logits far from 0, where squares of sums would cancel."""
    head = Head(task, classes=10)
    reference = 1000 + _logits(40, 10)
    engine = _noisy(reference, 20.0)
    labels = reference.argmax(axis=1).tolist() if head.labelled else None
    whole = compare(reference, engine, labels, head)
    ends = np.cumsum(sizes)
    parts = [
        sums_of(
            reference[end - size : end],
            engine[end - size : end],
            head,
            None if labels is None else labels[end - size : end],
            float(np.abs(reference).max()),
        )
        for end, size in zip(ends, sizes, strict=True)
    ]
    sums = reduce(Sums.merged, parts)
    found = metrics_of(sums, head, misplaced=whole.misplaced, nearest=whole.nearest)
    for name, value in whole.as_dict().items():
        assert getattr(found, name) == (value if value is None else pytest.approx(value, rel=1e-9)), name
    assert metrics_of(Sums.of_arrays(sums.arrays()), head).sqnr == found.sqnr
    bad = np.full((3, 10), np.nan, dtype=np.float32)
    worst = sums.merged(sums_of(reference[:3], bad, head, labels[:3] if labels is not None else None))
    assert metrics_of(worst, head).sqnr == -200


# -- limits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tolerances", [{}, {"accuracy": 0.9}, {"accuracy_drop": 0.02, "accuracy": 0.9}])
def test_nothing_to_judge_by_raises(tolerances):
    metrics = compare(_logits(40, 10), _logits(40, 10))
    with pytest.raises(ParityError, match="nothing to judge by"):
        failures(metrics, tolerances)


def test_a_limit_that_cannot_be_measured_is_never_skipped():
    metrics = compare(_logits(40, 10), _logits(40, 10))
    with pytest.raises(ParityError, match="accuracy_drop"):
        failures(metrics, {"accuracy_drop": 0.0, "sqnr": 20})


def _head_with(metric: str) -> Head:
    """The first task that has a metric."""
    heads = (Head(task, classes=10) for task in TASKS)
    return next(head for head in heads if metric in limits.COMMON | head.figures)


@pytest.mark.parametrize("metric", sorted(limits.METRICS))
def test_a_limit_holds_at_its_value_and_not_beyond(metric):
    reference = _logits(40, 10)
    labels = reference.argmax(axis=1)
    labels[:3] = (labels[:3] + 1) % 10
    head = _head_with(metric)
    labelled = labels.tolist() if head.labelled else None
    metrics = compare(reference, _noisy(reference, 3.0), labelled, head)
    value = getattr(metrics, metric)
    worse = np.nextafter(value, np.inf if metric in limits.AT_LEAST else -np.inf)
    assert Limit(metric, value).holds(metrics) is True
    assert Limit(metric, worse).holds(metrics) is False
    (failure,) = failures(metrics, {metric: worse})
    assert failure.startswith(f"{metric} is ")


@pytest.mark.parametrize("metric", sorted(limits.METRICS))
def test_a_limit_that_is_not_a_number_never_holds(metric):
    head = _head_with(metric)
    metrics = compare(_logits(40, 10), _logits(40, 10), [0] * 40 if head.labelled else None, head)
    assert Limit(metric, math.nan).holds(metrics) is False


@pytest.mark.parametrize(("graph", "limit"), [(-200.0, 6.0), (3.0, 6.0), (12.5, 12.5), (90.0, 20.0)])
def test_random_weights_are_gated_by_their_graphs_own_distance_within_bounds(graph, limit):
    assert limits.unfused_tolerances(graph) == {"sqnr": limit}


# -- batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [
        ((1, 1, 1), [1]),
        ((4, 4, 4), [4]),
        ((5, 5, 5), [5]),
        ((1, 8, 32), [1, 8, 17, 32]),
        ((1, 2, 2), [1, 2]),
        ((2, 2, 3), [2, 3]),
        ((2, 3, 4), [2, 3, 4]),
        ((4, 4, 6), [4, 5, 6]),
        ((1, 1, 3), [1, 3]),
        ((1, 16, 16), [1, 9, 16]),
        ((8, 17, 32), [8, 17, 32, 19]),
    ],
)
def test_batches_to_check_by_example(batch, sizes):
    assert batches_to_check(*batch) == sorted(sizes)


def test_batches_to_check_are_min_opt_max_and_one_more_odd_size_where_there_is_one():
    for low, best, high in itertools.combinations_with_replacement(range(1, 14), 3):
        sizes = batches_to_check(low, best, high)
        extra = set(sizes) - {low, best, high}
        odd = {n for n in range(low, high + 1) if n % 2} - {low, best, high}
        assert sizes == sorted({low, best, high} | extra)
        assert len(extra) == min(1, len(odd)), (low, best, high)
        assert extra <= odd


# -- the gate --------------------------------------------------------------------------------------------------


class _Linear:
    """A network of one matrix. Remembers the batches it was given."""

    def __init__(self, wrong_at: int | None = None, noise: float = 0.0) -> None:
        self.matrix = np.random.default_rng(0).normal(size=(48, 10)).astype(np.float32)
        self.wrong_at = wrong_at
        self.noise = noise
        self.batches: list[np.ndarray] = []

    def run(self, batch: np.ndarray) -> np.ndarray:
        self.batches.append(batch)
        flat = batch.reshape(len(batch), -1)
        logits = np.stack([row @ self.matrix for row in flat])  # row by row: equal bits at every batch size
        if self.noise:
            logits = logits + self.noise * np.sin(1000 * logits)
        return np.roll(logits, 1, axis=0) if len(batch) == self.wrong_at else logits

    def run_all(self, batch: np.ndarray) -> tuple[np.ndarray, ...]:
        return (self.run(batch),)


class _Swapped(_Linear):
    def run(self, batch: np.ndarray) -> np.ndarray:
        return super().run(batch)[:, [1, 0, *range(2, 10)]]


def _pixels(count: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, size=(count, 4, 4, 3), dtype=np.uint8)


def _judged(engine, count: int = 70, batch: tuple[int, int, int] = (1, 8, 32), **changes):
    pixels = _pixels(count)
    low, best, high = batch
    given = {
        "pixels": pixels,
        "eager": {"logits": _Linear().run(normalize(pixels, PREPROCESS))},
        "heads": {"logits": Head(classes=10)},
        "labels": None,
        "preprocess": PREPROCESS,
        "batch": Batch(min=low, opt=best, max=high),
        "tolerances": TOLERANCES["fp32"],
        **changes,
    }
    return judge(engine, **given)


class _Even(_Linear):
    """As `_Linear`, but wrong on even images."""

    def __init__(self, wrong: float) -> None:
        super().__init__()
        self.value = wrong

    def run(self, batch: np.ndarray) -> np.ndarray:
        even = np.ptp(batch, axis=(2, 3)).max(axis=1) == 0
        return np.where(even[:, None], np.float32(self.value), super().run(batch)).astype(np.float32)


@pytest.mark.parametrize(
    ("wrong", "limit", "failures"),
    [
        (np.nan, 60.0, "not finite, but eager's is"),
        (np.nan, None, "not finite, but eager's is"),
        (np.inf, None, "not finite, but eager's is"),
        (5.0, 60.0, "must be >= 60"),
        (5.0, None, ""),
    ],
)
def test_test_patterns_are_compared_too(wrong, limit, failures):
    pixels = synthetic.test_patterns(PREPROCESS.at_size(4, 4))
    eager = {"logits": _Linear().run(normalize(pixels, PREPROCESS))}
    patterns = Patterns(synthetic.TEST_PATTERNS, pixels, eager, limit)
    right = _judged(_Linear(), patterns=patterns)
    assert right.failures == []
    assert right.patterns == dict.fromkeys(synthetic.TEST_PATTERNS, 200.0)
    gate = _judged(_Even(wrong), patterns=patterns)
    assert [text.partition(": ")[0] for text in gate.failures] == [
        f"test pattern {name!r}" for name in ("black", "white", "gray") if failures
    ]
    assert all(failures in text for text in gate.failures)
    assert gate.patterns["noise"] == 200.0
    assert gate.patterns["black"] < 60
    # Where eager's own logits are not finite, nothing is asked.
    eager["logits"][:3] = np.nan
    assert _judged(_Even(wrong), patterns=patterns).failures == []
    assert set(_judged(_Even(wrong), patterns=patterns).patterns) == {"noise", "half", "checkerboard"}


@pytest.mark.parametrize(("count", "batch"), [(7, 3), (6, 3), (1, 1), (2, 5), (3, 8), (5, 1), (33, 32)])
def test_only_full_batches_are_run_and_each_image_comes_back_once_in_order(count, batch):
    engine, pixels, done = _Linear(), _pixels(count), []
    (logits,) = run_in_batches(engine, pixels, PREPROCESS, batch, done.append)
    assert {run.shape for run in engine.batches} == {(batch, 3, 4, 4)}
    assert len(engine.batches) == math.ceil(count / batch)
    np.testing.assert_array_equal(logits, _Linear().run(normalize(pixels, PREPROCESS)))
    assert sum(done) == count


def test_right_engine_passes_and_its_figures_are_those_of_all_images():
    gate = _judged(_Linear())
    assert gate.failures == []
    assert gate.reference == "eager"
    assert gate.batches == [1, 8, 17, 32]
    assert gate.metrics["images"] == 70
    assert gate.metrics == gate.eager_metrics


@pytest.mark.parametrize("size", [1, 8, 17, 32])
def test_engine_that_is_wrong_at_one_batch_size_fails_and_the_size_is_named(size):
    class Wrong(_Linear):
        def run(self, batch):
            logits = super().run(batch)
            return logits[:, ::-1] if len(batch) == size else logits

    gate = _judged(Wrong())
    assert gate.failures
    assert all(text.startswith(f"batch {size}: ") for text in gate.failures)


@pytest.mark.parametrize("size", [8, 17, 32])
def test_engine_that_mixes_up_the_images_of_a_batch_fails(size):
    assert all(text.startswith(f"batch {size}: ") for text in _judged(_Linear(wrong_at=size)).failures)
    assert _judged(_Linear(wrong_at=size)).failures


def test_engine_that_is_wrong_on_the_last_image_only_fails():
    class Wrong(_Linear):
        def run(self, batch):
            logits = super().run(batch)
            logits[(batch == last).all(axis=(1, 2, 3))] += 100.0
            return logits

    last = normalize(_pixels(70)[-1:], PREPROCESS)
    assert any(text.startswith("batch 8: sqnr") for text in _judged(Wrong()).failures)


def test_engine_that_gives_other_classes_or_images_is_refused():
    class Cut(_Linear):
        def run(self, batch):
            return super().run(batch)[:, :9]

    with pytest.raises(ParityError, match="nothing to compare"):
        _judged(Cut())


def test_nan_at_one_batch_size_fails():
    class Poisoned(_Linear):
        def run(self, batch):
            return super().run(batch) * (np.float32(np.nan) if len(batch) == 17 else np.float32(1))

    assert {text.split(":")[0] for text in _judged(Poisoned()).failures} == {"batch 17"}


def test_no_images_is_nothing_to_compare():
    with pytest.raises(ParityError, match="0 inputs"):
        _judged(_Linear(), pixels=_pixels(0), eager={"logits": np.zeros((0, 10), dtype=np.float32)})


@pytest.mark.parametrize("count", [1, 69, 71])
def test_reference_of_other_images_is_refused(count):
    with pytest.raises(ParityError, match="nothing to compare"):
        _judged(_Linear(), eager={"logits": _logits(count, 10)})


def test_constant_reference_is_refused():
    with pytest.raises(ParityError, match="hardly vary"):
        _judged(_Linear(), eager={"logits": np.ones((70, 10), dtype=np.float32)})


def test_gate_without_a_tolerance_raises():
    with pytest.raises(ParityError, match="nothing to judge by"):
        _judged(_Linear(noise=50.0), tolerances={})


def test_gate_with_only_an_accuracy_limit_and_no_labels_raises():
    with pytest.raises(ParityError, match="nothing to judge by"):
        _judged(_Linear(), tolerances={"accuracy": 0.5})


def test_accuracy_is_judged_on_all_images_at_batch_opt():
    pixels = _pixels(70)
    labels = _Linear().run(normalize(pixels, PREPROCESS)).argmax(axis=1).tolist()
    assert _judged(_Linear(), tolerances={"accuracy": 1.0}, labels=labels).failures == []
    gate = _judged(_Linear(noise=20.0), tolerances={"accuracy": 1.0}, labels=labels)
    (failure,) = gate.failures
    assert failure.startswith("batch 8: accuracy is ")
    assert gate.metrics["reference_accuracy"] == 1.0


@pytest.mark.parametrize("batch", [(1, 8, 32), (4, 4, 4), (2, 3, 4), (1, 1, 64), (1, 64, 100)])
@pytest.mark.parametrize("count", [2, 20, 32, 70])
def test_images_compared_is_what_progress_adds_up_to(count, batch):
    done = []
    gate = _judged(_Linear(), count=count, batch=batch, progress=done.append)
    assert gate.failures == []
    assert sum(done) == images_compared(count, Batch(min=batch[0], opt=batch[1], max=batch[2]))


def test_with_an_unfused_reference_the_engine_is_judged_by_it_and_eager_is_reported():
    pixels = _pixels(70)
    graph = _Linear(noise=2.0)  # what quantization does to random weights
    logits = graph.run(normalize(pixels, PREPROCESS))
    gate = _judged(_Linear(noise=2.0), tolerances={}, unfused=lambda _: (logits,))
    assert gate.reference == "unfused precision graph"
    assert gate.failures == []
    assert gate.metrics["sqnr"] == 200.0
    assert gate.eager_metrics["sqnr"] < 20
    assert gate.tolerances == {"sqnr": pytest.approx(max(6.0, gate.eager_metrics["sqnr"]))}


@pytest.mark.parametrize(
    "engine", [_Linear(wrong_at=17, noise=2.0), _Swapped(noise=2.0)], ids=["batch", "classes"]
)
def test_with_an_unfused_reference_faults_are_caught_all_the_same(engine):
    logits = _Linear(noise=2.0).run(normalize(_pixels(70), PREPROCESS))
    assert _judged(engine, tolerances={}, unfused=lambda _: (logits,)).failures


def test_a_wrong_precision_graph_is_caught_although_the_engine_equals_it():
    wrong = _Swapped(noise=50.0)
    (logits,) = run_in_batches(wrong, _pixels(70), PREPROCESS, 8)
    gate = _judged(wrong, tolerances={}, unfused=lambda _: (logits,))
    assert gate.metrics["sqnr"] == 200.0
    assert any("cosine to eager" in text for text in gate.failures)


def test_a_tolerance_of_the_users_own_overrides_that_of_the_unfused_reference():
    logits = _Linear().run(normalize(_pixels(70), PREPROCESS))
    gate = _judged(_Linear(noise=2.0), tolerances={"sqnr": 150.0}, unfused=lambda _: (logits,))
    assert gate.tolerances["sqnr"] == 150.0
    assert any("must be sqnr >= 150" in text for text in gate.failures)


# -- how sure shares are ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "images", "low", "high"),
    [(1.0, 128, 0.9709, 1.0), (0.5, 100, 0.4038, 0.5962), (0.0, 10, 0.0, 0.2775), (0.9, 50, 0.7864, 0.9565)],
)
def test_intervals_of_shares_are_wilsons(share, images, low, high):
    """Values of statsmodels' proportion_confint(method="wilson")."""
    assert intervals.interval(share, images) == pytest.approx((low, high), abs=1e-4)


def test_a_limit_within_the_interval_is_not_settled():
    (text,) = intervals.unsettled({"images": 125, "top1": 0.92, "sqnr": 20.0}, {"top1": 0.9, "sqnr": 10})
    assert text.startswith(
        "top1 is 0.92 on 125 images, which may be 0.859 to 0.956 on others: the limit 0.9 lies"
    )
    needed = int(text.split("about ")[1].split()[0])
    low, high = intervals.interval(0.92, needed)
    assert not low <= 0.9 <= high
    assert 500 < needed < 900


def test_shares_of_pixels_and_clear_cases_say_nothing():
    assert intervals.unsettled({"images": 125, "top1": 1.0}, {"top1": 0.9}) == []
    assert intervals.unsettled({"images": 4, "pixels": 900, "top1": 0.91}, {"top1": 0.9}) == []
    assert intervals.described({"images": 4, "pixels": 900, "top1": 0.91}) == ""
    assert intervals.described({"images": 125, "top1": 0.992}) == " (95.6 to 99.9)"
    right = {"images": 125, "accuracy": 0.84, "accuracy_drop": 0.008}
    assert intervals.accuracy(right) == "84.0 % (76.6 to 89.4), -0.8 to eager"
    assert intervals.accuracy({"images": 125, "accuracy": None}) == ""
