"""Which engine of a bundle is best on this machine: one answer, for loading and for serving."""

from __future__ import annotations

from typing import NamedTuple

from export_zoo.base.cuda import device_capability
from export_zoo.base.machine import instruction_set
from export_zoo.engines.bundle import manifest as m
from export_zoo.engines.bundle.reader import Attested
from export_zoo.engines.precision.registry import PRECISIONS
from export_zoo.engines.targets.registry import TARGETS


class Standing(NamedTuple):
    """An engine's state here, and where that comes from."""

    state: m.State
    source: str
    """The attestation and its machine; empty for the manifest."""


def standing(engine: m.Engine, attested: Attested) -> Standing:
    """An engine's state by the newest attestation of a machine like this one that ran it, else by the manifest.

    A real machine's attestation goes before those of emulated CPUs. Nothing is verified by emulation, but an engine
    that failed on an emulated CPU like this machine's, when it last ran there, is not verified any more.
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
    """Why an engine is left out for its state."""
    return f"{found.state}, not verified" + (f" ({found.source})" if found.source else "")


def rank(engine: m.Engine) -> tuple[bool, float, int]:
    """The fastest last. A GPU's engine that was never timed is taken before the CPU's, the lower precision first."""
    untimed = TARGETS[engine.target].device == "gpu" and engine.latency is None
    speedup = engine.latency.speedup if engine.latency is not None else 0.0
    return untimed, speedup, list(PRECISIONS).index(engine.precision)
