"""Exports an eager PyTorch module to ONNX with a dynamic batch."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import onnx_ir as ir
import torch
from torch import nn

from export_zoo.base import graph_io
from export_zoo.base.errors import BadInputError, ExportDefectError, UsageError
from export_zoo.base.graph_io import MODULE_KEY
from export_zoo.engines.parity.checked_sizes import odd_size
from export_zoo.exporter.models.eager import line_of, run_eager, without_autocast
from export_zoo.exporter.option_values import SizeRange

INPUT, BATCH = "input", "batch"
HEIGHT, WIDTH = "height", "width"
OPSET = 20

_SAMPLE_BATCH = 7
"""Batch size for tracing, never run. It is a prime and no usual channel count, so that a baked-in batch can be
recognized. With a sample batch of 1, the exporter specializes silently."""

_FOLDED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})

REPORT = "this is a defect of the export, not of your input; please report it with the model's name"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what the exporter prints and logs: most of it means nothing to a user."""
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


@contextlib.contextmanager
def _exact_constants() -> Iterator[None]:
    """Let the exporter's optimizer take a constant for 0 or 1 only if it is 0 or 1.

    Its rules drop `x + 0`, and they compare constants with a tolerance: `x + 1e-8`, which keeps a network from dividing
    by zero, would be dropped as well (onnxscript 0.7, rewriter/_pattern_ir.py: `Constant`). The tolerances are private:
    where they are not found, nothing is changed, and the comparison on test patterns shows what the optimizer did.
    """
    from onnxscript import rewriter

    constants = [
        value
        for rule in getattr(rewriter, "_DEFAULT_REWRITE_RULES", ())
        for node in getattr(rule, "_target_pattern", ())
        for value in node.inputs
        if hasattr(value, "_abs_tol") and hasattr(value, "_rel_tol")
    ]
    kept = [(value._abs_tol, value._rel_tol) for value in constants]
    try:
        for value in constants:
            value._abs_tol = value._rel_tol = 0.0
        yield
    finally:
        for value, (absolute, relative) in zip(constants, kept, strict=True):
            value._abs_tol, value._rel_tol = absolute, relative


def export(
    model: nn.Module,
    height: int,
    width: int,
    out: Path,
    *,
    optimize: bool = True,
    outputs: Sequence[str] = ("logits",),
    sizes: SizeRange | None = None,
    own: bool = False,
    channels: int = 3,
    external_threshold: int | None = None,
) -> list[Path]:
    """Export an eval-mode network that takes float32 [N, channels, height, width]; returns the files written.

    The graph's input is `input`, and its outputs have the given names. All have a symbolic first dimension `batch`.
    Nodes carry only the module path as metadata.

    Args:
        optimize: whether the exporter's optimizer folds constants and rewrites the graph.
        sizes: range of the input's height and width, which are then symbolic (`height`, `width`), too.
        own: whether the network is user code. If so, a failure of the exporter is the user's error, not a defect.

    Raises:
        ExportDefectError: the exporter failed, or baked the batch in.
        BadInputError: the model does not take this input size, or not all of these sizes; or the exporter refuses
            user code.
        UsageError: the exporter cannot make height and width dynamic.
    """
    dims = {0: torch.export.Dim(BATCH, min=1)}
    if sizes is None:
        _check_runs(model, (channels, height, width))
    else:
        for axis, name in enumerate((HEIGHT, WIDTH)):
            low, high = sizes.min[axis], sizes.max[axis]
            # After a few strides, a narrow range becomes a single value, which the exporter refuses.
            dims[axis + 2] = torch.export.Dim(name, min=low, max=max(high, 4 * low))
        # Odd numbers that differ are not multiples by chance, and a baked-in size can be recognized by them.
        height, width = odd_size(sizes.min, sizes.max) or sizes.opt
        for size in (sizes.min, sizes.opt, sizes.max):
            _check_runs(model, (channels, *size), sizes)
        _check_runs(
            model,
            (channels, height, width),
            sizes,
            lambda: _why_fixed(model, (channels, *sizes.opt), dims),
        )
    try:
        with _quiet(), _exact_constants(), without_autocast():
            program = torch.onnx.export(
                model,
                (torch.zeros(_SAMPLE_BATCH, channels, height, width),),
                dynamo=True,
                optimize=optimize,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[f"output:{index}" for index in range(len(outputs))],
                dynamic_shapes=(dims,),
            )
        assert program is not None
    except Exception as error:
        if sizes is not None:
            raise _one_size_only(model, (channels, height, width), dims) from error
        text = _reason(error)
        if own:
            line = line_of(_root(error))
            raise BadInputError(
                f"torch.onnx.export refuses the network{f' at {line}' if line else ''}: {text}",
                hint="compute the same steps for all images: choose between values with torch.where, not with `if`, "
                "keep values in tensors (no .item(), int() or float()), and use no TorchScript"
                + ("" if line else "; `torch.export.export(network, (images,))` shows where it fails"),
            ) from error
        raise ExportDefectError(f"torch.onnx.export failed: {text}", hint=REPORT) from error
    graph = program.model
    _name_outputs(graph.graph, outputs)
    _strip_metadata(graph, dict(model.named_modules()))
    check_dynamic_batch(graph, own=own)
    if sizes is not None and not all(isinstance(size, ir.SymbolicDim) for size in _sizes_of(graph)):
        raise _one_size_only(model, (channels, height, width), dims)
    return graph_io.save(graph, out, external_threshold=external_threshold)


