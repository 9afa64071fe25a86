"""Histograms are exact and merge to the bit; each method's range is that of brute force on the raw samples."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from export_zoo.calibration import histogram
from export_zoo.calibration.histogram import Accumulator, Histogram, extremes
from export_zoo.calibration.methods import METHODS
from export_zoo.exporter import options

settings.register_profile("no deadline", deadline=None)  # the first call compiles
settings.load_profile("no deadline")

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
ROWS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=FINITE)


def histogram_of(*parts: np.ndarray, workers: int = 1, sampled: bool = False) -> Histogram:
    accumulator = Accumulator(workers)
    for index, part in enumerate(parts):
        accumulator.add(part.reshape(len(part), -1), worker=index % workers, sampled=sampled)
    return accumulator.histogram(min(p.min() for p in parts), max(p.max() for p in parts))


def same(first: Histogram, second: Histogram) -> bool:
    return np.array_equal(first.keys, second.keys) and np.array_equal(first.counts, second.counts)


@given(ROWS)
def test_extremes_are_those_of_numpy(rows):
    low, high = extremes(rows)
    assert np.array_equal(low, rows.min(axis=1))
    assert np.array_equal(high, rows.max(axis=1))


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rest", [-2.0, 0.0, 3.0])
def test_extremes_of_a_row_that_is_not_finite_are_nan(value, rest):
    rows = np.full((3, 70), rest, dtype=np.float32)
    rows[1, 33] = value
    for found in extremes(rows):
        assert np.isnan(found).tolist() == [False, True, False]


@given(ROWS)
def test_every_value_is_counted_in_the_bin_of_its_leading_bits(rows):
    found = histogram_of(rows)
    keys = rows.reshape(-1).view(np.uint32) >> histogram.SHIFT
    expected = np.bincount(np.where(rows.reshape(-1) == 0, 0, keys), minlength=histogram.BINS)
    # Values below float32's normal numbers may share bin 0 with zero, of either sign.
    expected[0] += expected[histogram.BINS >> 1]
    expected[histogram.BINS >> 1] = 0
    assert np.array_equal(found.keys, np.flatnonzero(expected))
    assert np.array_equal(found.counts, expected[expected > 0])


@given(ROWS, st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_any_order_batches_shards_and_workers_give_the_same_bits(rows, seed, workers):
    rng = np.random.default_rng(seed)
    whole = histogram_of(rows)
    shuffled = rows[rng.permutation(len(rows))]
    cuts = np.sort(rng.integers(0, len(rows) + 1, 3))
    parts = [part for part in np.split(shuffled, cuts) if len(part)]
    assert same(histogram_of(*parts, workers=workers), whole)
    assert same(reduce(Histogram.merged, (histogram_of(part) for part in parts)), whole)


@given(ROWS)
def test_encoding_gives_back_the_same(rows):
    found = histogram_of(rows)
    assert same(Histogram.decode(found.encode()), found)


@pytest.mark.parametrize("text", ["", "!", "AAAA", "eJwDAAAAAAE=", "eJxjYGBgAAAABAAB"])
def test_damaged_text_is_refused(text):
    with pytest.raises(ValueError, match=r"histogram|base64|padding|characters"):
        Histogram.decode(text)


def test_values_come_back_within_a_thousandth_and_in_order():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(size=500), rng.normal(size=500) * 1e-6, [0.0, 0.0]]).astype(
        np.float32
    )
    found, counts = histogram_of(values[None]).values()
    assert (np.diff(found) > 0).all()
    assert np.allclose(np.repeat(found, counts.astype(int)), np.sort(values), rtol=2**-10, atol=0)


def test_a_large_image_is_sampled_in_every_row_and_column():
    size = 3 * 224 * 224
    marks = np.arange(size, dtype=np.float32).reshape(1, -1)  # every value tells its place
    values, counts = histogram_of(marks, sampled=True).values()
    assert histogram.SAMPLES / 2 < counts.sum() <= histogram.SAMPLES
    stride = histogram._stride(size)
    places = np.arange(0, size, stride)
    assert counts.sum() == len(places)
    assert len(np.unique(places % 224)) == len(np.unique(places // 224 % 224)) == 224
    assert values.max() > 0.99 * size


def test_what_one_image_gives_does_not_depend_on_its_neighbours_in_the_batch():
    images = np.random.default_rng(0).normal(size=(5, 90_001)).astype(np.float32)
    alone = reduce(Histogram.merged, (histogram_of(image[None], sampled=True) for image in images))
    assert same(histogram_of(images, sampled=True), alone)


# -- methods, against brute force on the samples themselves -------------------------------------------------


def samples(kind: str) -> np.ndarray:
    rng = np.random.default_rng(1)
    values = {
        "normal": rng.normal(size=40_000),
        "laplace": rng.laplace(size=40_000),
        "relu": np.maximum(rng.normal(size=40_000), 0),
        "shifted": rng.normal(size=40_000) * 0.7 + 1.5,
        "outlier": np.append(rng.normal(size=40_000), 60.0),
        "negative": -rng.gamma(2.0, size=40_000),
    }[kind]
    return values.astype(np.float32)


KINDS = ["normal", "laplace", "relu", "shifted", "outlier", "negative"]


def quantization_error(values: np.ndarray, low: float, high: float, symmetric: bool) -> float:
    """Mean squared error by the kernels' arithmetic: uint8 with a zero point, or int8."""
    from export_zoo.engines.precision.int8.scales import activation_scale

    if symmetric:
        scale, zero, least, most = high / 127, 0, -127, 127
    else:
        found = activation_scale(low, high)
        scale, zero, least, most = float(found.scale), int(found.zero_point), 0, 255
    integers = np.clip(np.rint(values.astype(np.float64) / scale) + zero, least, most)
    return float(np.mean((values - (integers - zero) * scale) ** 2))


