"""Measures which regions of a bundle's network ONNX Runtime computes faster in float than in 8 bits on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from export_zoo.base import graph_io
from export_zoo.base.errors import BadInputError
from export_zoo.base.machine import cpu_model, instruction_set
from export_zoo.calibration.ranges import Ranges
from export_zoo.engines.bundle import reader
from export_zoo.engines.bundle.bench import Effort, run_in_turn
from export_zoo.engines.bundle.manifest import Recipe
from export_zoo.engines.precision.int8.keep_float import kept_float
from export_zoo.engines.precision.int8.qdq import quantize
from export_zoo.engines.targets.onnxruntime.costs import (
    Costs,
    RegionTime,
    best_apart,
    faster,
    regions_of,
    saved,
)
from export_zoo.engines.targets.onnxruntime.placement import INT8_RULES, place_onnxruntime
from export_zoo.engines.targets.onnxruntime.regions import Region, alone

BATCHES = (1, 8)
"""Batch sizes that regions are timed at."""

_REGION = Effort(seconds=0.1, rounds_min=5, rounds_max=30)
_NETWORK = Effort(seconds=2.0, rounds_min=9, rounds_max=100)

CONFIRMED = 0.995
"""Largest time of the whole network, as a part of that without the region in float, that confirms a region. Alone, its
weights stay in the processor's caches, and what ONNX Runtime does at its borders differs."""


class _Session:
    """A model with one input, on one thread."""

    def __init__(self, model: bytes | Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        (self.input,) = self._session.get_inputs()

    def run_all(self, batch: npt.NDArray[Any]) -> object:
        return self._session.run(None, {self.input.name: batch})

    def example(self, batch: int) -> npt.NDArray[Any]:
        """Random values of the input's type and shape: times do not depend on them."""
        random = np.random.default_rng(0)
        shape = [batch, *self.input.shape[1:]]
        if self.input.type == "tensor(float)":
            return random.random(shape, dtype=np.float32)
        return random.integers(0, 255, shape, dtype=np.uint8)


def _medians(sessions: Mapping[str, _Session], batch: int, effort: Effort) -> dict[str, float]:
    """Median time of each session, in milliseconds."""
    example = next(iter(sessions.values())).example(batch)
    times = run_in_turn(sessions, example, effort)
    return {name: float(np.median(seconds)) * 1e3 for name, seconds in times.items()}


def _ratio(before: Path, after: Path) -> float:
    """Time of one network over that of another: the geometric mean over BATCHES of medians of ratios."""
    sessions = {"before": _Session(before), "after": _Session(after)}
    found = []
    for batch in BATCHES:
        times = run_in_turn(sessions, sessions["before"].example(batch), _NETWORK)
        found.append(float(np.median(times["after"] / times["before"])))
    return float(np.exp(np.mean(np.log(found))))


def check(bundle: Path) -> Recipe:
    """The recipe of a bundle whose regions can be timed.

    Raises:
        BadInputError: not a bundle, damaged, or without ranges; or the network's size is not fixed.
    """
    recipe = reader.read_manifest(bundle).recipe
    if recipe.calibration is None:
        raise BadInputError(
            f"{bundle}: has no ranges, and an INT8 graph needs them",
            hint="export the network with --precision int8",
        )
    if recipe.input_size is not None:
        raise BadInputError(
            f"{bundle}: its input size is dynamic, and times depend on it", hint="export it with --input-size"
        )
    reader.checked(bundle, recipe.graph)
    for file in recipe.external_data:
        reader.checked(bundle, file)
    Ranges.read(reader.checked(bundle, recipe.calibration.ranges))
    return recipe


def measure(bundle: Path, progress: Callable[[int, int], None]) -> Costs:
    """Time the regions of a bundle's network in 8 bits and in float, on one thread at batches 1 and 8.

    A region is kept if it is faster in float (`costs.faster`), and the whole network is faster with it, too.

    Args:
        progress: called with 1 and the number of regions, after each region.

    Raises:
        BadInputError: as `check`.
    """
    recipe = check(bundle)
    assert recipe.calibration is not None
    path, ranges = bundle / recipe.graph.path, Ranges.read(bundle / recipe.calibration.ranges.path)
    fp32 = graph_io.load(path)
    kept = kept_float(fp32.graph, recipe.keep_float)
    with tempfile.TemporaryDirectory(prefix="export-zoo-") as directory:

        def write(name: str, more: Sequence[Region]) -> Path:
            layers = [escape(layer) for region in more for layer in region.layers]
            out = Path(directory) / f"{name}.onnx"
            quantize(path, ranges, out, rules=INT8_RULES, keep_float=[*recipe.keep_float, *layers])
            return out

        whole = write("int8", [])
        int8 = graph_io.load(whole)
        every = regions_of(fp32.graph, kept)
        timed: dict[str, dict[int, RegionTime]] = {}
        for region in every:
            if region.signature not in timed:
                timed[region.signature] = _time(region, fp32, int8)
            progress(1, len(every))
        candidates = [
            (region, saved(timed[region.signature])) for region in every if faster(timed[region.signature])
        ]
        confirmed: list[Region] = []
        layers = place_onnxruntime(fp32.graph, kept).weights.keys()
        before = whole
        for region in sorted(best_apart(candidates), key=dict(candidates).__getitem__, reverse=True):
            chosen = [*confirmed, region]
            if {layer for part in chosen for layer in part.layers} == layers:  # nothing would be left of INT8
                continue
            after = write(f"float-{region.begin}", chosen)
            if _ratio(before, after) <= CONFIRMED:
                confirmed, before = chosen, after
    return Costs(
        onnxruntime=ort.__version__,
        instruction_set=instruction_set(),
        cpu=cpu_model(),
        regions={region.signature: timed[region.signature] for region in confirmed},
    )


def _time(region: Region, fp32: ir.Model, int8: ir.Model) -> dict[int, RegionTime]:
    """Times of a region alone, by batch size; {} if the INT8 graph has no such region."""
    sessions = {}
    for name, quantized in (("int8", True), ("float", False)):
        try:
            model: Any = ir.to_proto(alone(region, fp32, int8, quantized=quantized))
        except ValueError:
            return {}
        sessions[name] = _Session(bytes(model.SerializeToString()))
    found = {}
    for batch in BATCHES:
        times = _medians(sessions, batch, _REGION)
        found[batch] = RegionTime(int8=round(times["int8"], 4), float32=round(times["float"], 4))
    return found
