"""Time of each node of a graph in OpenVINO on the CPU."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openvino as ov

from export_zoo.base import graph_io
from export_zoo.engines.precision.placement import activated
from export_zoo.engines.targets.openvino.engine import compiled

WARM_UP, RUNS = 2, 12
"""Number of runs before those that are timed, which allocate memory; and of those."""

_WITHOUT = "/WithoutBiases"
"""Follows the name of a layer whose bias OpenVINO adds apart."""


def node_times(graph: Path, batch: npt.NDArray[np.float32]) -> dict[str, float]:
    """Mean time of each node that runs, in milliseconds for one batch on one thread, by the node's name.

    A fused node has the name of its layer's node. Nodes that OpenVINO adds have names of its own.
    """
    _, model = compiled(graph, threads=1, profiled=True)
    request = model.create_infer_request()
    before = _means(request, batch, WARM_UP)
    after = _means(request, batch, RUNS)
    names, found = _by_output(graph), defaultdict[str, float](float)
    for name, mean in after.items():
        plain = name.partition(_WITHOUT)[0]
        # Means are over all runs of the request.
        total = mean * (WARM_UP + RUNS) - before.get(name, 0.0) * WARM_UP
        found[names.get(plain, plain)] += max(total / RUNS, 0.0)
    return dict(found)


def _means(request: ov.InferRequest, batch: npt.NDArray[np.float32], runs: int) -> dict[str, float]:
    """Run a batch some times more. Returns each node's mean time over all runs of the request, in milliseconds."""
    for _ in range(runs):
        request.infer([batch])
    ran = ov.ProfilingInfo.Status.EXECUTED
    return {
        one.node_name: one.real_time.total_seconds() * 1e3
        for one in request.profiling_info
        if one.status == ran
    }


def _by_output(graph: Path) -> dict[str, str]:
    """Names of nodes by their outputs: OpenVINO calls some nodes by what they, or what is fused into them, compute."""
    found = dict[str, str]()
    for node in graph_io.load(graph).graph:
        source, value = node.inputs[0] if node.inputs else None, node.outputs[0]
        # FP16 graphs convert their logits.
        fused = source is not None and (node.op_type == "Cast" or activated(source) is value)
        found[str(value.name)] = (
            found.get(str(source.name), str(node.name)) if fused and source else str(node.name)
        )
    return found
