"""Verifies a bundle's engines on an emulated CPU and on this machine, and writes an attestation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from export_zoo.base.errors import TargetUnavailableError
from export_zoo.base.machine import cpu_model, library_versions
from export_zoo.calibration.images import Progress
from export_zoo.engines.bundle import manifest as m
from export_zoo.engines.bundle.reader import HeldOut, check_files, held_out, read_manifest
from export_zoo.engines.emulation.cpus import Cpu
from export_zoo.engines.emulation.engine import Emulated, EmulatedEngine
from export_zoo.engines.parity.tasks import headline
from export_zoo.engines.precision.registry import PRECISIONS
from export_zoo.engines.targets.base import Opening, Runner
from export_zoo.engines.targets.registry import TARGETS
from export_zoo.engines.verification import gate as parity_gate
from export_zoo.engines.verification.gate import MIN_LABELLED, judge
from export_zoo.engines.verification.verify import attested, plain_outputs, with_claim, write_attestation

Float32Array = npt.NDArray[np.float32]

IMAGES = 16
"""Default number of held-out images for an INT8 engine. One image of 224x224 takes about a second."""

FLOAT_IMAGES = 2
"""Maximum number of held-out images for a float engine. Emulated, it is ten times slower, and it cannot saturate."""

_COUNTS = ("top1", "top5", "agreement", "nearest")
"""Metrics that one image can change by more than their tolerance, if images are few."""

_MIN_MISPLACED = 8
"""Minimum number of images for the metric `misplaced`.

With fewer images, some of 1000 classes are alike by chance, and INT8 appears to have swapped them.
"""


class _Beside:
    """Runs an emulated engine and this machine's on the same batches, and keeps their largest difference."""

    def __init__(self, emulated: Runner, here: Runner) -> None:
        self._emulated, self._here = emulated, here
        self.difference = 0.0

    def run_all(self, batch: Float32Array) -> tuple[Float32Array, ...]:
        found, here = self._emulated.run_all(batch), self._here.run_all(batch)
        for one, other in zip(found, here, strict=True):
            # NaN equals NaN, and infinity equals infinity, at the same position.
            same = (one == other) | (np.isnan(one) & np.isnan(other))
            with np.errstate(invalid="ignore"):
                apart = np.abs(one.astype(np.float64) - other)
            # JSON has no infinity.
            apart = np.where(same, 0.0, np.nan_to_num(apart, nan=np.finfo(np.float64).max))
            self.difference = max(self.difference, float(apart.max()))
        return found


def runnable(manifest: m.Manifest, cpu: Cpu) -> list[m.Engine]:
    """Engines of the bundle that a CPU can be emulated for."""
    return [
        engine
        for engine in manifest.artifacts.engines
        if cpu.machine in (target := TARGETS[engine.target]).emulated
        and not target.why_not_on(cpu.machine, PRECISIONS[engine.precision])
    ]


def _count(engine: m.Engine, images: int) -> int:
    """Number of images that an engine runs."""
    return images if PRECISIONS[engine.precision].integer_sums else min(images, FLOAT_IMAGES)


def images_run(manifest: m.Manifest, cpu: Cpu, images: int) -> int:
    """Total number of images that `verify_on` runs, for a progress bar."""
    held = manifest.artifacts.held_out.count
    return sum(_count(engine, min(images, held)) for engine in runnable(manifest, cpu))


def _first(held: HeldOut, images: int) -> HeldOut:
    return replace(
        held,
        pixels=held.pixels[:images],
        logits=held.logits[:images],
        further=tuple(logits[:images] for logits in held.further),
        labels=held.labels[:images] if held.labels is not None else None,
        sizes=(),
    )


def _tolerances(engine: m.Engine, images: int) -> dict[str, float]:
    """The gate's tolerances, without those of metrics that need more images."""
    limits = dict(engine.gate.tolerances)
    if images < MIN_LABELLED:
        limits = {metric: value for metric, value in limits.items() if "accuracy" not in metric}
    if images < parity_gate.SUBSET:
        limits = {metric: value for metric, value in limits.items() if metric not in _COUNTS}
    if images < _MIN_MISPLACED:
        limits.pop("misplaced", None)
    return limits


