"""Writes a bundle's engine as a model of a Triton Inference Server repository.

    REPOSITORY/<name>/config.pbtxt
    REPOSITORY/<name>/labels.txt
    REPOSITORY/<name>/<version>/model.onnx or model.plan

Source: NVIDIA Triton Inference Server, "Model Repository" and "Model Configuration" of the user guide.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import onnx_ir as ir

from export_zoo.base import graph_io
from export_zoo.base.errors import TargetUnavailableError, UsageError
from export_zoo.engines.bundle import manifest as m
from export_zoo.engines.bundle.model_repository import (
    Server,
    add_version,
    check_version,
    checked_files,
    checked_name,
    chosen,
    copied,
    servable,
)
from export_zoo.engines.precision.int8.saturation.pairs import saturating_layers
from export_zoo.engines.precision.int8.saturation.unsigned import unsigned_weights
from export_zoo.engines.precision.registry import PRECISIONS
from export_zoo.engines.targets.registry import TARGETS

CpuGraph = Literal["safe", "exact", "vnni"]

QUEUE_DELAY_US = 1000
"""Microseconds that a request waits for other requests to form a batch."""

TRITON = Server("Triton", lambda target: target.triton is not None)


def _quoted(text: str) -> str:
    """Quote text as a string literal of protobuf's text format."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def config(manifest: m.Manifest, engine: m.Engine, name: str, *, delay_us: int = QUEUE_DELAY_US) -> str:
    """The text of config.pbtxt.

    Shapes have no batch dimension, because Triton adds it. Dynamic batching goes up to the largest verified batch.
    """
    recipe, backend = manifest.recipe, TARGETS[engine.target].triton
    assert backend is not None

    def port(port: m.Port, more: str = "") -> str:
        dims = ", ".join("-1" if isinstance(size, str) else str(size) for size in port.shape[1:])
        if not dims:  # Triton has no outputs without dimensions beside the batch
            dims, more = "1", more + "    reshape: { shape: [ ] }\n"
        return f"  {{\n    name: {_quoted(port.name)}\n    data_type: TYPE_FP32\n    dims: [ {dims} ]\n{more}  }}\n"

    # Triton labels values by their position: a binary output has one value and two labels.
    labelled = len(recipe.labels) == recipe.output.head.classes
    labels = '    label_filename: "labels.txt"\n' if labelled else ""
    text = (
        f"name: {_quoted(name)}\nplatform: {_quoted(backend.platform)}\nmax_batch_size: {recipe.batch.max}\n"
    )
    outputs = [port(recipe.output, labels), *map(port, recipe.further_outputs)]
    text += f"input [\n{port(recipe.input)}]\noutput [\n{','.join(outputs)}]\n"
    text += f"instance_group [\n  {{\n    count: 1\n    kind: {backend.kind}\n  }}\n]\n"
    if recipe.batch.max > 1:
        text += (
            f"dynamic_batching {{\n  preferred_batch_size: [ {recipe.batch.opt} ]\n"
            f"  max_queue_delay_microseconds: {delay_us}\n}}\n"
        )
    return text


def _for_cpus(bundle: Path, engine: m.Engine, graph: Path, cpu_graph: CpuGraph) -> ir.Model | None:
    """The graph to write in place of the engine's; None if the engine is written unchanged.

    Raises:
        UsageError: `cpu_graph` is `exact`, and the engine is not ONNX Runtime's INT8.
        TargetUnavailableError: `cpu_graph` is `safe`, and the engine can saturate.
    """
    int8 = TARGETS[engine.target].int8.sums_in_16_bits and PRECISIONS[engine.precision].integer_sums
    if cpu_graph == "exact":
        if not int8:
            raise UsageError(
                f"--cpu-graph exact: only for INT8 of onnxruntime, not for {engine.name}",
                hint="leave out --cpu-graph",
            )
        model = graph_io.load(graph)
        unsigned_weights(model.graph)
        return model
    if cpu_graph == "safe" and int8 and saturating_layers(graph_io.load(graph).graph):
        raise TargetUnavailableError(
            f"{bundle}: {engine.name} was made by an earlier version: on CPUs without VNNI its sums saturate, and its "
            "logits are wrong",
            hint="export the bundle again; otherwise use --cpu-graph exact (uint8 weights, slower on CPUs with VNNI), "
            "or --cpu-graph vnni if all servers have VNNI",
        )
    return None


def write_repository(
    bundle: Path,
    repository: Path,
    *,
    engine: str | None = None,
    name: str | None = None,
    version: int = 1,
    delay_us: int = QUEUE_DELAY_US,
    cpu_graph: CpuGraph = "safe",
) -> Path:
    """Add an engine to a Triton model repository, completely or not at all. Returns the model's directory.

    Args:
        engine: name of the engine. Default: the fastest verified engine, as for `load` with `measure=False`.
        name: name of the model. Default: the network's name.
        version: version number of the model, and name of its folder. All versions of a model must have the same
            configuration.
        delay_us: microseconds that a request waits for other requests.
        cpu_graph: graph to write for ONNX Runtime's INT8 engine, because Triton gives sessions no configuration. `safe`
            writes the engine itself, and refuses an engine that can saturate. `exact` writes uint8 weights, which do
            not saturate on any CPU. `vnni` writes the engine itself, for CPUs that do not saturate.

    Raises:
        UsageError: Triton does not accept the name or version, the version already exists, or there is no such engine.
        BadInputError: `bundle` is not a bundle, or is damaged.
        ParityError: the bundle failed its parity gate.
        TargetUnavailableError: Triton can serve no engine of the bundle, or the engine can saturate.
        EnvironmentFailureError: the repository cannot be written to.
    """
    manifest = servable(bundle)
    batch = manifest.recipe.batch
    if batch.min > 1:
        raise TargetUnavailableError(
            f"{bundle}: verified at batches {batch.min} to {batch.max}, but Triton runs a single request at batch 1",
            hint=f"export with --batch 1:{batch.opt}:{batch.max}",
        )
    served = chosen(bundle, manifest, engine, TRITON)
    name = checked_name(name, manifest)
    check_version(version)
    backend = TARGETS[served.target].triton
    assert backend is not None
    files = checked_files(bundle, served, backend.file)
    rewritten = _for_cpus(bundle, served, files[backend.file], cpu_graph)
    described = {"config.pbtxt": config(manifest, served, name, delay_us=delay_us)}
    if manifest.recipe.labels:
        described["labels.txt"] = "".join(f"{label}\n" for label in manifest.recipe.labels)

    def write(folder: Path) -> None:
        if rewritten is not None:
            graph_io.save(rewritten, folder / backend.file)
        else:
            copied(files)(folder)

    model = repository / name
    add_version(model, version, write, described=described, server=TRITON)
    return model
