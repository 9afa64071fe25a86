"""Chooses the best engine of a bundle for this machine. Loading and serving use the same rules."""

from __future__ import annotations

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
        alike = (
            attestation.compute_capability == device_capability()
            if TARGETS[engine.target].device == "gpu"
            else attestation.instruction_set == instruction_set()
        )
        gate = attestation.engines.get(engine.name)
        if alike and gate is not None and gate.ran == "engine":
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


def rank(engine: m.Engine) -> tuple[bool, float, int]:
    """Sort key: the best engine has the largest key.

    GPU engines that were never timed are preferred to CPU engines; among them, the lowest precision is preferred.
    Otherwise, the engine with the largest speedup is preferred.
    """
    untimed = TARGETS[engine.target].device == "gpu" and engine.latency is None
    speedup = engine.latency.speedup if engine.latency is not None else 0.0
    return untimed, speedup, list(PRECISIONS).index(engine.precision)
