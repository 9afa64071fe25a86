"""Time of each node of a graph in ONNX Runtime on the CPU."""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from export_zoo.base import graph_io
from export_zoo.engines.precision.placement import activated
from export_zoo.engines.targets.onnxruntime.engine import CRASHING

RUNS = 12
"""Number of timed runs; the first ones, which allocate memory, count less in a median."""

_KERNEL, _ADDED = "_kernel_time", re.compile(r"(_token_\d+|_nchwc)+$")
"""Endings of names: of an event, and of the nodes that ONNX Runtime makes of ours."""


def node_times(graph: Path, batch: npt.NDArray[np.float32], *, half: bool) -> dict[str, float]:
    """Median time of each node that runs, in milliseconds for one batch on one thread, by the node's name.

    A fused node has the name of its layer's node. Nodes that ONNX Runtime adds have names of its own.

    Args:
        half: the graph computes in FP16.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_profiling = True
    with tempfile.TemporaryDirectory(prefix="export-zoo-") as directory:
        options.profile_file_prefix = str(Path(directory) / "profile")
        session = ort.InferenceSession(
            graph,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=CRASHING if half else [],
        )
        (feed,) = session.get_inputs()
        for _ in range(RUNS):
            session.run(None, {feed.name: batch})
        written: Any = session.end_profiling()  # type: ignore[no-untyped-call]
        events = json.loads(Path(written).read_text(encoding="utf-8"))
    times = defaultdict[str, list[float]](list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            times[event["name"].removesuffix(_KERNEL)].append(event["dur"] / 1e3)
    found, layers = defaultdict[str, float](float), _layers(graph)
    for name, durations in times.items():
        plain = _ADDED.sub("", name)
        found[layers.get(plain, plain)] += float(np.median(durations))
    return dict(found)


def _layers(graph: Path) -> dict[str, str]:
    """Names of layers by the outputs of them and of the activations behind: nodes of the blocked layout bear these."""
    found = {}
    for node in graph_io.load(graph).graph:
        if node.op_type in ("Conv", "FusedConv"):
            value = node.outputs[0]
            found[str(value.name)] = str(node.name)
            while (after := activated(value)) is not value:
                value = after
                found[str(value.name)] = str(node.name)
    return found