def ranges(name: str, values: np.ndarray, symmetric: bool) -> tuple[float, float]:
    found = histogram_of(values[None])
    return METHODS[name](found, float(values.min()), float(values.max()), symmetric)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_ranges_lie_within_minmax_and_hold_zero(name, kind, symmetric):
    values = samples(kind)
    low, high = ranges(name, values, symmetric)
    widest = METHODS["minmax"](
        histogram_of(values[None]), float(values.min()), float(values.max()), symmetric
    )
    assert widest[0] <= low <= 0 <= high <= widest[1]
    assert high > low
    assert not symmetric or low == -high


@pytest.mark.parametrize("kind", KINDS)
def test_percentile_is_that_of_the_samples(kind):
    values = samples(kind)
    top = np.quantile(np.abs(values), 0.9999, method="inverted_cdf")
    assert ranges("percentile", values, True)[1] == pytest.approx(top, rel=2**-10)
    # 2 of the 40,000 are cut off at each end: the third, or by a rounding error the second or fourth, is the end.
    low, high = ranges("percentile", values, False)
    ordered = np.sort(values)
    assert min(0, ordered[1]) * (1 + 2**-10) <= low <= min(0, ordered[3]) * (1 - 2**-10)
    assert max(0, ordered[-4]) * (1 - 2**-10) <= high <= max(0, ordered[-2]) * (1 + 2**-10)


@pytest.mark.parametrize("kind", KINDS)
def test_mse_is_the_best_of_all_ranges_tried_on_the_samples(kind):
    values = samples(kind)
    low, high = ranges("mse", values, True)
    ends = float(np.abs(values).max()) * np.arange(1, 201) / 200
    best = min(quantization_error(values, -end, end, True) for end in ends)
    assert quantization_error(values, low, high, True) <= 1.01 * best

    low, high = ranges("mse", values, False)
    lows = min(0, float(values.min())) * np.arange(0, 21) / 20
    highs = max(0, float(values.max())) * np.arange(0, 41) / 40
    pairs = [(a, b) for a in lows for b in highs if b - a > 0]
    best = min(quantization_error(values, a, b, False) for a, b in pairs)
    assert quantization_error(values, low, high, False) <= 1.02 * best


def divergence(values: np.ndarray, end: float, top: float, levels: int) -> float:
    """NVIDIA's talk, step by step, on raw magnitudes: 2,048 bins up to `top`, kept up to `end`."""
    magnitudes = np.abs(values[values != 0].astype(np.float64))
    bins = np.histogram(magnitudes, bins=2048, range=(0, top))[0].astype(np.float64)
    kept = round(end / top * 2048)
    reference = bins[:kept].copy()
    reference[-1] += bins[kept:].sum()
    quantized = np.zeros(kept)
    for level in range(levels):
        begin, stop = level * kept // levels, (level + 1) * kept // levels
        part = bins[begin:stop]
        occupied = part > 0
        if stop == kept and reference[-1] > 0:
            occupied[-1] = True
        if occupied.any():
            quantized[begin:stop][occupied] = part.sum() / occupied.sum()
    p, q = reference / reference.sum(), quantized / quantized.sum()
    used = p > 0
    if (q[used] == 0).any():
        return np.inf
    return float(np.sum(p[used] * np.log(p[used] / q[used])))


@pytest.mark.parametrize("kind", ["normal", "laplace", "relu", "outlier"])
def test_entropy_is_the_least_divergence_of_the_talks_search_on_the_samples(kind):
    values = samples(kind)
    levels, top = 128, float(np.abs(values).max())
    found = ranges("entropy", values, True)[1]
    ends = top * np.arange(levels, 2049, 8) / 2048
    best = min(divergence(values, end, top, levels) for end in ends)
    least = top * levels / 2048
    if found < least:  # the talk's search ends there
        top = least
    assert divergence(values, found, top, levels) <= 1.05 * best + 5e-4


@pytest.mark.parametrize("name", ["percentile", "entropy"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_methods_do_cut_an_outlier_off(name, symmetric):
    assert ranges(name, samples("outlier"), symmetric)[1] < 30


@settings(max_examples=60)
@given(ROWS)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_any_values_give_a_range(name, symmetric, rows):
    low, high = METHODS[name](histogram_of(rows), float(rows.min()), float(rows.max()), symmetric)
    assert np.isfinite([low, high]).all()
    assert low <= 0 <= high


def test_the_command_line_offers_these_methods():
    assert set(METHODS) <= set(options.METHODS)
