"""Writes a bundle's engine as a model of a Triton Inference Server repository.

    REPOSITORY/<name>/config.pbtxt
    REPOSITORY/<name>/labels.txt
    REPOSITORY/<name>/<version>/model.onnx or model.plan

Source: NVIDIA Triton Inference Server, "Model Repository" and "Model Configuration" of the user guide.
"""

from __future__ import annotations

import re
import shutil
import uuid
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from export_zoo.base import graph_io
from export_zoo.base.errors import (
    BadInputError,
    EnvironmentFailureError,
    ParityError,
    TargetUnavailableError,
    UsageError,
)
from export_zoo.engines.bundle import manifest as m
from export_zoo.engines.bundle.reader import attestations, check_weights, checked, named, read_manifest
from export_zoo.engines.bundle.selection import fastest_first, not_verified, speeds, standing
from export_zoo.engines.precision.int8.saturation.pairs import saturating_layers
from export_zoo.engines.precision.int8.saturation.unsigned import unsigned_weights
from export_zoo.engines.precision.registry import PRECISIONS
from export_zoo.engines.targets.registry import TARGETS

CpuGraph = Literal["safe", "exact", "vnni"]

QUEUE_DELAY_US = 1000
"""Microseconds that a request waits for other requests to form a batch."""

_MAX_VERSION = 2**63 - 1
"""Largest version number; Triton stores it in 64 bits."""


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


def _served() -> str:
    """Names of the targets whose engines Triton can run, for messages."""
    return " or ".join(target.name for target in TARGETS.values() if target.triton)


def _chosen(bundle: Path, manifest: m.Manifest, wanted: str | None) -> m.Engine:
    """The engine named `wanted`. Without a name, the fastest verified engine that Triton can run."""
    batch = manifest.recipe.batch
    if batch.min > 1:
        raise TargetUnavailableError(
            f"{bundle}: verified at batches {batch.min} to {batch.max}, but Triton runs a single request at batch 1",
            hint=f"export with --batch 1:{batch.opt}:{batch.max}",
        )
    if wanted is not None:
        try:
            engine = named(bundle, manifest, wanted)
        except BadInputError as error:
            raise UsageError(
                f"--engine {wanted}: {bundle} has no engine of that name", hint=error.hint
            ) from error
        if TARGETS[engine.target].triton is None:
            raise TargetUnavailableError(
                f"--engine {wanted}: Triton has no backend for {engine.target}",
                hint=f"use an engine of {_served()}",
            )
        if engine.without_weights:
            raise TargetUnavailableError(
                f"--engine {wanted}: its plan has no weights, and Triton does not refit plans",
                hint="export without --strip-weights, or use an engine of onnxruntime",
            )
        return engine
    attested = attestations(bundle)
    served = [e for e in manifest.artifacts.engines if TARGETS[e.target].triton and not e.without_weights]
    standings = {e.name: standing(e, attested) for e in served}
    verified = [e for e in served if standings[e.name].state == "verified"]
    if not verified:
        listed = "; ".join(f"{name}: {not_verified(found)}" for name, found in standings.items())
        raise TargetUnavailableError(
            f"{bundle}: no verified engine of {_served()} that contains its weights"
            + (f": {listed}" if listed else ""),
            hint="choose an engine with --engine, or export with --target onnxruntime",
        )
    return fastest_first(verified, speeds(verified, attested))[0]


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
    manifest = read_manifest(bundle)
    if manifest.status != "ok":
        raise ParityError(f"{bundle}: this bundle failed its parity gate", hint="export it again")
    chosen = _chosen(bundle, manifest, engine)
    name = name if name is not None else manifest.recipe.source.name
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{,199}", name):
        raise UsageError(
            f"--name {name!r}: must be 1 to 200 letters, digits, _, - and ., and not begin with - or .",
            hint="use a name such as resnet50-int8",
        )
    if not 1 <= version <= _MAX_VERSION:
        raise UsageError(
            f"--version {version}: must be 1 to {_MAX_VERSION}", hint="leave out --version to use 1"
        )
    backend = TARGETS[chosen.target].triton
    assert backend is not None
    model_file = backend.file
    files = {model_file: checked(bundle, chosen.file)}
    # External weights of an ONNX file keep their file name, because the ONNX file refers to it.
    files |= {Path(file.path).name: checked(bundle, file) for file in chosen.external_data}
    if chosen.graph is None:
        check_weights(bundle, *chosen.precision_graph())
    rewritten = _for_cpus(bundle, chosen, files[model_file], cpu_graph)
    described = {"config.pbtxt": config(manifest, chosen, name, delay_us=delay_us)}
    if manifest.recipe.labels:
        described["labels.txt"] = "".join(f"{label}\n" for label in manifest.recipe.labels)
    model = repository / name
    _refuse_other(model, described, version)
    temporary = repository / f".{name}.{uuid.uuid4().hex}"
    try:
        (temporary / str(version)).mkdir(parents=True)
        if rewritten is not None:
            graph_io.save(rewritten, temporary / str(version) / model_file)
        else:
            for file, path in files.items():
                shutil.copyfile(path, temporary / str(version) / file)
        if model.exists():
            (temporary / str(version)).rename(model / str(version))
        else:
            for file, text in described.items():
                (temporary / file).write_text(text, encoding="utf-8")
            temporary.rename(model)
    except OSError as error:
        raise EnvironmentFailureError(
            f"{repository}: cannot be written: {error.strerror}", hint="give a writable directory"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return model


def _refuse_other(model: Path, described: dict[str, str], version: int) -> None:
    if not model.exists():
        return
    if (model / str(version)).exists():
        raise UsageError(f"{model}/{version}: already exists", hint="give another --version or --name")
    if not (model / "config.pbtxt").is_file():
        raise UsageError(f"{model}: exists, but is not a Triton model", hint="give another --name")
    for file, text in described.items():
        if not (model / file).is_file() or (model / file).read_text(encoding="utf-8") != text:
            raise UsageError(
                f"{model}/{file}: differs from this engine's configuration",
                hint="give another --name: all versions of a model share one configuration",
            )
