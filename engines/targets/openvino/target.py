"""OpenVINO as a target: its engine is the precision graph, which it compiles when it loads it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from export_zoo.base.errors import TargetUnavailableError
from export_zoo.engines.targets.base import OpenEngine, Opening, Target, Worker

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from export_zoo.engines.precision.base import Precision
    from export_zoo.engines.precision.int8.rules import Int8Rules


OLDEST = (2025, 4)
"""The oldest version that is known to take our graphs."""


class OpenVino(Target):
    """OpenVINO on the CPU."""

    name = distribution = "openvino"
    install = "install it with `pip install 'export-zoo[openvino]'`"
    device: Literal["cpu", "gpu"] = "cpu"
    # `quantize` refuses to write an INT8 graph that can saturate. OpenVINO has no option against it.
    saturating_session: Mapping[str, str] | None = {}
    ovms = True
    may_refuse = True
    emulated = frozenset({"x86_64", "aarch64"})

    @property
    def unavailable(self) -> str:
        if reason := super().unavailable:
            return reason
        numbers = tuple(map(int, re.findall(r"\d+", self.version)[:2]))
        if numbers < OLDEST:
            return (
                f"openvino {self.version} is too old, {'.'.join(map(str, OLDEST))} is needed: {self.install}"
            )
        return ""

    @property
    def int8(self) -> Int8Rules:
        from export_zoo.engines.targets.openvino.placement import INT8_RULES

        return INT8_RULES

    def why_not_on(self, machine: str, precision: Precision) -> str:
        # On an emulated Cortex-A53 and Neoverse N1, 2026.4.1 gave 14.9 dB instead of 45.4 on a trained resnet18, and
        # empty outputs on another network, without an error.
        if precision.integer_sums and machine.lower() not in ("x86_64", "amd64"):
            return f"OpenVINO's INT8 is wrong on {machine}: docs/cpu.md"
        return ""

    def open(self, opening: Opening) -> OpenEngine:
        engine: OpenEngine = self._code("engine").OpenVinoEngine(
            opening.file, threads=opening.threads, streams=opening.streams
        )
        return engine

    def worker(self, opening: Opening) -> Worker:
        engine = "export_zoo.engines.targets.openvino.engine:OpenVinoEngine"
        return Worker(engine, {"threads": 1}, self.distribution)

    def node_times(self, opening: Opening, batch: npt.NDArray[np.float32]) -> Mapping[str, float]:
        times: Mapping[str, float] = self._code("profiling").node_times(opening.file, batch)
        return times

    def check_graph(self, graph: Path) -> None:
        self._code("graph_check").check_graph(graph)

    def _code(self, module: str) -> Any:
        """A module of this folder that imports OpenVINO, which may be installed and broken."""
        try:
            return import_module(f"export_zoo.engines.targets.openvino.{module}")
        except ImportError as error:
            raise TargetUnavailableError(
                f"{self.distribution} {self.version} is installed, but cannot be imported: {error}",
                hint=f"install it again: {self.install}",
            ) from error
