"""Use a bundle: load an engine, run it, verify it again. Needs neither PyTorch nor the zoo."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from calibration.errors import BadInputError, ParityError, TargetUnavailableError
from calibration.graph_io import sha256_of
from calibration.images import Progress
from calibration.machine import cpu_model, instruction_set, library_versions, saturates
from calibration.preprocess import UnreadableImageError, decode, normalize, resize_and_crop
from engines import manifest as m
from engines.gate import Runnable, judge, run_in_batches
from engines.onnxruntime_engine import OnnxRuntimeEngine
from engines.target import DISTRIBUTIONS, device_capability
from engines.tensorrt_engine import TensorRTEngine
from engines.twin import write_twin

Float32Array = npt.NDArray[np.float32]
MANIFEST = "manifest.json"
ATTESTATIONS = "attestations"


def read_manifest(bundle: Path) -> m.Manifest:
    """Read and validate a bundle's manifest.

    Raises:
        BadInputError: not a bundle, a manifest of another version, or one that does not validate.
    """
    path = bundle / MANIFEST
    if not path.is_file():
        raise BadInputError(
            f"{bundle}: not a bundle (no {MANIFEST})",
            hint="pass the directory that `export-zoo export` wrote",
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        version = document.get("schema_version") if isinstance(document, dict) else None
        if version != m.SCHEMA_VERSION:
            raise BadInputError(
                f"{path}: schema version {version!r}, this export-zoo reads {m.SCHEMA_VERSION}",
                hint="use the export-zoo that wrote it, or export again",
            )
        found = m.Manifest.model_validate(document)
    except (ValidationError, ValueError, OSError, RecursionError) as error:
        lines = str(error).splitlines()
        raise BadInputError(
            f"{path}: damaged manifest: {' '.join(lines[:3])}", hint="export the bundle again"
        ) from error
    for file in found.files():
        if file.path.startswith("/") or ".." in Path(file.path).parts:
            raise BadInputError(f"{path}: {file.path!r} points outside the bundle", hint="do not use it")
    return found


def checked(bundle: Path, file: m.File) -> Path:
    """The path of a bundle's file, after checking size and SHA-256.

    Raises:
        BadInputError: missing, or not the bytes that the manifest promises.
    """
    path = bundle / file.path
    if not path.is_file():
        raise BadInputError(f"{path}: missing from the bundle", hint="copy the bundle again, files/ included")
    if path.stat().st_size != file.size_bytes or sha256_of(path) != file.sha256:
        raise BadInputError(
            f"{path}: checksum mismatch: not the file that the manifest describes",
            hint="the copy is damaged or was edited: copy or export the bundle again",
        )
    return path


@dataclass(frozen=True)
class HeldOut:
    """Held-out inputs and their eager logits."""

    pixels: npt.NDArray[np.uint8]
    logits: Float32Array
    labels: list[int] | None


def _array(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BadInputError(f"{path}: not a NumPy file: {error}", hint="export the bundle again") from error
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
        raise BadInputError(
            f"{path}: not the array that the manifest describes, {np.dtype(dtype)} {list(shape)}",
            hint="export the bundle again",
        )
    return array


def held_out(bundle: Path, manifest: m.Manifest) -> HeldOut:
    """Read a bundle's held-out inputs, uint8 [N, H, W, 3], and eager logits, float32 [N, classes]."""
    described = manifest.artifacts.held_out
    recipe = manifest.recipe
    crop = (recipe.preprocess.crop_height, recipe.preprocess.crop_width, 3)
    pixels = _array(checked(bundle, described.inputs), np.uint8, (described.count, *crop))
    logits = _array(
        checked(bundle, described.logits), np.float32, (described.count, recipe.source.num_classes)
    )
    return HeldOut(pixels, logits, described.labels)


def why_not_here(target: str, plan: m.Plan | None) -> str:
    """Why an engine cannot run on this machine, from its description alone; empty where it can."""
    if plan is None:
        return ""
    package = DISTRIBUTIONS[target]
    version = library_versions(package)[package]
    if version == "absent":
        return f"the package {package} is not installed"
    if version != plan.version and not plan.version_compatible:
        return f"built by {package} {plan.version}, this is {version}"
    here = device_capability()
    if here is None:
        return "there is no CUDA device here"
    if here not in plan.compute_capabilities and not plan.hardware_compatible:
        return f"built for compute capability {', '.join(plan.compute_capabilities)}, this GPU has {here}"
    return ""


