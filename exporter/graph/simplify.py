"""Simplifies a graph with onnxsim and proves that the logits did not change.

The graph stays as it is if simplifying gains nothing or the proof fails.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as passes

from export_zoo.base import graph_io
from export_zoo.base.graph_io import MODULE_KEY
from export_zoo.engines.parity.metrics import relative_errors
from export_zoo.engines.precision.rewrites import (
    average_pool_instead_of_mean,
    plain_einsum,
    remove_unused_initializers,
)
from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine

Float32Array = npt.NDArray[np.float32]
TIMEOUT_SECONDS = 900
MAX_RELATIVE_ERROR = 1e-4


def operator_counts(graph: ir.Graph) -> Counter[str]:
    """Number of nodes of each operator."""
    return Counter(node.op_type for node in graph)


@dataclass(frozen=True)
class Simplified:
    """The files of the simplified graph (the graph first), and a readable summary."""

    files: list[Path]
    summary: str
    warning: str = ""


_ONNXSIM = """
import os, sys
sys.modules["torch"] = sys.modules["sympy"] = None
import onnx, onnxsim
source, out = sys.argv[1:]
model, ok = onnxsim.simplify(source, overwrite_input_shapes={})
if not ok:
    sys.exit("its result is not valid")
onnx.save(model, out, save_as_external_data=True, location=os.path.basename(out) + ".data")
"""
"""Runs onnxsim. Its command does the same, and then compares both graphs in a table, which takes three times as long on
a network of 350 MB. Version 0.8 imports torch and sympy for features that are not used here, which takes seconds."""


def _run_onnxsim(source: Path, out: Path) -> str:
    """Run onnxsim in its own process, since it may crash. Returns the reason of a failure, or an empty string."""
    command = [sys.executable, "-c", _ONNXSIM, str(source.absolute()), str(out.absolute())]
    try:
        # Python imports from the working directory first. The user's may contain an onnx.py, so it is not used.
        done = subprocess.run(
            command, cwd=out.parent, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"onnxsim took more than {TIMEOUT_SECONDS} s"
    if done.returncode < 0:
        return f"onnxsim was killed by signal {-done.returncode}"
    if done.returncode > 0 or not out.is_file():
        lines = (done.stderr or done.stdout).strip().splitlines()
        return f"onnxsim failed: {lines[-1] if lines else f'exit code {done.returncode}'}"
    return ""


def _restore_modules(model: ir.Model, source: ir.Model) -> None:
    """Restore the module paths that onnxsim erases: by a node's output name, otherwise by its weight's name."""
    by_output = {v.name: graph_io.module_of(node) for node in source.graph for v in node.outputs}
    by_input: dict[str | None, str] = {}
    for node in source.graph:
        for value in node.inputs:
            if value is not None and value.is_initializer():
                by_input[value.name] = graph_io.module_of(node)
    taken = {node.name for node in model.graph}
    for index, node in enumerate(model.graph):
        if not node.name:
            node.name = f"simplified_{node.op_type}_{index}"
            assert node.name not in taken
        node.metadata_props.clear()
        candidates = [by_output.get(v.name, "") for v in node.outputs]
        candidates += [by_input.get(v.name, "") for v in node.inputs if v is not None]
        if module := next(filter(None, candidates), ""):
            node.metadata_props[MODULE_KEY] = module


def _difference(first: Path, second: Path, inputs: Sequence[Float32Array]) -> float:
    """Largest difference of the graphs' outputs, relative to an output's largest, over two batches of each size."""
    worst = 0.0
    engines = [OnnxRuntimeEngine(path, fused=False) for path in (first, second)]
    for batch in (part for images in inputs for part in (images[:1], images)):
        before, after = (engine.run_all(batch) for engine in engines)
        if [a.shape for a in before] != [b.shape for b in after]:
            return float("inf")
        for a, b in zip(before, after, strict=True):
            worst = max(worst, *relative_errors(a, b))
    return worst


def simplify(source: Path, directory: Path, *inputs: Float32Array) -> Simplified:
    """Simplify `source` into `directory`/graph.onnx.

    Two steps: onnxsim, and mean -> average pooling. Each is kept only if the logits prove it harmless.

    Args:
        inputs: images to compare the logits on, float32 [N, channels, H, W], N >= 2; one array per input size.
    """
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        return _simplify(source, directory / "graph.onnx", Path(scratch), inputs)


def _simplify(source: Path, out: Path, scratch: Path, inputs: Sequence[Float32Array]) -> Simplified:
    original = graph_io.load(source)
    before = operator_counts(original.graph)
    warning = ""
    base, summary = original, ""
    if len(graph_io.external_files(source)) > 0:
        summary = "onnxsim skipped: weights over 2 GiB"
    else:
        candidate = scratch / "onnxsim.onnx"
        failure = _run_onnxsim(source, candidate)
        if not failure:
            try:
                simplified = graph_io.load(candidate)
                unchanged = operator_counts(simplified.graph) == before
                change = 0.0 if unchanged else _difference(source, candidate, inputs)
            except Exception as error:  # a bad graph from onnxsim: keep the original
                failure = f"its graph cannot be used: {error}".splitlines()[0]
        if failure:
            summary = warning = f"onnxsim skipped: {failure}"
        elif unchanged:
            summary = "onnxsim skipped: it changes nothing"
        elif not change <= MAX_RELATIVE_ERROR:
            summary = warning = f"onnxsim skipped: it changes the logits by {change:.1e} of the largest"
        else:
            _restore_modules(simplified, original)
            base = simplified
            after = operator_counts(simplified.graph)
            summary = f"onnxsim: {sum(before.values())} -> {sum(after.values())} nodes"
    passes.ShapeInferencePass()(base)
    pooled = average_pool_instead_of_mean(base.graph)
    plain_einsum(base.graph)
    remove_unused_initializers(base.graph)
    files = graph_io.save(base, out)
    change = _difference(source, out, inputs)
    if not change <= MAX_RELATIVE_ERROR:
        warning = f"simplifying skipped: rewriting changes the logits by {change:.1e} of the largest"
        return Simplified(graph_io.save(graph_io.load(source), out), warning, warning)
    if pooled:
        summary += f"; {pooled} mean -> average pooling"
    return Simplified(files, f"{summary}; logits equal within {change:.0e}", warning)
