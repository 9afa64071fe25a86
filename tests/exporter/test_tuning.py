"""Which candidate a step takes, and how many images it asks."""

from __future__ import annotations

import numpy as np
import pytest

from export_zoo.engines.targets.base import Target
from export_zoo.engines.targets.registry import TARGETS
from export_zoo.exporter.stages.tuning.candidates import OFF, Candidate
from export_zoo.exporter.stages.tuning.tune import EFFORT, ON, WANTED, _Choosing, _tune

STEPS = {OFF: Candidate(), ON: Candidate(bias=True)}
FEW, ALL = 32, 128


class Images:
    """Squared errors of images, in place of engines that make them: `gain` dB less with the change, but for noise."""

    few, images = FEW, ALL
    level = 40.0
    """SQNR without the change, in dB."""

    def __init__(self, gain: float, noise: float, *, first: float | None = None) -> None:
        rng = np.random.default_rng(0)
        scattered = rng.normal(scale=noise, size=ALL)
        # The few first ones have just the mean gain that is asked for; so have all.
        for part in (slice(0, FEW), slice(FEW, ALL)):
            scattered[part] -= scattered[part].mean()
        levels = np.full(ALL, gain)
        if first is not None:
            levels[:FEW], levels[FEW:] = first, (ALL * gain - FEW * first) / (ALL - FEW)
        self._after = 10 ** (-(levels + scattered) / 10)
        self.asked = 0

    def noise(self, candidate: Candidate, target: str, count: int) -> np.ndarray:
        self.asked = max(self.asked, count)
        return (self._after if candidate.bias else np.ones(ALL))[:count]

    def sqnr(self, candidate: Candidate, target: str) -> float:
        noise = float(self.noise(candidate, target, FEW).mean())
        return self.level - 10 * float(np.log10(noise)) if np.isfinite(noise) else -200.0


def chosen(step, images: Images) -> str:
    choosing = _Choosing(images, "onnxruntime", Candidate())
    choosing.step(step, OFF, STEPS)
    assert choosing.candidate == STEPS[choosing.steps[0].chosen]
    return choosing.steps[0].chosen


@pytest.mark.parametrize("step", WANTED)
def test_a_clear_gain_is_taken_and_a_clear_loss_is_not_and_few_images_are_asked(step):
    for gain, expected in ((2.0, ON), (-2.0, OFF)):
        images = Images(gain, noise=0.3)
        assert chosen(step, images) == expected
        assert images.asked == FEW


def test_of_a_drowned_signal_no_method_is_chosen():
    """It would be the best one of the worst layers, which --aim may leave float."""
    images = Images(1.5, noise=0.1)
    images.level = 3.0
    assert (chosen("method", images), chosen("round", images)) == (OFF, ON)
    images.level = 5.0
    assert chosen("method", images) == ON


@pytest.mark.parametrize("step", ["equalize", "method", "bias", "round"])
def test_what_few_images_leave_open_more_decide(step):
    errors, _ = WANTED[step]
    images = Images(gain=0.3, noise=0.5, first=errors * 0.5 / FEW**0.5)  # at the limit, of the few
    assert chosen(step, images) == ON
    assert images.asked > FEW
    images = Images(gain=-0.3, noise=0.5, first=errors * 0.5 / FEW**0.5)
    assert chosen(step, images) == OFF
    assert images.asked > FEW


def test_a_gain_that_is_as_likely_luck_is_taken_by_steps_that_remove_errors_only():
    """A gain of 0.9 standard errors, on all images, corrects a bias. Other scales and ranges are not taken for it."""
    images = Images(gain=0.9 * 0.5 / ALL**0.5, noise=0.5)
    assert {step: chosen(step, images) for step in WANTED} == {
        "equalize": OFF,
        "relu6": OFF,
        "round": ON,
        "bias": ON,
        "method": OFF,
        "float": OFF,
    }
    assert images.asked == ALL


@pytest.mark.parametrize("step", WANTED)
@pytest.mark.parametrize("bad", [np.inf, np.nan, 1e17])
def test_a_candidate_with_a_logit_that_is_not_finite_or_huge_is_not_taken(step, bad):
    images = Images(2.0, noise=0.3)
    images._after[3] = bad
    assert chosen(step, images) == OFF


def test_a_candidate_that_changes_nothing_is_taken_by_no_step_that_wants_a_gain():
    images = Images(0.0, noise=0.0)
    taken = {step for step in WANTED if chosen(step, images) == ON}
    assert taken == {"round", "bias"}


def test_the_gain_its_error_and_the_number_of_images_are_recorded():
    choosing = _Choosing(Images(2.0, noise=0.3), "onnxruntime", Candidate())
    choosing.step("bias", OFF, STEPS)
    (step,) = choosing.steps
    assert (step.chosen, step.best, step.images) == (ON, ON, FEW)
    assert step.gain == pytest.approx(2.0, abs=0.1)
    assert step.standard_error == pytest.approx(0.3 / FEW**0.5, rel=0.5)


