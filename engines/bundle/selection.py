"""Chooses the best engine of a bundle for this machine. Loading and serving use the same rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from export_zoo.base.cuda import device_capability
from export_zoo.base.machine import instruction_set
from export_zoo.engines.bundle import manifest as m
from export_zoo.engines.bundle.reader import Attested
from export_zoo.engines.precision.registry import PRECISIONS
from export_zoo.engines.targets.registry import TARGETS


class Standing(NamedTuple):
    """An engine's state on this machine, and the source of that state."""

    state: m.State
    source: str
    """The attestation's file and its machine; empty if the state is the manifest's."""


def standing(engine: m.Engine, attested: Attested) -> Standing:
    """An engine's state on this machine.

    The newest attestation of a machine like this one that ran the engine decides. Without one, the manifest decides.
    Attestations of real machines take precedence over those of emulated CPUs. Emulation never makes an engine verified.
    However, an engine that failed its last run on an emulated CPU like this machine's is no longer verified.
    """
    real_first = sorted(attested.by_file.items(), key=lambda item: item[1].emulation is not None)
    emulated: set[str] = set()
    for name, attestation in real_first:
        gate = attestation.engines.get(engine.name)
        if _attested_like_here(engine, attestation) and gate is not None and gate.ran == "engine":
            found = Standing(m.state_after(gate), f"{name}: {attestation.machine}")
            if attestation.emulation is None:
                return found
            if attestation.emulation.cpu not in emulated and found.state == "built":
                return found
            emulated.add(attestation.emulation.cpu)
    return Standing(engine.state, "")


def not_verified(found: Standing) -> str:
    """The reason, for messages, why an engine is left out because of its state."""
    return f"{found.state}, not verified" + (f" ({found.source})" if found.source else "")


class Speeds(NamedTuple):
    """Speeds of engines, measured in one run."""

    by_engine: Mapping[str, float]
    """Speed by engine; the largest is the fastest. Engines that were not timed are missing."""
    where: str
    """Where they were measured, for messages."""
    like_here: bool
    """Whether that was a machine like this one, and all engines were timed."""
    unit: str = "x the speed of FP32"

    def told(self, name: str) -> str:
        """Where the engine was measured and its speed, as text; empty if it was not timed."""
        if name not in self.by_engine:
            return ""
        return f"measured {self.where}, {self.by_engine[name]:.2f}{self.unit}"


def speeds(engines: Sequence[m.Engine], attested: Attested) -> Speeds:
    """The speeds of engines as measured on a machine like this one, otherwise as measured at export.

    An attestation counts if it is of a real machine and timed all of the engines; the newest one goes first.
    """
    for name, attestation in attested.by_file.items():
        timed = {e.name: found.speedup for e in engines if (found := attestation.latencies.get(e.name))}
        alike = attestation.emulation is None and all(_attested_like_here(e, attestation) for e in engines)
        if alike and len(timed) == len(engines):
            return Speeds(timed, f"by {name}: {attestation.machine}", like_here=True)
    exported = {e.name: e.latency.speedup for e in engines if e.latency is not None}
    elsewhere = [e for e in engines if e.name in exported and not _exported_like_here(e)]
    if not elsewhere:
        return Speeds(exported, "at export", like_here=len(exported) == len(engines))
    on_cpu = [e.instruction_set for e in elsewhere if TARGETS[e.target].device == "cpu"]
    other = f"another instruction set ({on_cpu[0]})" if on_cpu else "another GPU"
    return Speeds(exported, f"on {other}, at export", like_here=False)


def _attested_like_here(engine: m.Engine, attestation: m.Attestation) -> bool:
    """Whether an attestation's machine is like this one for an engine."""
    if TARGETS[engine.target].device == "gpu":
        return attestation.compute_capability == device_capability()
    return attestation.instruction_set == instruction_set()


def _exported_like_here(engine: m.Engine) -> bool:
    """Whether the machine that exported an engine is like this one."""
    if engine.plan is not None:
        return device_capability() in engine.plan.compute_capabilities
    return engine.instruction_set == instruction_set()


def fastest_first(engines: Sequence[m.Engine], found: Speeds) -> list[m.Engine]:
    """Engines by speed, the fastest first.

    GPU engines that were not timed come before all others, lower precisions first.
    """

    def key(engine: m.Engine) -> tuple[bool, float, int]:
        untimed = TARGETS[engine.target].device == "gpu" and engine.name not in found.by_engine
        return untimed, found.by_engine.get(engine.name, 0.0), list(PRECISIONS).index(engine.precision)

    return sorted(engines, key=key, reverse=True)
