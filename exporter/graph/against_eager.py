"""Compares an exported graph with eager PyTorch, at batch sizes other than the traced one and on test patterns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from export_zoo.base.errors import BadInputError, ExportDefectError, ParityError
from export_zoo.calibration.synthetic import TEST_PATTERNS
from export_zoo.engines.parity.metrics import relative_errors
from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine
from export_zoo.exporter.graph.culprit import first_different_module
from export_zoo.exporter.graph.to_onnx import REPORT
from export_zoo.exporter.models.eager import AMPLIFIES, rounding_error, run_eager

CHECK_BATCHES = (1, 3)
"""Batch sizes at which the exported graph is compared with eager; neither is the sample batch."""

MAX_RELATIVE_ERROR = 1e-3

_AMPLIFIED = 1e-2
"""From this `rounding_error` on, a difference comes from the network, not from the export."""


def check_batches(
    graph: Path,
    model: nn.Module,
    inputs: npt.NDArray[np.float32],
    batches: tuple[int, ...] = CHECK_BATCHES,
    *,
    follows: bool = False,
) -> float:
    """Run the graph at batch sizes other than the traced one, and compare with eager.

    Args:
        inputs: float32 [N, channels, H, W], N at least the largest batch.
        follows: whether per-pixel outputs must be as large as the input, as the manifest of a dynamic size says.

    Returns the largest error, relative to the largest logit.

    Raises:
        BadInputError: an output does not follow the input's size.
        ExportDefectError: the graph fails at a batch, or gives other logits than eager.
    """
    try:
        engine = OnnxRuntimeEngine(graph, fused=False)
    except BadInputError as error:
        raise ExportDefectError(f"the exported graph does not load: {error}", hint=REPORT) from error
    worst = 0.0
    size = f"at input {inputs.shape[2]}x{inputs.shape[3]}"
    for batch in batches:
        with torch.inference_mode():
            wanted = run_eager(model, torch.from_numpy(inputs[:batch]))
        for name, tensor in wanted.items():
            if follows and tensor.ndim == 4 and tensor.shape[2:] != inputs.shape[2:]:
                raise BadInputError(
                    f"--dynamic-size: at {inputs.shape[2]}x{inputs.shape[3]}, output {name} is "
                    f"{tensor.shape[2]}x{tensor.shape[3]}",
                    hint="use --input-size, with one bundle for each size",
                )
        try:
            found = engine.run_all(inputs[:batch])
        except Exception as error:
            raise ExportDefectError(
                f"the exported graph fails at batch {batch}: {error}: a batch is baked in ({size})",
                hint=REPORT,
            ) from error
        if len(found) != len(wanted):
            raise ExportDefectError(
                f"the exported graph has {len(found)} outputs, eager {', '.join(wanted)}", hint=REPORT
            )
        for (name, tensor), output in zip(wanted.items(), found, strict=True):
            try:
                found_error = _output_error(name, tensor.numpy(), output, f"at batch {batch}, {size}")
            except ExportDefectError as error:
                if (
                    output.shape == tensor.shape
                    and rounding_error(model, torch.from_numpy(inputs)) > _AMPLIFIED
                ):
                    raise BadInputError(
                        f"{error.message}; eager's own {name} are as far apart in float32 and in float64",
                        hint=AMPLIFIES,
                    ) from error
                raise
            worst = max(worst, found_error)
    return worst


def difference_on_test_patterns(graph: Path, model: nn.Module, inputs: npt.NDArray[np.float32]) -> str:
    """Describes how a graph differs from eager on images unlike photographs; empty if it does not.

    Images for which eager's own outputs are not finite are left out.

    Args:
        inputs: `test_patterns` after normalization, float32 [6, channels, H, W].
    """
    with torch.inference_mode():
        wanted = run_eager(model, torch.from_numpy(inputs))
    found = OnnxRuntimeEngine(graph, fused=False).run_all(inputs)
    for (name, tensor), output in zip(wanted.items(), found, strict=True):
        errors = relative_errors(tensor.numpy(), output)
        worst = int(np.argmax(errors))
        if errors[worst] > MAX_RELATIVE_ERROR:
            off = errors[worst]
            what = (
                f"differ from eager's by {off:.1e} of the largest" if np.isfinite(off) else "are not finite"
            )
            module = first_different_module(graph, model, inputs[worst : worst + 1])
            where = f", first seen in the output of module {module}" if module else ""
            return f"on the test pattern {TEST_PATTERNS[worst]!r}, {name} {what}{where}"
    return ""


def _output_error(
    name: str, eager: npt.NDArray[np.float32], output: npt.NDArray[np.float32], where: str
) -> float:
    if not np.isfinite(eager).all():
        raise ParityError(
            f"nothing to compare: the eager model's own {name} are not finite",
            hint="check the weights and the preprocessing",
        )
    if output.shape != eager.shape:
        raise ExportDefectError(
            f"the exported graph's {name} are {list(output.shape)} {where}, eager's {list(eager.shape)}: a batch "
            "is baked in",
            hint=REPORT,
        )
    error = float(np.abs(output - eager).max() / (np.abs(eager).max() + 1e-12))
    if not error <= MAX_RELATIVE_ERROR:
        raise ExportDefectError(
            f"the exported graph's {name} differ from eager's {where}: {error:.2e} of the largest",
            hint=REPORT,
        )
    return error