def open_engine(
    path: Path, *, target: str, precision: str, plan: m.Plan | None, threads: int = 0
) -> Runnable:
    """An engine file, ready to run.

    Raises:
        BadInputError: not an ONNX Runtime engine.
        TargetUnavailableError: a TensorRT engine that this machine cannot load.
    """
    if plan is not None:
        return TensorRTEngine(path, target=target)
    return OnnxRuntimeEngine(path, threads=threads, half=precision == "fp16")


class LoadedEngine:
    """One engine of a bundle, ready to run. Safe to share between threads."""

    def __init__(self, bundle: Path, manifest: m.Manifest, engine: m.Engine, why: str, threads: int) -> None:
        for external in engine.external_data:
            checked(bundle, external)
        path = checked(bundle, engine.file)
        self.manifest = manifest
        self.name = engine.name
        self.state = engine.state
        self.why = why
        self.labels = manifest.recipe.labels
        self._backend = open_engine(
            path, target=engine.target, precision=engine.precision, plan=engine.plan, threads=threads
        )

    def preprocess(self, images: Sequence[Path | str | bytes]) -> Float32Array:
        """Image files (paths, or their bytes) to the input batch, float32 [N, 3, H, W].

        Raises:
            BadInputError: one of them cannot be decoded; the message names it.
        """
        pixels = []
        for index, image in enumerate(images):
            name = f"image {index}" if isinstance(image, bytes) else str(image)
            try:
                data = image if isinstance(image, bytes) else Path(image).read_bytes()
                pixels.append(resize_and_crop(decode(data), self.manifest.recipe.preprocess))
            except (UnreadableImageError, OSError) as error:
                raise BadInputError(f"{name}: {error}", hint="pass a JPEG or PNG image") from error
        if not pixels:
            raise BadInputError("no images given", hint="pass at least one")
        return normalize(np.stack(pixels), self.manifest.recipe.preprocess)

    def run(self, batch: Float32Array) -> Float32Array:
        """Logits float32 [N, classes] of a preprocessed batch float32 [N, 3, H, W].

        Raises:
            BadInputError: wrong dtype or shape, or N outside the batch range that was verified.
        """
        batch = np.asarray(batch)
        allowed = self.manifest.recipe.batch
        if batch.ndim > 0 and not allowed.min <= batch.shape[0] <= allowed.max:
            raise BadInputError(
                f"batch {batch.shape[0]} is outside this bundle's range {allowed.min} to {allowed.max}",
                hint="split the batch, or export with a wider --batch MIN:OPT:MAX",
            )
        return self._backend.run(batch)


def load(
    bundle: Path | str, *, engine: str | None = None, threads: int = 0, allow_failed: bool = False
) -> LoadedEngine:
    """Load the best engine of a bundle, or the one named, after checking its hashes.

    The best is the fastest *verified* one, by the latencies recorded in the manifest.

    Args:
        bundle: the directory that `export-zoo export` wrote.
        engine: a name such as `onnxruntime-int8`.
        threads: intra-op threads, 0 for all cores.
        allow_failed: load from a bundle whose parity gate failed, to look into it.

    Raises:
        BadInputError: not a bundle, damaged, or no such engine.
        ParityError: the bundle failed its parity gate.
        TargetUnavailableError: no engine of the bundle can run here.
    """
    root = Path(bundle)
    manifest = read_manifest(root)
    if manifest.status != "ok" and not allow_failed:
        raise ParityError(
            f"{root}: this bundle failed its parity gate, or an engine did not reach the state asked for",
            hint="export again; allow_failed=True loads it to look into it",
        )
    engines = {e.name: e for e in manifest.artifacts.engines}
    if engine is not None:
        if engine not in engines:
            raise BadInputError(
                f"{root}: no engine {engine!r}", hint=f"it has: {', '.join(engines) or 'none'}"
            )
        if reason := why_not_here(engines[engine].target, engines[engine].plan):
            raise TargetUnavailableError(
                f"{root}: {engine} cannot run here: {reason}",
                hint="load another engine of the bundle, or export again on this machine",
            )
        return LoadedEngine(root, manifest, engines[engine], "asked for", threads)
    runnable = [
        e
        for e in engines.values()
        if not why_not_here(e.target, e.plan) and (e.state == "verified" or allow_failed)
    ]
    if not runnable:
        raise TargetUnavailableError(f"{root}: no verified engine that runs here", hint="export again here")
    best = max(runnable, key=lambda e: e.latency.speedup if e.latency is not None else 0.0)
    speed = f", {best.latency.speedup:.2f}x of FP32" if best.latency is not None else ""
    return LoadedEngine(
        root, manifest, best, f"fastest verified engine as measured at export{speed}", threads
    )


