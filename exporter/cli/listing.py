"""Output of `export-zoo list`: the zoo's models and the weights of each."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from export_zoo.base.errors import BadInputError
from export_zoo.base.files import cache_directory
from export_zoo.base.machine import library_versions
from export_zoo.calibration.preprocess import Preprocess
from export_zoo.exporter.models import memory, zoo
from export_zoo.exporter.models.sources import torchvision_zoo
from export_zoo.exporter.option_values import DEFAULT_BATCH, BatchRange
from export_zoo.exporter.options import ExportOptions
from export_zoo.exporter.run.cache import StageCache, code_digest
from export_zoo.exporter.run.report import make_console


@dataclass(frozen=True)
class ListedWeights:
    """Weights of a model.

    Sizes are in pixels. `gflops` is for one image, in 10^9 multiply-adds, as torchvision gives it. `top1` is in percent
    on ImageNet, None if unknown. `memory_gib` is the memory that an export to FP32 and INT8 with the default batch
    range is expected to take.
    """

    model: str
    weights: str
    input_size: int
    resize_size: int
    interpolation: str
    params: int
    gflops: float
    top1: float | None
    memory_gib: float


def listed(pattern: str) -> list[ListedWeights]:
    """Weights of the models whose name matches a glob or contains the pattern.

    Raises:
        BadInputError: no model matches.
    """
    from torchvision.models import get_model_weights

    pattern = pattern.lower()  # model names are in lower case
    known = torchvision_zoo.model_names() + torchvision_zoo.segmentation_names()
    names = [n for n in known if pattern in n or fnmatch.fnmatchcase(n, pattern)]
    if not names:
        raise BadInputError(f"no model matches {pattern!r}", hint="`export-zoo list` shows all")
    found = []
    with StageCache(cache_directory()) as cache:
        for name in names:
            for weights in get_model_weights(name):
                p = torchvision_zoo.preprocess_of(weights)
                top1 = float(weights.meta["_metrics"].get("ImageNet-1K", {}).get("acc@1", math.nan))
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
                        memory_gib=_memory(cache, name, p),
                    )
                )
    return found


def _memory(cache: StageCache, name: str, preprocess: Preprocess) -> float:
    size = (preprocess.crop_height, preprocess.crop_width)

    def make(_: Path) -> int:
        spec = zoo.resolve(ExportOptions(name, weights="none", input_size=size))
        found = zoo.footprint(spec)
        assert found is not None
        return memory.expected_bytes(found, calibrated=True, batch=batch.max)

    batch = BatchRange.parse(DEFAULT_BATCH)
    versions = library_versions("torch", "torchvision")
    key = {"code": code_digest(), "versions": versions, "model": name, "size": size}
    return round(int(cache.run("footprint", key, make).data) / 2**30, 1)


def print_models(found: Sequence[ListedWeights]) -> None:
    """Print the table on stdout."""
    from rich.table import Table

    table = Table()
    for column in (
        "model",
        "weights",
        "input",
        "resize",
        "params",
        "GFLOPs",
        "memory",
        "top-1",
    ):
        table.add_column(column, justify="left" if column in ("model", "weights") else "right")
    for row in found:
        table.add_row(
            row.model,
            row.weights,
            str(row.input_size),
            f"{row.resize_size} {row.interpolation}",
            f"{row.params / 1e6:.1f} M",
            f"{row.gflops:.2f}",
            f"{row.memory_gib:.1f} GiB",
            "-" if row.top1 is None else f"{row.top1:.1f}",
        )
    make_console().print(table)
