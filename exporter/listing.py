"""What `export-zoo list` shows: the zoo's models and the weights there are for each."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass

from calibration.errors import BadInputError
from exporter import torchvision_zoo
from exporter.report import make_console


@dataclass(frozen=True)
class ListedWeights:
    """Weights of a model; sizes in pixels, `gflops` of one image (10^9 multiply-adds) as torchvision gives them,
    `top1` in percent on ImageNet, None where it is not known."""

    model: str
    weights: str
    input_size: int
    resize_size: int
    interpolation: str
    params: int
    gflops: float
    top1: float | None


def listed(pattern: str) -> list[ListedWeights]:
    """Weights of the models whose name matches a glob, or has it as a part.

    Raises:
        BadInputError: none does.
    """
    from torchvision.models import get_model_weights

    pattern = pattern.lower()  # as the names are
    names = [n for n in torchvision_zoo.model_names() if pattern in n or fnmatch.fnmatchcase(n, pattern)]
    if not names:
        raise BadInputError(f"no model matches {pattern!r}", hint="`export-zoo list` shows all")
    found = []
    for name in names:
        for weights in get_model_weights(name):
            p = torchvision_zoo.preprocess_of(weights)
            top1 = float(weights.meta["_metrics"]["ImageNet-1K"]["acc@1"])
            found.append(
                ListedWeights(
                    model=name,
                    weights=weights.name,
                    input_size=p.crop_height,
                    resize_size=p.resize_size,
                    interpolation=p.interpolation,
                    params=weights.meta["num_params"],
                    gflops=float(weights.meta["_ops"]),
                    top1=top1 if math.isfinite(top1) else None,  # VGG16's feature extractor has NaN
                )
            )
    return found


def print_models(found: Sequence[ListedWeights]) -> None:
    """The table, on stdout."""
    from rich.table import Table

    table = Table()
    for column in (
        "model",
        "weights",
        "input",
        "resize",
        "interpolation",
        "params",
        "GFLOPs",
        "ImageNet top-1",
    ):
        table.add_column(
            column, justify="left" if column in ("model", "weights", "interpolation") else "right"
        )
    for row in found:
        table.add_row(
            row.model,
            row.weights,
            str(row.input_size),
            str(row.resize_size),
            row.interpolation,
            f"{row.params / 1e6:.1f} M",
            f"{row.gflops:.2f}",
            "-" if row.top1 is None else f"{row.top1:.1f}",
        )
    make_console().print(table)
