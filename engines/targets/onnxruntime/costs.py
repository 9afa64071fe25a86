"""The cost file: regions whose 8 bits take longer than float, by measured times. They stay float.

The file is an input of an export, which times nothing. So the same file gives the same engine on machines of any speed.
`engines.verification.region_costs` measures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Literal

import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from export_zoo.base.errors import BadInputError, first_of
from export_zoo.base.files import replacing
from export_zoo.engines.targets.onnxruntime.placement import place_onnxruntime
from export_zoo.engines.targets.onnxruntime.regions import Region, regions

DEFAULT = Path(__file__).with_name("costs.json")
"""Times of regions of common networks at their own sizes. docs/int8.md says on which machine and how to repeat it."""

FASTER = 0.9
"""Largest part of the time of 8 bits that float may take, as a mean over batch sizes: times vary by some percent."""


class RegionTime(BaseModel):
    """Median times of one region alone, for a whole batch, in milliseconds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    int8: float = Field(ge=1e-6, le=1e9)
    float32: float = Field(ge=1e-6, le=1e9)


class Costs(BaseModel):
    """The contents of a cost file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    onnxruntime: str
    instruction_set: str
    cpu: str
    threads: PositiveInt = 1
    regions: dict[str, dict[PositiveInt, RegionTime]] = Field(
        description="Times by batch size, by the signature of a region; see `regions.Region.signature`."
    )

    @classmethod
    def read(cls, path: Path) -> Costs:
        """Read a cost file. Raises BadInputError if it is not one."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise BadInputError(
                f"{path}: {error.strerror or error}", hint="give an existing cost file"
            ) from error
        except ValidationError as error:
            raise BadInputError(
                f"{path}: not a cost file: {first_of(error)}", hint="write one with `export-zoo costs BUNDLE`"
            ) from error

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all. Raises OSError."""
        with replacing(path) as temporary:
            temporary.write_text(self.model_dump_json(indent=1) + "\n")


def ratio(times: Mapping[int, RegionTime]) -> float:
    """Time in float over time in 8 bits: the geometric mean over batch sizes; infinite if there are none."""
    logarithms = [math.log(time.float32 / time.int8) for time in times.values()]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else math.inf


def faster(times: Mapping[int, RegionTime]) -> bool:
    """Whether a region is faster in float: by a tenth as a mean over batch sizes, and slower at none."""
    return ratio(times) <= FASTER and all(time.float32 <= time.int8 for time in times.values())


def saved(times: Mapping[int, RegionTime]) -> float:
    """Milliseconds an image that float saves, as a mean over batch sizes."""
    return sum((time.int8 - time.float32) / batch for batch, time in times.items()) / len(times)


def regions_of(graph: ir.Graph, kept: Set[str]) -> list[Region]:
    """Regions of an FP32 graph, as `place_onnxruntime` quantizes it without the layers `kept`."""
    placement = place_onnxruntime(graph, kept)
    return list(regions(graph, placement.activations, placement.weights))


def float_layers(graph: ir.Graph, kept: Set[str], costs: Costs) -> tuple[str, ...]:
    """Names of the layers that stay float for speed: those of the regions that together save the most time.

    If no layer were left to quantize, the regions that save least are quantized nevertheless.

    Args:
        kept: names of layers that stay float anyway.
    """
    found = [
        (region, saved(times))
        for region in regions_of(graph, kept)
        if (times := costs.regions.get(region.signature)) and faster(times)
    ]
    chosen = best_apart(found)
    everything, values = set(place_onnxruntime(graph, kept).weights), dict(found)
    while chosen and {layer for region in chosen for layer in region.layers} == everything:
        chosen.remove(min(chosen, key=values.__getitem__))
    return tuple(layer for region in chosen for layer in region.layers)


def best_apart(found: list[tuple[Region, float]]) -> list[Region]:
    """The regions, of which no two overlap, with the largest sum of values."""
    best: list[tuple[float, list[Region]]] = [(0.0, [])]
    """The best sum and its regions, by the cut that all of them end before."""
    for cut in range(1, max((region.end for region, _ in found), default=0) + 1):
        choices = [best[-1]]
        for region, value in found:
            if region.end == cut:
                total, before = best[region.begin]
                choices.append((total + value, [*before, region]))
        best.append(max(choices, key=lambda choice: choice[0]))
    return best[-1][1]
