"""From an eager PyTorch module to an ONNX graph with a dynamic batch, checked against eager at other batches."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import nn

from calibration import graph_io
from calibration.errors import BadInputError, ExportDefectError, ParityError
from calibration.graph_io import MODULE_KEY
from engines.onnxruntime_engine import OnnxRuntimeEngine
from exporter.eager import run_eager

INPUT, BATCH = "input", "batch"
OPSET = 20

_SAMPLE_BATCH = 7
"""Traced with, never run. A prime that is no usual channel count, so that a baked batch can be told by it; with
a sample batch of 1 the exporter specializes silently."""

_FOLDED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})

CHECK_BATCHES = (1, 3)
"""Batches that the exported graph is run at, beside eager; neither is the sample batch."""

MAX_RELATIVE_ERROR = 1e-3
_REPORT = "this is a defect of the export, not of your input; please report it with the model's name"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints and logs a good deal that means nothing to a user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def export(
    model: nn.Module,
    height: int,
    width: int,
    out: Path,
    *,
    outputs: Sequence[str] = ("logits",),
    external_threshold: int | None = None,
) -> list[Path]:
    """Export an eval-mode network of float32 [N, 3, height, width]; returns the files written.

    The graph's input is `input`, its outputs have the names given, all with a symbolic first dimension `batch`; nodes
    carry the module path as metadata and nothing else.

    Raises:
        ExportDefectError: the exporter refused, or baked the batch in.
        BadInputError: the model does not take this input size.
    """
    with torch.inference_mode():
        try:
            model(torch.zeros(1, 3, height, width))
        except Exception as error:
            raise BadInputError(
                f"the model does not run at input {height}x{width}: {error}",
                hint="choose another --input-size",
            ) from error
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                (torch.zeros(_SAMPLE_BATCH, 3, height, width),),
                dynamo=True,
                optimize=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=list(outputs),
                dynamic_shapes=({0: torch.export.Dim(BATCH, min=1)},),
            )
        assert program is not None
    except Exception as error:
        text = click.unstyle(str(error)).strip().splitlines()
        raise ExportDefectError(
            f"torch.onnx.export failed: {text[0] if text else type(error).__name__}", hint=_REPORT
        ) from error
    graph = program.model
    _strip_metadata(graph, dict(model.named_modules()))
    check_dynamic_batch(graph)
    return graph_io.save(graph, out, external_threshold=external_threshold)


def _strip_metadata(model: ir.Model, modules: Collection[str]) -> None:
    """Keep the module path of each node; drop stack traces, absolute paths and the rest."""
    for node in model.graph.all_nodes():
        module = _module_path(node, modules)
        node.metadata_props.clear()
        if module:
            node.metadata_props[MODULE_KEY] = module
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
            output.doc_string = None
    for graph in [model.graph, *model.graph.subgraphs()]:
        for value in [*graph.inputs, *graph.initializers.values()]:
            value.metadata_props.clear()
            value.doc_string = None
        graph.metadata_props.clear()
        graph.doc_string = None
    model.metadata_props.clear()
    model.doc_string = None
    model.graph.name = "main"


def _module_path(node: ir.Node, modules: Collection[str]) -> str:
    """The module that a node comes from, by its scope: the innermost that is the name of a module.

    A convolution that BatchNormalization was folded into has the scope `...bn1`, and is known by its weight instead.
    Not so other operators: the exporter lets layers with equal weights (all normalizations, at first) share one.
    """
    if node.op_type in _FOLDED:
        for value in node.inputs[1:2]:
            if value is not None and value.is_initializer() and (value.name or "").endswith(".weight"):
                return str(value.name).removesuffix(".weight")
    try:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    except (ValueError, SyntaxError):
        return ""
    return next((str(scope) for scope in reversed(scopes) if scope and scope in modules), "")


def _is_dynamic(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) > 0 and isinstance(value.shape[0], ir.SymbolicDim)


def check_dynamic_batch(model: ir.Model) -> None:
    """The input's and the outputs' first dimension must be symbolic.

    Raises:
        ExportDefectError: names the first node that has a constant batch.
    """
    ends = [model.graph.inputs[0], *model.graph.outputs]
    if all(_is_dynamic(value) for value in ends):
        return
    culprit = next(
        (
            node
            for node in model.graph
            if any(v.shape is not None and len(v.shape) and v.shape[0] == _SAMPLE_BATCH for v in node.outputs)
        ),
        None,
    )
    where = graph_io.describe(culprit) if culprit is not None else "the input itself"
    raise ExportDefectError(
        f"the exporter baked the batch size into the graph, first at {where}", hint=_REPORT
    )


def check_batches(
    graph: Path, model: nn.Module, inputs: npt.NDArray[np.float32], batches: tuple[int, ...] = CHECK_BATCHES
) -> float:
    """Run the graph at other batches than it was traced with, and compare with eager.

    Args:
        inputs: float32 [N, 3, H, W], N at least the largest batch.

    Returns the largest error, relative to the largest logit.

    Raises:
        ExportDefectError: the graph fails at a batch, or gives other logits than eager.
    """
    try:
        engine = OnnxRuntimeEngine(graph, fused=False)
    except BadInputError as error:
        raise ExportDefectError(f"the exported graph does not load: {error}", hint=_REPORT) from error
    worst = 0.0
    for batch in batches:
        with torch.inference_mode():
            wanted = run_eager(model, torch.from_numpy(inputs[:batch]))
        try:
            found = engine.run_all(inputs[:batch])
        except Exception as error:
            raise ExportDefectError(
                f"the exported graph fails at batch {batch}: {error}: a batch is baked in", hint=_REPORT
            ) from error
        if len(found) != len(wanted):
            raise ExportDefectError(
                f"the exported graph has {len(found)} outputs, eager {', '.join(wanted)}", hint=_REPORT
            )
        for (name, tensor), output in zip(wanted.items(), found, strict=True):
            worst = max(worst, _output_error(name, tensor.numpy(), output, batch))
    return worst


def _output_error(
    name: str, eager: npt.NDArray[np.float32], output: npt.NDArray[np.float32], batch: int
) -> float:
    if not np.isfinite(eager).all():
        raise ParityError(
            f"nothing to compare: the eager model's own {name} are not finite",
            hint="check the weights and the preprocessing",
        )
    if output.shape != eager.shape:
        raise ExportDefectError(
            f"the exported graph's {name} are {list(output.shape)} at batch {batch}, eager's "
            f"{list(eager.shape)}: a batch is baked in",
            hint=_REPORT,
        )
    error = float(np.abs(output - eager).max() / (np.abs(eager).max() + 1e-12))
    if not error <= MAX_RELATIVE_ERROR:
        raise ExportDefectError(
            f"the exported graph's {name} differ from eager's at batch {batch}: {error:.2e} of the largest",
            hint=_REPORT,
        )
    return error