def judge_engine(
    file: Path,
    graph: Path,
    *,
    target: str,
    precision: str,
    plan: m.Plan | None,
    unfused: bool,
    recipe: m.Recipe,
    held: HeldOut,
    tolerances: dict[str, float],
    progress: Progress = lambda _: None,
) -> m.Gate:
    """Run one engine, or the precision graph of one that cannot run here, through the parity gate.

    Args:
        file: the engine.
        graph: the precision graph that TensorRT compiled; for ONNX Runtime, the engine itself.
        unfused: gate against the unfused graph (see `engines.gate.judge`).
    """

    def unfused_logits() -> Float32Array:
        plain = OnnxRuntimeEngine(graph, fused=False, half=precision == "fp16")
        return run_in_batches(plain, held.pixels, recipe.preprocess, recipe.batch.opt)

    only_graph = bool(why_not_here(target, plan))
    engine: Runnable
    if only_graph:
        with tempfile.TemporaryDirectory(prefix="export-zoo-") as directory:
            twin = Path(directory) / "twin.onnx"
            write_twin(graph, twin)
            engine = OnnxRuntimeEngine(twin, fused=False)
    else:
        engine = open_engine(file, target=target, precision=precision, plan=plan)
    return judge(
        engine,
        ran="precision graph" if only_graph else "engine",
        pixels=held.pixels,
        eager=held.logits,
        labels=held.labels,
        preprocess=recipe.preprocess,
        batch=recipe.batch,
        tolerances=tolerances,
        unfused=unfused_logits if unfused else None,
        progress=progress,
    )


def verify(bundle: Path | str, *, progress: Progress = lambda _: None) -> tuple[m.Attestation, Path | None]:
    """Check every hash of a bundle and every engine's logits on this machine; write an attestation.

    Returns the attestation, and its path: None where the bundle cannot be written to. Its `status` is `failed`
    where a gate did not hold: the caller decides what to do, nothing is raised for it.

    Raises:
        BadInputError: not a bundle, or damaged.
    """
    root = Path(bundle)
    manifest = read_manifest(root)
    for file in manifest.files():
        checked(root, file)
    held = held_out(root, manifest)
    here = instruction_set()
    warnings = []
    gates: dict[str, m.Gate] = {}
    states: dict[str, m.State] = {}
    for engine in manifest.artifacts.engines:
        if engine.target == "onnxruntime" and engine.precision == "int8" and here != engine.instruction_set:
            text = f"{engine.name} was verified on {engine.instruction_set}, this is {here}"
            if saturates(here) and not manifest.recipe.reduce_range:
                text += ": uint8 x int8 sums can saturate here; export with --reduce-range if logits differ"
            warnings.append(text)
        gate = judge_engine(
            root / engine.file.path,
            root / (engine.graph or engine.file).path,
            target=engine.target,
            precision=engine.precision,
            plan=engine.plan,
            unfused=engine.gate.reference != "eager",
            recipe=manifest.recipe,
            held=held,
            tolerances=engine.gate.tolerances,
            progress=progress,
        )
        gates[engine.name] = gate
        states[engine.name] = m.state_after(gate)
    attestation = m.Attestation(
        schema_version=1,
        manifest_sha256=sha256_of(root / MANIFEST),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=cpu_model(),
        instruction_set=here,
        versions=library_versions("onnxruntime", "numpy", "pillow"),
        status="failed" if any(gate.failures for gate in gates.values()) else "ok",
        warnings=warnings,
        engines=gates,
        states=states,
    )
    return attestation, _write_attestation(root, attestation)


def _write_attestation(root: Path, attestation: m.Attestation) -> Path | None:
    """None on read-only storage, as in a container: the figures stand all the same."""
    directory = root / ATTESTATIONS
    stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S%fZ")
    path = directory / f"{stamp}.json"
    temporary = directory / f".{stamp}.{os.getpid()}"
    try:
        directory.mkdir(exist_ok=True)
        temporary.write_text(attestation.model_dump_json(indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return None
        raise
    return path