def _name_outputs(graph: ir.Graph, names: Sequence[str]) -> None:
    """Name the outputs. An inner value that already has such a name is renamed."""
    inside = {str(value.name): value for node in graph for value in node.outputs}
    for output, name in zip(graph.outputs, names, strict=True):
        if name in inside:
            inside[name].name = f"{name}:inside"
        output.name = name


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error: BaseException) -> str:
    """First line of the root cause; the exporter's own message only describes its steps."""
    text = click.unstyle(str(_root(error))).strip().splitlines()
    return text[0] if text else type(error).__name__


Shape = tuple[int, int, int]
"""Channels, height and width of an image."""


def _check_runs(
    model: nn.Module, shape: Shape, sizes: SizeRange | None = None, why: Callable[[], str] = str
) -> None:
    """Refuse a size at which the model does not run. `why` gives more reasons for a size between others that run."""
    with torch.inference_mode():
        try:
            run_eager(model, torch.zeros(1, *shape))
        except Exception as error:
            text = f"the model does not run at input {shape[1]}x{shape[2]}"
            if sizes is None:
                raise BadInputError(f"{text}: {error}", hint="choose another --input-size") from error
            reason = "; ".join(filter(None, (str(error), why())))
            raise BadInputError(
                f"{text}, which lies in --dynamic-size {sizes}: {reason}",
                hint="every size from MIN to MAX must run: choose another MIN, or one --input-size if the model takes "
                "only multiples of some number",
            ) from error


def _one_size_only(model: nn.Module, shape: Shape, dims: dict[int, Any]) -> UsageError:
    reason = _why_fixed(model, shape, dims) or "no reason is given"
    return UsageError(
        f"--dynamic-size: the exporter cannot make height and width dynamic: {reason}",
        hint="use --input-size, with one bundle for each size",
    )


def _why_fixed(model: nn.Module, shape: Shape, dims: dict[int, Any]) -> str:
    """The reason in one line why torch.export cannot keep the sizes dynamic, with the module if it is known; empty if
    torch.export gives no reason."""
    entered = [""]

    def enter(path: str) -> Callable[..., None]:
        return lambda *_: entered.append(path)

    hooks = [module.register_forward_pre_hook(enter(path)) for path, module in model.named_modules()]
    try:
        with _quiet():
            torch.export.export(
                model, (torch.zeros(_SAMPLE_BATCH, *shape),), dynamic_shapes=(dims,), strict=False
            )
    except torch._dynamo.exc.UserError as error:  # raised after tracing: no module is known
        text = re.sub(r"L\['\w+'\]\.size\(\)\[(\d)\]", lambda m: (HEIGHT, WIDTH)[int(m[1]) - 2], str(error))
        fixes = re.findall(rf"^\s*((?:{HEIGHT}|{WIDTH}) = .+)$", text, flags=re.MULTILINE)
        guard = re.search(r"satisfy the generated guard (.+)\.$", text, flags=re.MULTILINE)
        if fixes:
            return f"torch.export takes {', '.join(fixes)} only".replace(f"_{HEIGHT}", "n").replace(
                f"_{WIDTH}", "n"
            )
        return f"torch.export asks for {guard[1]}" if guard is not None else text.splitlines()[0]
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"module {entered[-1] or type(model).__name__}: {lines[0]}"
    finally:
        for hook in hooks:
            hook.remove()
    return ""


def _sizes_of(model: ir.Model) -> list[int | ir.SymbolicDim]:
    """Height and width of the input."""
    shape = model.graph.inputs[0].shape
    assert shape is not None
    return [shape[2], shape[3]]


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
    """Path of the module that a node comes from: the innermost of its scopes that is the name of a module.

    A convolution with a folded BatchNormalization has the scope `...bn1`, so its weight's name is used instead. Other
    operators' weights are no guide: the exporter lets layers with equal weights (all normalizations, at first) share
    one.
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


def check_dynamic_batch(model: ir.Model, *, own: bool = False) -> None:
    """The input's and the outputs' first dimension must be symbolic.

    Args:
        own: whether the network is user code.

    Raises:
        ExportDefectError: names the first node that has a constant batch.
        BadInputError: the same for user code.
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
    if own:
        raise BadInputError(
            f"the network's code makes the number of images a constant, first at {where}",
            hint="compute over the whole batch at once: a Python loop over the images, or a size taken with int() or "
            "len(), becomes a constant",
        )
    raise ExportDefectError(
        f"the exporter baked the batch size into the graph, first at {where}", hint=REPORT
    )