class Evaluation(Images):
    """Images, and an equalization through ReLU6 whose float graph alone has `floor` of the noise before rounding."""

    equalized = ("0.25",)

    def __init__(self, floor: float, level: float = 20.0) -> None:
        super().__init__(10.0, noise=0.3)  # of a bias correction
        self._floor, self._level = floor, level

    def sqnr(self, candidate: Candidate, target: Target) -> float:
        return self._level - 10 * float(np.log10(self.noise(candidate, target, FEW).mean()))

    def approximated(self, candidate: Candidate, target: Target) -> bool:
        return self._floor < float(self.noise(candidate, target, FEW).mean())


@pytest.mark.parametrize(
    ("floor", "effort", "wanted"),
    [
        (0.01, "default", ["bias", "relu6", "equalize"]),
        (0.5, "default", ["bias", "equalize"]),
        (2.0, "default", ["equalize", "bias"]),
        (0.01, "high", ["equalize", "bias", "relu6"]),
        (2.0, "high", ["equalize", "bias"]),
    ],
)
def test_equalization_through_relu6_is_tried_only_where_it_can_win_and_then_first(floor, effort, wanted):
    choosing = _tune(
        Evaluation(floor), TARGETS["onnxruntime"], ("equalize", "bias"), "minmax", EFFORT[effort]
    )
    assert [step.name for step in choosing.steps] == wanted


def test_where_errors_drown_the_signal_layers_are_equalized_first():
    for level, first in ((8.0, "bias"), (0.0, "equalize")):
        evaluation = Evaluation(0.01, level)
        steps = _tune(
            evaluation, TARGETS["onnxruntime"], ("equalize", "bias"), "minmax", EFFORT["default"]
        ).steps
        assert steps[0].name == first


class Methods(Images):
    """Methods whose SQNR is known, on all images alike."""

    equalized: tuple[str, ...] = ()
    first = ("stem", "depthwise")

    def __init__(self, sqnr: dict[str, float]) -> None:
        self._sqnr = sqnr
        self.asked_for: list[Candidate] = []

    def noise(self, candidate: Candidate, target: str, count: int) -> np.ndarray:
        self.asked_for.append(candidate)
        scattered = np.random.default_rng(0).normal(scale=0.01, size=ALL)
        level = self._sqnr[candidate.method] + 5 * ("depthwise" in candidate.kept)
        return 10 ** (-(level + scattered[:count]) / 10)

    def sqnr(self, candidate: Candidate, target: str) -> float:
        return -10 * float(np.log10(self.noise(candidate, target, FEW).mean()))

    def approximated(self, candidate: Candidate, target: Target) -> bool:
        return False

    def leaves_some(self, kept: tuple[str, ...], target: Target) -> bool:
        return "everything" not in kept


def test_a_method_far_behind_is_not_tried_again_after_other_steps():
    evaluation = Methods({"minmax": 20.0, "percentile": 19.5, "entropy": 16.9, "mse": 17.1})
    choosing = _tune(evaluation, TARGETS["onnxruntime"], ("float",), "auto", EFFORT["default"])
    assert [step.name for step in choosing.steps] == ["method", "float", "method"], "once between other steps"
    assert set(choosing.steps[0].sqnr) == {"minmax", "percentile", "entropy", "mse"}
    assert set(choosing.steps[2].sqnr) == {"minmax", "percentile", "mse"}
    assert choosing.candidate.kept == evaluation.first


def test_if_all_other_methods_are_far_behind_the_last_one_is_not_compared_with_nothing():
    evaluation = Methods({"minmax": 16.0, "percentile": 16.5, "entropy": 16.9, "mse": 20.0})
    choosing = _tune(evaluation, TARGETS["onnxruntime"], ("float",), "auto", EFFORT["default"])
    assert [step.name for step in choosing.steps] == ["method", "float"]
    assert choosing.candidate.method == "mse"


def test_layers_that_stay_float_anyway_are_no_choice_of_tuning():
    evaluation = Methods({"minmax": 20.0})
    always = ("stem", "depthwise", "more")
    choosing = _tune(evaluation, TARGETS["onnxruntime"], ("float",), "minmax", EFFORT["default"], always)
    assert choosing.steps == [], "the first layers are among them"
    assert choosing.candidate.kept == always
    some = ("stem", "more")
    choosing = _tune(evaluation, TARGETS["onnxruntime"], ("float",), "minmax", EFFORT["default"], some)
    (step,) = choosing.steps
    assert step.names == ["depthwise"]
    assert choosing.candidate.kept == (*some, "depthwise")


def test_layers_are_not_tried_in_float_if_none_were_left_to_quantize():
    evaluation = Methods({"minmax": 20.0})
    evaluation.first = ("stem", "everything")
    choosing = _tune(evaluation, TARGETS["onnxruntime"], ("float",), "minmax", EFFORT["default"])
    assert choosing.steps == []


def test_each_float_step_names_what_it_adds(monkeypatch):
    evaluation = Methods({"minmax": 20.0})
    monkeypatch.setattr(evaluation, "classifiers", lambda: [("dense",)], raising=False)
    choosing = _tune(evaluation, TARGETS["tensorrt"], ("float",), "minmax", EFFORT["default"])
    first, last = choosing.steps
    assert (first.names, last.names) == (["stem", "depthwise"], [])
    assert last.chosen == OFF
    assert choosing.candidate.kept == ("stem", "depthwise")
