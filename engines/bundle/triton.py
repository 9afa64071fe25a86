"""A bundle's engine as a model of a Triton Inference Server repository.

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
from export_zoo.engines.bundle.reader import attestations, checked, named, read_manifest
from export_zoo.engines.bundle.selection import not_verified, rank, standing
from export_zoo.engines.precision.int8.saturation.pairs import saturating_layers
from export_zoo.engines.precision.int8.saturation.unsigned import unsigned_weights
from export_zoo.engines.precision.registry import PRECISIONS
from export_zoo.engines.targets.registry import TARGETS

CpuGraph = Literal["safe", "exact", "vnni"]

QUEUE_DELAY_US = 1000
"""Microseconds that a request waits for others to make a batch with."""

_MAX_VERSION = 2**63 - 1
"""Triton reads it into 64 bits."""


def _quoted(text: str) -> str:
    """A string literal of protobuf's text format."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def config(manifest: m.Manifest, engine: m.Engine, name: str, *, delay_us: int = QUEUE_DELAY_US) -> str:
    """config.pbtxt: shapes without the batch, which Triton adds, and dynamic batching up to the verified batch."""
    recipe, backend = manifest.recipe, TARGETS[engine.target].triton
    assert backend is not None

    def port(port: m.Port, more: str = "") -> str:
        dims = ", ".join("-1" if isinstance(size, str) else str(size) for size in port.shape[1:])
        return f"  {{\n    name: {_quoted(port.name)}\n    data_type: TYPE_FP32\n    dims: [ {dims} ]\n{more}  }}\n"

    labels = '    label_filename: "labels.txt"\n' if recipe.labels else ""
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
    """Targets whose engines Triton runs, for messages."""
    return " or ".join(target.name for target in TARGETS.values() if target.triton)


def _chosen(bundle: Path, manifest: m.Manifest, wanted: str | None) -> m.Engine:
    """The engine that is asked for, or the fastest verified one that Triton can run."""
    batch = manifest.recipe.batch
    if batch.min > 1:
        raise TargetUnavailableError(
            f"{bundle}: verified at batches {batch.min} to {batch.max}, and Triton runs a lone request at 1",
            hint=f"export with --batch 1:{batch.opt}:{batch.max}",
        )
    if wanted is not None:
        try:
            engine = named(bundle, manifest, wanted)
        except BadInputError as error:
            raise UsageError(f"--engine {wanted}: {bundle} has none of that name", hint=error.hint) from error
        if TARGETS[engine.target].triton is None:
            raise TargetUnavailableError(
                f"--engine {wanted}: Triton has no backend for {engine.target}",
                hint=f"use an engine of {_served()}",
            )
        if engine.without_weights:
            raise TargetUnavailableError(
                f"--engine {wanted}: its plan has no weights, and Triton does not refit it",
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
            f"{bundle}: no verified engine of {_served()} that has its weights"
            + (f": {listed}" if listed else ""),
            hint="name one with --engine, or export with --target onnxruntime",
        )
    return max(verified, key=rank)


def _for_cpus(bundle: Path, engine: m.Engine, graph: Path, cpu_graph: CpuGraph) -> ir.Model | None:
    """What is written instead of an engine; None where it is written as it is.

    Raises:
        UsageError: there is nothing to make exact.
        TargetUnavailableError: it can saturate.
    """
    int8 = TARGETS[engine.target].int8.sums_in_16_bits and PRECISIONS[engine.precision].integer_sums
    if cpu_graph == "exact":
        if not int8:
            raise UsageError(
                f"--cpu-graph exact: is for INT8 of onnxruntime, not for {engine.name}", hint="leave it out"
            )
        model = graph_io.load(graph)
        unsigned_weights(model.graph)
        return model
    if cpu_graph == "safe" and int8 and saturating_layers(graph_io.load(graph).graph):
        raise TargetUnavailableError(
            f"{bundle}: {engine.name} was made by an earlier version: on CPUs without VNNI its sums saturate, and its "
            "logits are wrong",
            hint="export the bundle again; or --cpu-graph exact (uint8 weights, slower where there is VNNI), or "
            "--cpu-graph vnni where all servers have it",
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
    """Add an engine to a Triton model repository, whole or not at all; returns the model's directory.

    Args:
        engine: its name; default the fastest verified one, by the manifest and what `verify` attested on a machine
            like this one.
        name: of the model; default the network's.
        version: its folder. Another version of a model that is there must have the same configuration.
        delay_us: microseconds that a request waits for others.
        cpu_graph: what ONNX Runtime's INT8 engine becomes, for Triton gives sessions no configuration: `safe`, the
            engine itself, refused where it can saturate; `exact`, with uint8 weights, which no CPU saturates; `vnni`,
            the engine itself, for CPUs that do not saturate.

    Raises:
        UsageError: a name or version that Triton does not take, or that is there already; or no such engine.
        BadInputError: not a bundle, or damaged.
        ParityError: the bundle failed its parity gate.
        TargetUnavailableError: no engine that Triton can serve, or one that can saturate.
        EnvironmentFailureError: the repository cannot be written to.
    """
    manifest = read_manifest(bundle)
    if manifest.status != "ok":
        raise ParityError(f"{bundle}: this bundle failed its parity gate", hint="export it again")
    chosen = _chosen(bundle, manifest, engine)
    name = name if name is not None else manifest.recipe.source.name
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{,199}", name):
        raise UsageError(
            f"--name {name!r}: at most 200 letters, digits, _, - and .", hint="for example resnet50-int8"
        )
    if not 1 <= version <= _MAX_VERSION:
        raise UsageError(f"--version {version}: must be 1 to {_MAX_VERSION}", hint="leave it out for 1")
    backend = TARGETS[chosen.target].triton
    assert backend is not None
    model_file = backend.file
    files = {model_file: checked(bundle, chosen.file)}
    # Weights beside an ONNX file keep the name that it refers to.
    files |= {Path(file.path).name: checked(bundle, file) for file in chosen.external_data}
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
            f"{repository}: cannot be written: {error.strerror}", hint="give a directory that is writable"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return model


def _refuse_other(model: Path, described: dict[str, str], version: int) -> None:
    if not model.exists():
        return
    if (model / str(version)).exists():
        raise UsageError(f"{model}/{version}: is there already", hint="give another --version or --name")
    if not (model / "config.pbtxt").is_file():
        raise UsageError(f"{model}: is there, and is no model of Triton's", hint="give another --name")
    for file, text in described.items():
        if not (model / file).is_file() or (model / file).read_text(encoding="utf-8") != text:
            raise UsageError(
                f"{model}/{file}: of another configuration than this engine's",
                hint="versions of a model share it: give another --name",
            )
