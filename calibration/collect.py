"""Ranges of all activations in one streaming pass of ONNX Runtime, in memory that does not grow with images."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from calibration import graph_io
from calibration.errors import BadInputError
from calibration.images import ImageStream, Progress
from calibration.machine import instruction_set, library_versions
from calibration.preprocess import normalize
from calibration.ranges import Ranges, TensorRange

_FUSED_ACTIVATIONS = frozenset({"Relu", "Clip"})
_FUSING_PRODUCERS = frozenset({"Conv", "ConvTranspose", "Gemm", "Add", "BatchNormalization"})


def activation_tensors(model: ir.Model) -> list[str]:
    """Names of the float tensors whose ranges any placement policy may ask for.

    These are all floating-point activations but for those that no target quantizes: what a Conv, Gemm, Add
    or BatchNormalization hands to its only reader, a Relu or Clip (the pair fuses).
    """
    names: list[str] = []
    values: list[ir.Value] = list(model.graph.inputs)
    for node in model.graph:
        values.extend(node.outputs)
    for value in values:
        if value.name is None or value.dtype is not ir.DataType.FLOAT or value.const_value is not None:
            continue
        producer = value.producer()
        readers = {use.node for use in value.uses()}
        if (
            producer is not None
            and producer.op_type in _FUSING_PRODUCERS
            and len(readers) == 1
            and next(iter(readers)).op_type in _FUSED_ACTIVATIONS
            and not value.is_graph_output()
        ):
            continue
        names.append(value.name)
    return names


_STATISTICS = ("ReduceMin", "ReduceMax", "ReduceSum")
"""ONNX Runtime's minimum and maximum skip NaN; the sum does not, and is there for that only."""


def _with_range_outputs(graph: Path, tensors: Sequence[str], directory: Path) -> Path:
    """The graph, with _STATISTICS of each tensor as further outputs (a scalar each)."""
    model = graph_io.load(graph)
    values = {v.name: v for v in model.graph.inputs}
    for node in list(model.graph):
        values.update((v.name, v) for v in node.outputs)
    first = model.graph[0]
    for index, name in enumerate(tensors):
        producer = values[name].producer()
        for op_type in _STATISTICS:
            reduce = ir.node(op_type, [values[name]], {"keepdims": 0}, name=f"export_zoo_{op_type}_{index}")
            output = reduce.outputs[0]
            output.name = f"export_zoo_{op_type}_{index}_out"
            output.dtype = ir.DataType.FLOAT
            output.shape = ir.Shape([])
            if producer is None:
                model.graph.insert_before(first, reduce)
            else:
                model.graph.insert_after(producer, reduce)
            model.graph.outputs.append(output)
    path = directory / "observed.onnx"
    graph_io.save(model, path)
    return path


def collect_minmax(
    graph: Path, images: ImageStream, *, threads: int = 0, progress: Progress = lambda _: None
) -> Ranges:
    """Run the images through the graph once and record each activation's exact minimum and maximum.

    Args:
        graph: ONNX file with one float32 input [N, 3, H, W].
        images: the stream to calibrate on; its batches bound the memory.
        threads: ONNX Runtime's intra-op threads, 0 for all cores.
        progress: called with the number of images done.

    Raises:
        BadInputError: a tensor is not finite (named with its module path), or no image could be used.
    """
    model = graph_io.load(graph)
    tensors = activation_tensors(model)
    producers = {v.name: node for node in model.graph for v in node.outputs}
    modules = {name: graph_io.module_of(producers.get(name)) for name in tensors}
    lows = np.full(len(tensors), np.inf, dtype=np.float32)
    highs = np.full(len(tensors), -np.inf, dtype=np.float32)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Each reduction runs where it stands in the graph, behind its tensor. ORT's default order leaves them to the end
    # and keeps all activations (vit_b_16, 8 images: 3.7 GB); so does its blocked layout, which is undone for each.
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    with tempfile.TemporaryDirectory(prefix="export-zoo-") as directory:
        observed = _with_range_outputs(graph, tensors, Path(directory))
        session = ort.InferenceSession(
            observed,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["NchwcTransformer"],
        )
        feed = session.get_inputs()[0].name
        names = [o.name for o in session.get_outputs()]
        first = len(names) - len(_STATISTICS) * len(tensors)
        for batch in images:
            outputs = session.run(names[first:], {feed: normalize(batch, images.preprocess)})
            low, high, total = np.array(outputs, dtype=np.float32).reshape(-1, len(_STATISTICS)).T
            finite = np.isfinite(low) & np.isfinite(high) & ~np.isnan(total)
            if not finite.all():
                bad = tensors[int(np.flatnonzero(~finite)[0])]
                raise BadInputError(
                    f"calibration: tensor {bad!r} (module {modules[bad] or 'unknown'}) is not finite on the "
                    "calibration images",
                    hint="check the weights and the preprocessing: FP32 itself overflows or makes NaN there",
                )
            np.minimum(lows, low, out=lows)
            np.maximum(highs, high, out=highs)
            progress(len(batch))
    if not images.images:
        raise BadInputError(f"{images.root}: no image could be used for calibration", hint="check the folder")
    return Ranges(
        method="minmax",
        graph_sha256=graph_io.sha256_of(graph),
        preprocess=images.preprocess,
        image_sha256=sorted(i.sha256 for i in images.images),
        unreadable=[u.name for u in images.unreadable],
        instruction_set=instruction_set(),
        versions=library_versions("onnxruntime", "numpy", "pillow"),
        tensors={
            name: TensorRange(min=float(low), max=float(high), module=modules[name])
            for name, low, high in zip(tensors, lows, highs, strict=True)
        },
    )
