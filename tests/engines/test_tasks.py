"""Tasks: what outputs are taken for, and the metrics of each."""

from __future__ import annotations

import numpy as np
import pytest

from export_zoo.engines.parity.limits import failures, fitting
from export_zoo.engines.parity.metrics import compare
from export_zoo.engines.parity.outputs import as_rows, sampled, sampled_shape
from export_zoo.engines.parity.tasks import Head, guess, headline
from export_zoo.engines.precision.registry import PRECISIONS


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return (1 / (1 + np.exp(-x.astype(np.float64)))).astype(np.float32)


SOFTMAX = np.exp(normal(3, 5)) / np.exp(normal(3, 5)).sum(axis=1, keepdims=True)
UNIT = normal(3, 5) / np.linalg.norm(normal(3, 5), axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("values", "operator", "task", "scores"),
    [
        (normal(3), "aten.addmm.default", "binary", "logits"),
        (normal(3, 1), "aten.addmm.default", "binary", "logits"),
        (sigmoid(normal(3, 1)), "aten.sigmoid.default", "binary", "probabilities"),
        (normal(3, 5), "aten.addmm.default", "classification", "logits"),
        (SOFTMAX, "aten.addmm.default", "classification", "probabilities"),
        (sigmoid(normal(3, 5)), "aten.sigmoid.default", "multilabel", "probabilities"),
        (sigmoid(normal(3, 5)), "aten.addmm.default", "classification", "logits"),
        (UNIT, "aten.addmm.default", "embedding", "values"),
        (normal(3, 7, 5), "aten.addmm.default", "embedding", "values"),
        (normal(3, 5, 1, 1), "aten.addmm.default", "classification", "logits"),
        (normal(3, 5, 4, 6), "aten.addmm.default", "segmentation", "logits"),
        (sigmoid(normal(3, 1, 4, 6)), "aten.sigmoid.default", "segmentation", "probabilities"),
        (np.abs(normal(3, 12)), "aten.mean.dim", "embedding", "values"),
        (np.zeros((3, 12), np.float32), "aten.addmm.default", "classification", "logits"),
        (np.tile(np.abs(normal(1, 12)), (3, 1)), "aten.addmm.default", "classification", "logits"),
        (np.abs(normal(3, 5)), "aten.addmm.default", "classification", "logits"),
        (np.abs(normal(3, 1)), "aten.relu.default", "regression", "values"),
        (np.abs(normal(3)), "aten.softplus.default", "regression", "values"),
        (np.abs(normal(3, 1)), "aten.addmm.default", "binary", "logits"),
    ],
)
def test_outputs_are_taken_for_what_their_shapes_and_values_show(values, operator, task, scores):
    head = guess(values, operator)
    assert (head.task, head.scores) == (task, scores)


def test_rows_of_outputs_of_each_rank():
    assert as_rows(normal(6)).shape == (6, 1)
    tokens = normal(2, 200, 3)
    assert sampled(tokens).shape == (2, *sampled_shape((200, 3))) == (2, 64, 3)
    np.testing.assert_array_equal(as_rows(sampled(tokens))[63], tokens[0, 199])
    assert as_rows(tokens, whole=True).shape == (2, 600)


def test_ties_count_as_agreement():
    """Sigmoids of 1.0: whichever comes first is no difference."""
    reference = np.array([[1, 1, 0, 0.5], [0, 1, 1, 0.2], [1, 0, 0.3, 1], [0, 0, 1, 1]], dtype=np.float32)
    other = reference.copy()
    other[:, :] -= np.where(reference == 1, np.array([1e-3, 0, 1e-4, 0], dtype=np.float32), 0)
    found = compare(reference, other)
    assert (found.top1, found.top5) == (1.0, 1.0)
    other[0] = [0, 0.2, 0, 0.5]
    assert compare(reference, other).top1 == 0.75


@pytest.mark.parametrize("scale", [0.0, 1e-9])
def test_an_engine_whose_logits_are_all_alike_agrees_by_luck_only(scale):
    reference = normal(200, 10)
    engine = scale * normal(200, 11)[:, :10]
    assert compare(reference, engine).top1 < 0.3
    assert compare(reference, engine).top5 < 0.7


def test_decisions_agree_where_both_are_on_the_same_side_of_the_threshold():
    reference = np.array([[2.0], [-1.0], [0.0], [3.0]], dtype=np.float32)
    other = np.array([[1.0], [0.5], [-0.1], [3.0]], dtype=np.float32)
    found = compare(reference, other, [1, 0, 0, 0], Head("binary"))
    assert found.agreement == 0.75, "the reference on the threshold agrees with both"
    assert (found.reference_accuracy, found.accuracy, found.accuracy_drop) == (0.75, 0.5, 0.25)
    assert found.top1 is None
    shares = Head("multilabel", "probabilities", 2)
    pair = np.array([[0.9, 0.1], [0.4, 0.6]], dtype=np.float32)
    assert compare(pair, pair[:, ::-1].copy(), None, shares).agreement == 0.0


def test_each_quantity_must_correlate():
    reference = np.stack([np.arange(8), np.tile([0, 1], 4), np.full(8, 7)], axis=1).astype(np.float32)
    other = reference + np.float32(0.5)
    found = compare(reference, other, None, Head("regression", "values"))
    assert found.correlation == pytest.approx(1.0), "a quantity that does not vary is left out"
    assert found.relative_error == pytest.approx(0.5 * 24 / reference.sum())
    other[:, 1] = other[::-1, 1]
    assert compare(reference, other, None, Head("regression", "values")).correlation == pytest.approx(-1.0)


def test_embeddings_are_compared_by_their_directions_and_neighbours():
    reference = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]], dtype=np.float32)
    head = Head("embedding", "values")
    same = compare(reference, 2 * reference, None, head)
    assert (same.similarity, same.nearest) == (pytest.approx(1.0), 1.0)
    other = reference.copy()
    other[1] = [0.5, 0.5]
    assert compare(reference, other, None, head).nearest == 0.75
    twins = np.array([[1, 0], [1, 0], [1, 0], [0, 1]], dtype=np.float32)
    assert compare(twins, twins + np.float32(1e-6), None, head).nearest == 1.0, "ties"


@pytest.mark.parametrize(
    "task", ["classification", "binary", "multilabel", "regression", "embedding", "segmentation"]
)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_infinite_values_fail_every_gate_and_exact_ones_pass(task, precision):
    classes = 1 if task == "binary" else 4
    reference = normal(40, classes)
    head = Head(task, "logits", classes)
    limits = fitting(PRECISIONS[precision].tolerances, head)
    limits.pop("accuracy_drop", None)
    assert len(limits) >= 2
    assert failures(compare(reference, reference, None, head), limits) == []
    broken = reference.copy()
    broken[3, 0] = np.inf
    assert len(failures(compare(reference, broken, None, head), limits)) == len(limits)


def test_a_task_of_a_later_version_is_compared_by_the_common_metrics():
    reference = normal(10, 4)
    found = compare(reference, reference, None, Head("depth", "values", 4))
    assert found.sqnr == 200
    assert headline(found.as_dict()) == ("agreement", "-")
