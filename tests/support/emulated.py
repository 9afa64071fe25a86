"""Engines on emulated CPUs, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from export_zoo.base.errors import TargetUnavailableError
from export_zoo.engines.emulation.cpus import CPUS, Cpu, launch
from export_zoo.engines.emulation.engine import EmulatedEngine
from export_zoo.engines.precision.int8.saturation.probe import EXACT_SESSION
from export_zoo.engines.precision.registry import BASELINE
from export_zoo.engines.targets.base import Opening
from export_zoo.engines.targets.registry import TARGETS


def emulated_engine(
    graph: Path, cpu: Cpu, saturating_session: Mapping[str, str] = EXACT_SESSION
) -> EmulatedEngine:
    """A graph in ONNX Runtime on an emulated CPU."""
    return EmulatedEngine(
        cpu, TARGETS["onnxruntime"], Opening(graph, BASELINE, saturating_session=saturating_session)
    )


def emulated_cpu(name: str) -> Cpu:
    """An emulated CPU; skips the test where it cannot be emulated."""
    try:
        launch(CPUS[name])
    except TargetUnavailableError as error:
        pytest.skip(error.message)
    return CPUS[name]
