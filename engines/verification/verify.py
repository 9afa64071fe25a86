"""Verifies a bundle on any machine: checks hashes and logits, and writes an attestation of the results."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import numpy.typing as npt

from export_zoo.base import graph_io
from export_zoo.base.cuda import device_capability
from export_zoo.base.errors import TargetUnavailableError
from export_zoo.base.files import replacing
from export_zoo.base.graph_io import sha256_of
from export_zoo.base.machine import cpu_model, instruction_set, library_versions
from export_zoo.calibration.images import Progress
from export_zoo.calibration.preprocess import Pixels
from export_zoo.engines.bundle import manifest as m
from export_zoo.engines.bundle.opening import opening_of
from export_zoo.engines.bundle.reader import (
    ATTESTATIONS,
    MANIFEST,
    HeldOut,
    check_files,
    held_out,
    read_manifest,
)
from export_zoo.engines.parity.limits import fitting
from export_zoo.engines.parity.sums import Sums
from export_zoo.engines.parity.tasks import TASKS, Head
from export_zoo.engines.precision.int8.saturation.pairs import saturating_layers
from export_zoo.engines.precision.int8.saturation.probe import saturates
from export_zoo.engines.precision.registry import BASELINE, PRECISIONS
from export_zoo.engines.precision.twin import write_twin
from export_zoo.engines.targets.base import Opening, Runner
from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine
from export_zoo.engines.targets.plan import Plan
from export_zoo.engines.targets.registry import TARGETS
from export_zoo.engines.verification.gate import Patterns, judge, run_in_batches
from export_zoo.engines.verification.latency import TimedEngine, measure_latencies

Float32Array = npt.NDArray[np.float32]


def plain_outputs(
    graph: Path, recipe: m.Recipe, *, half: bool
) -> Callable[[Pixels], tuple[Float32Array, ...]]:
    """A function that computes a precision graph's outputs unfused, Q/DQ pairs one by one.

    See `verification.gate.judge`.
    """

    def outputs(pixels: Pixels) -> tuple[Float32Array, ...]:
        plain = OnnxRuntimeEngine(graph, fused=False, half=half)
        return run_in_batches(plain, pixels, recipe.preprocess, recipe.batch.opt)

    return outputs


def opened(target: str, opening: Opening, *, only_graph: bool) -> Runner:
    """An engine, or its precision graph if the engine cannot run on this machine."""
    if not only_graph:
        return TARGETS[target].open(opening)
    assert opening.graph is not None
    with tempfile.TemporaryDirectory(prefix="export-zoo-") as directory:
        twin = write_twin(opening.graph, Path(directory) / "twin.onnx", dequantized=True)
        return OnnxRuntimeEngine(twin, fused=False, threads=opening.threads)


def judge_engine(
    file: Path,
    graph: Path,
    *,
    target: str,
    precision: str,
    plan: Plan | None,
    saturating_session: Mapping[str, str],
    unfused: bool,
    recipe: m.Recipe,
    held: HeldOut,
    tolerances: dict[str, float],
    whole: Mapping[str, Sums] | None = None,
    progress: Progress = lambda _: None,
) -> m.Gate:
    """Run the parity gate on one engine, or on its precision graph if the engine cannot run on this machine.

    Args:
        file: the engine.
        graph: the precision graph that TensorRT compiled; for ONNX Runtime, the engine itself.
        saturating_session: see `bundle.manifest.Engine.session_where_saturating`.
        unfused, whole: see `verification.gate.judge`.
    """
    only_graph = bool(TARGETS[target].why_not_run(PRECISIONS[precision], plan))
    opening = Opening(file, PRECISIONS[precision], plan, graph, saturating_session=saturating_session)
    engine = opened(target, opening, only_graph=only_graph)
    return judge(
        engine,
        ran="precision graph" if only_graph else "engine",
        pixels=held.pixels,
        eager=held.outputs(recipe),
        heads=recipe.heads,
        labels=held.labels,
        preprocess=recipe.preprocess,
        batch=recipe.batch,
        tolerances=tolerances,
        unfused=plain_outputs(graph, recipe, half=PRECISIONS[precision].float16) if unfused else None,
        sizes=[(part.pixels, part.outputs(recipe)) for part in held.sizes],
        patterns=_patterns(
            recipe, held, tolerances.get("sqnr") if PRECISIONS[precision] is BASELINE else None
        ),
        whole=whole,
        progress=progress,
    )


def _patterns(recipe: m.Recipe, held: HeldOut, min_sqnr: float | None) -> Patterns | None:
    """The test patterns for the gate; None if the bundle has none."""
    found = held.patterns
    return Patterns(found.names, found.pixels, found.outputs(recipe), min_sqnr) if found is not None else None


def verify(
    bundle: Path | str, *, latencies: bool = True, progress: Progress = lambda _: None
) -> tuple[m.Attestation, Path | None]:
    """Check every hash of a bundle and every engine's logits on this machine; write an attestation.

    The engines that run here are timed as well, so that `load` knows the fastest one on machines like this one.

    Returns the attestation and its path. The path is None if the bundle cannot be written to. The attestation's
    `status` is `failed` if a gate failed. No error is raised for a failed gate: the caller decides what to do.

    Args:
        latencies: whether to time the engines, about two seconds each.

    Raises:
        BadInputError: not a bundle, or damaged.
        TargetUnavailableError: this machine can run none of the engines. One of several is left out, with a warning:
            for example, INT8 of an earlier version that saturates on this CPU and cannot be run exactly.
    """
    root = Path(bundle)
    manifest = read_manifest(root)
    check_files(root, manifest)
    held = held_out(root, manifest)
    warnings = [f"{name}: not run, this version does not know it" for name in manifest.unknown_engines]
    gates: dict[str, m.Gate] = {}
    states: dict[str, m.State] = {}
    not_run: list[TargetUnavailableError] = []
    for engine in manifest.artifacts.engines:
        session = engine.session_where_saturating()
        if (
            session
            and TARGETS[engine.target].int8.sums_in_16_bits
            and saturates()
            and can_saturate(root / engine.file.path, engine.target)
        ):
            warnings.append(
                f"{engine.name}: sums of INT8 saturate on this CPU; it runs with "
                f"{', '.join(f'{key}={value}' for key, value in session.items())}, which is exact but slower than a "
                "graph that cannot saturate: export the bundle again"
            )
        try:
            gate = judge_engine(
                root / engine.file.path,
                root / (engine.graph or engine.file).path,
                target=engine.target,
                precision=engine.precision,
                plan=engine.plan,
                saturating_session=session,
                unfused=engine.gate.reference != "eager",
                recipe=manifest.recipe,
                held=held,
                tolerances=_tolerances(engine.gate, manifest.recipe.output.head, len(held.pixels)),
                progress=progress,
            )
        except TargetUnavailableError as error:
            warnings.append(f"{engine.name}: not run: {error.message}")
            not_run.append(error)
            continue
        gates[engine.name] = gate = with_claim(gate, engine, root / engine.file.path)
        states[engine.name] = m.state_after(gate)
    if not_run and not gates:
        raise not_run[0]
    ran = [e for e in manifest.artifacts.engines if e.name in gates and gates[e.name].ran == "engine"]
    timed = {engine.name: TimedEngine(engine.target, opening_of(root, engine)) for engine in ran}
    graph, recipe = root / manifest.recipe.graph.path, manifest.recipe
    attestation = attested(
        root,
        gates,
        states,
        machine=cpu_model(),
        instruction_set=instruction_set(),
        compute_capability=device_capability(),
        versions=library_versions(*(target.distribution for target in TARGETS.values()), "numpy", "pillow"),
        warnings=warnings,
        latencies=measure_latencies(timed, graph, recipe, held.pixels) if latencies and timed else {},
    )
    return attestation, write_attestation(root, attestation)


def _tolerances(gate: m.Gate, head: Head, images: int) -> dict[str, float]:
    """Limits of a gate that `images` images can be judged by.

    Of a task of a later version, only those on metrics of all outputs can be applied. If the gate had more images than
    the bundle, a limit that accuracy meets on all of them need not hold on these.
    """
    limits = gate.tolerances if head.task in TASKS else fitting(gate.tolerances, head)
    if (gate.metrics.get("images") or 0) <= images:
        return limits
    return {metric: value for metric, value in limits.items() if "accuracy" not in metric}


def with_claim(gate: m.Gate, engine: m.Engine, graph: Path) -> m.Gate:
    """The gate of an engine, with a failure added if the manifest says that it cannot saturate but its weights can.

    Its logits may be right on this CPU and wrong on others.
    """
    integer_sums = PRECISIONS[engine.precision].integer_sums and TARGETS[engine.target].int8.sums_in_16_bits
    claims = integer_sums and engine.saturating_cpu_session == {}
    if not claims or not can_saturate(graph, engine.target):
        return gate
    failure = (
        "the manifest says that sums of INT8 cannot saturate, but these weights can: export the bundle again"
    )
    return gate.model_copy(update={"failures": [*gate.failures, failure]})


def can_saturate(graph: Path, target: str) -> bool:
    """Whether a graph has weights whose products overflow 16 bits; 7-bit weights of earlier versions do not."""
    by_pixel = TARGETS[target].int8.pairs_by_pixel
    return bool(saturating_layers(graph_io.load(graph).graph, by_pixel=by_pixel))


def attested(
    root: Path,
    gates: dict[str, m.Gate],
    states: dict[str, m.State],
    *,
    machine: str,
    instruction_set: str,
    compute_capability: str | None,
    versions: dict[str, str],
    warnings: Sequence[str] = (),
    latencies: Mapping[str, m.Latency] = {},
    emulation: m.Emulation | None = None,
) -> m.Attestation:
    """The attestation of a bundle in its current state; the arguments are its fields."""
    return m.Attestation(
        schema_version=1,
        manifest_sha256=sha256_of(root / MANIFEST),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=machine,
        instruction_set=instruction_set,
        compute_capability=compute_capability,
        versions=versions,
        status="failed" if any(gate.failures for gate in gates.values()) else "ok",
        warnings=list(warnings),
        engines=gates,
        states=states,
        latencies=dict(latencies),
        emulation=emulation,
    )


_CANNOT_WRITE = {
    getattr(errno, name)
    for name in ("EROFS", "EACCES", "EPERM", "EEXIST", "ENOTDIR", "ENOSPC", "EDQUOT")
    if hasattr(errno, name)
}
"""Errors of storage that is read-only or full: the results are still returned."""


def write_attestation(root: Path, attestation: m.Attestation) -> Path | None:
    """Write an attestation to its bundle; None if the bundle cannot be written to, as on read-only or full storage."""
    directory = root / ATTESTATIONS
    stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S%fZ")
    path = directory / f"{stamp}.json"
    try:
        directory.mkdir(exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(attestation.model_dump_json(indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        if error.errno in _CANNOT_WRITE:
            return None
        raise
    return path
