"""Tasks: what the values of an output mean, and which metrics fit them. docs/parity.md has the reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from export_zoo.engines.parity.outputs import as_rows

Float32Array = npt.NDArray[np.float32]

TaskName = Literal["classification", "binary", "multilabel", "regression", "embedding", "segmentation"]
Scores = Literal["logits", "probabilities", "values"]
"""Values of an output: before softmax or sigmoid, after it, or neither (quantities and features)."""

TASKS: Mapping[TaskName, str] = {
    "classification": "one class of several",
    "binary": "yes or no, by one value",
    "multilabel": "yes or no for each class",
    "regression": "quantities",
    "embedding": "features, which are compared with those of other images",
    "segmentation": "classes of each pixel",
}

HEADLINES: Mapping[str, str] = {
    "top1": "top-1 agreement",
    "agreement": "agreement",
    "correlation": "correlation",
    "nearest": "same nearest image",
}
"""The metric that is shown beside SQNR, of which each task has one, and its title."""

_UNIT = 1e-3
"""Largest deviation of a sum of probabilities, or of a norm, from 1."""


@dataclass(frozen=True)
class Head:
    """Meaning of an output.

    Args:
        task: one of TASKS. Of an unknown task, which a later version may add, only the common metrics are measured.
        classes: number of classes, quantities or features.
    """

    task: str = "classification"
    scores: str = "logits"
    classes: int = 2

    @property
    def by_class(self) -> bool:
        """Whether the largest value of several decides."""
        return self.classes > 1 and self.task in ("classification", "segmentation")

    @property
    def by_threshold(self) -> bool:
        """Whether each value decides for itself."""
        return self.task in ("binary", "multilabel") or (self.task == "segmentation" and self.classes == 1)

    @property
    def threshold(self) -> float:
        """Values above it are a yes: 0.5 for probabilities, 0 for logits (whose sigmoid is 0.5)."""
        return 0.5 if self.scores == "probabilities" else 0.0

    @property
    def labelled(self) -> bool:
        """Whether class folders give an accuracy."""
        return self.task in ("classification", "binary")

    @property
    def figures(self) -> frozenset[str]:
        """Metrics of this task, beside those that every output has."""
        found = {
            "regression": {"correlation", "relative_error"},
            "embedding": {"similarity", "nearest"},
        }.get(self.task, set())
        if self.by_class:
            found = {"top1", "top5"}
        elif self.by_threshold:
            found = {"agreement"}
        if (self.by_class or self.by_threshold) and self.classes > 1:
            found = {*found, "misplaced"}
        return frozenset({*found, *({"accuracy", "accuracy_drop"} if self.labelled else ())})

    @property
    def counted(self) -> str:
        """Number of classes in words, such as "1000 classes"."""
        units = {"binary": "value", "regression": "value", "embedding": "feature", "multilabel": "label"}
        unit = units.get(self.task, "class")
        return f"{self.classes} {unit}" + ("" if self.classes == 1 else "es" if unit == "class" else "s")

    @property
    def described(self) -> str:
        """The task in words, such as "classification, 1000 classes"."""
        return self.task if self.task == "binary" else f"{self.task}, {self.counted}"

    def rows(self, output: Float32Array) -> Float32Array:
        """Rows of values to compare; see `outputs.as_rows`. Embeddings of an image are one row."""
        return as_rows(output, whole=self.task == "embedding")


def classes_of(shape: tuple[int, ...]) -> int:
    """Number of classes of an output, from its shape for one image: [], [C], [T, C] or [C, H, W]."""
    return 1 if not shape else shape[-1] if len(shape) == 2 else shape[0]


def scores_of(values: Float32Array) -> Scores:
    """Whether values can be probabilities: all are in [0, 1]."""
    return "probabilities" if bool(((values >= 0) & (values <= 1 + 1e-6)).all()) else "logits"


_FEATURES = 8
"""Number of values from which a vector without negative ones is taken for features: logits have both signs."""


def guess(values: Float32Array, operator: str = "") -> Head:
    """The most probable meaning of an output, from its values for a few images.

    Args:
        values: float32 [N], [N, C], [N, T, C] or [N, C, H, W].
        operator: name of the operator that computed them, such as `aten.sigmoid.default`; empty if it is not known.
            Averages of ReLU are in [0, 1], too.
    """
    ends_in_sigmoid = "sigmoid" in operator
    one_sided = any(name in operator for name in ("relu", "softplus", "exp."))
    classes = classes_of(values.shape[1:])
    scores = scores_of(values)
    rows = as_rows(values).astype(np.float64)
    if values.ndim == 3:
        return Head("embedding", "values", classes)
    dense = values.ndim == 4 and values.shape[2] * values.shape[3] > 1
    certain = scores if ends_in_sigmoid else "logits"
    if classes > 1 and scores == "probabilities" and np.abs(rows.sum(axis=1) - 1).max() < _UNIT:
        return Head("segmentation" if dense else "classification", "probabilities", classes)
    if dense:
        return Head("segmentation", certain, classes)
    if classes == 1:
        return Head("regression", "values", 1) if one_sided else Head("binary", certain, classes)
    if ends_in_sigmoid and scores == "probabilities":
        return Head("multilabel", "probabilities", classes)
    # An untrained last layer of zeros (torchvision's ViT) gives all images the same values, which tell nothing.
    differ = bool(np.ptp(rows, axis=0).any())
    unit = np.abs(np.linalg.norm(rows, axis=1) - 1).max() < _UNIT
    if differ and (unit or (classes >= _FEATURES and rows.min() >= 0)):
        return Head("embedding", "values", classes)
    return Head("classification", "logits", classes)


def why_not(task: str, shape: tuple[int, ...]) -> str:
    """The reason why an output of this shape for one image cannot have the task; empty if it can."""
    classes, dense = classes_of(shape), len(shape) == 3
    if task == "binary" and classes > 1:
        others = "segmentation" if dense else "classification or multilabel"
        return f"it has {classes} values, and binary is for one: choose {others}"
    if task == "classification" and classes == 1:
        return "it has one value: choose binary or regression"
    if task == "segmentation" and not dense:
        return "it has no height and width" + (
            ": for masks, return [N, 1, height, width], by unsqueeze(1)" if len(shape) == 2 else ""
        )
    if task == "embedding" and classes == 1 and not dense:
        return "it has one value, which has no direction: choose binary or regression"
    return ""


def headline(metrics: Mapping[str, float | int | None]) -> tuple[str, str]:
    """Title and value of the metric that is shown beside SQNR: shares in percent, correlations as they are."""
    for metric, title in HEADLINES.items():
        if (value := metrics.get(metric)) is not None:
            return title, f"{value:.4f}" if metric == "correlation" else f"{100 * value:.1f} %"
    return "agreement", "-"
