"""How much better a candidate is, and how sure that is."""

from __future__ import annotations

import numpy as np
import pytest

from export_zoo.exporter.stages.tuning.gain import gain


def test_a_gain_is_of_all_images_together_and_in_decibels():
    before = np.array([1.0, 2.0, 7.0])
    assert gain(before, before / 10).decibels == pytest.approx(10)
    assert gain(before, np.array([7.0, 1.0, 12.0])).decibels == pytest.approx(10 * np.log10(10 / 20))


def test_what_all_images_gain_alike_is_certain_however_unlike_they_are():
    before = np.array([1e-3, 1.0, 100.0])
    assert gain(before, before / 2).error == pytest.approx(0, abs=1e-9)


def test_the_standard_error_is_how_far_gains_of_other_images_are_apart():
    """Against many draws: the jackknife's is nearly unbiased for sums of many images."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        noise = rng.gamma(2.0, size=64)
        found.append(gain(noise, noise * rng.lognormal(-0.1, 0.5, size=64)))
    spread = np.std([one.decibels for one in found])
    assert np.mean([one.error for one in found]) == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize("after", [np.inf, np.nan])
def test_logits_that_are_not_finite_are_worse_than_all_others(after):
    before = np.ones(8)
    found = gain(before, np.full(8, after))
    assert found.decibels < -100
    assert np.isfinite(found.error)
    assert gain(np.full(8, after), before).decibels > 100


def test_one_image_that_outweighs_all_others_does_not_hide_them():
    """Leaving it out leaves the others' gain, 0 dB; so its gain L has the error L (N - 1) / N."""
    found = gain(np.ones(8), np.array([1.0] * 7 + [1e25]))
    assert found.error == pytest.approx(-found.decibels * 7 / 8, rel=0.01)


def test_candidates_without_noise_are_equal():
    assert gain(np.zeros(8), np.zeros(8)) == (0.0, 0.0)
    assert gain(np.ones(8), np.zeros(8)).decibels > 100