def verify_on(
    bundle: Path | str, cpu: Cpu, *, images: int = IMAGES, progress: Progress = lambda _: None
) -> tuple[m.Attestation, Path | None]:
    """Run engines of a bundle on an emulated CPU and on this machine, and compare both with eager.

    Each engine runs the first held-out images, at batch opt or less. No engine becomes verified by this: the
    attestation says that the CPU was emulated, and has no states.

    Returns the attestation and its path. The path is None if the bundle cannot be written to. The attestation's
    `status` is `failed` if a gate failed on the emulated CPU.

    Args:
        images: maximum number of held-out images, 2 or more (one image proves nothing). Float engines run at most
            FLOAT_IMAGES.

    Raises:
        BadInputError: `bundle` is not a bundle, or is damaged.
        TargetUnavailableError: the CPU cannot be emulated here, or the bundle has no engine that it can run. One of
            several is left out, with a warning.
    """
    root = Path(bundle)
    manifest = read_manifest(root)
    recipe = manifest.recipe
    engines = runnable(manifest, cpu)
    if not engines:
        names = " or ".join(name for name, target in TARGETS.items() if cpu.machine in target.emulated)
        known = [
            (TARGETS[engine.target], PRECISIONS[engine.precision]) for engine in manifest.artifacts.engines
        ]
        whys = dict.fromkeys(why for target, p in known if (why := target.why_not_on(cpu.machine, p)))
        because = "".join(f"; {why}" for why in whys)
        raise TargetUnavailableError(
            f"{root}: --cpu {cpu.name}: the bundle has no engine of {names} that runs there{because}",
            hint="export with --target onnxruntime",
        )
    check_files(root, manifest)
    everything = held_out(root, manifest)
    gates: dict[str, m.Gate] = {}
    beside: dict[str, m.HostFigures] = {}
    emulated: dict[str, Emulated] = {}
    not_run: dict[str, TargetUnavailableError] = {}
    for engine in engines:
        held = _first(everything, _count(engine, images))
        size = max(recipe.batch.min, min(recipe.batch.opt, len(held.pixels)))
        path = root / engine.file.path
        precision = PRECISIONS[engine.precision]
        session = engine.session_where_saturating()
        target, opening = TARGETS[engine.target], Opening(path, precision, saturating_session=session)
        if why := target.why_not_run(precision, engine.plan):
            not_run[engine.name] = TargetUnavailableError(
                f"--cpu {cpu.name}: it is compared with this machine: {why}", hint=target.install
            )
            continue
        here = target.open(opening)
        half = precision.float16
        unfused = plain_outputs(path, recipe, half=half) if engine.gate.reference != "eager" else None
        gate = partial(
            judge,
            pixels=held.pixels,
            eager=held.outputs(recipe),
            heads=recipe.heads,
            labels=held.labels,
            preprocess=recipe.preprocess,
            batch=m.Batch(min=size, opt=size, max=size),
            tolerances=_tolerances(engine, len(held.pixels)),
            unfused=unfused,
        )
        try:
            with EmulatedEngine(cpu, target, opening) as there:
                both = _Beside(there, here)
                gates[engine.name] = with_claim(gate(both, progress=progress), engine, path)
                emulated[engine.name] = there.emulated
        except TargetUnavailableError as error:
            not_run[engine.name] = error
            continue
        sqnr = gate(here).eager_metrics["sqnr"]
        beside[engine.name] = m.HostFigures(sqnr=sqnr, max_difference=both.difference)
    if not emulated:
        raise next(iter(not_run.values()))
    one = next(iter(emulated.values()))
    versions = {name: version for found in emulated.values() for name, version in found.versions.items()}
    attestation = attested(
        root,
        gates,
        states={},
        machine=f"{cpu.name}, emulated by qemu {versions['qemu']} on {cpu_model()}",
        instruction_set=one.instruction_set,
        compute_capability=None,
        versions=versions,
        warnings=[
            *(f"{name}: not run: {error.message}" for name, error in not_run.items()),
            *_warnings(cpu, versions),
        ],
        emulation=m.Emulation(cpu=cpu.name, saturates=one.saturates, host=beside),
    )
    return attestation, write_attestation(root, attestation)


def _warnings(cpu: Cpu, versions: Mapping[str, str]) -> list[str]:
    """A warning for each emulated library of another version than this machine's: then not only the CPU differs."""
    libraries = dict.fromkeys(
        target.distribution for target in TARGETS.values() if target.distribution in versions
    )
    here = library_versions(*libraries)
    return [
        f"--cpu {cpu.name}: the emulated CPU ran {name} {versions[name]}, this machine ran {here[name]}, so the CPU is "
        "not the only difference: make the ARM64 root again with `python -m export_zoo.engines.emulation.arm64_root`"
        for name in libraries
        if versions[name] != here[name]
    ]


def describe(name: str, gate: m.Gate, host: m.HostFigures, cpu: str) -> str:
    """One line for people: an engine's result on the emulated CPU, compared with this machine's."""

    def decibels(value: float | None) -> str:
        return f"{value:.2f}" if isinstance(value, float) else "-"

    here = decibels(host.sqnr)
    equal = (
        "logits are equal to the bit"
        if host.max_difference == 0
        else f"logits differ by {host.max_difference:.2g}"
    )
    title, share = headline(gate.eager_metrics)
    return (
        f"{name} on {cpu}: {'FAILED' if gate.failures else 'ok'}, emulated, SQNR {decibels(gate.eager_metrics['sqnr'])}"
        f" dB ({here} here), {title} {share} of {gate.metrics['images']} images; {equal}"
    )
