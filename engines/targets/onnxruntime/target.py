"""ONNX Runtime as a target: its engine is the precision graph."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from export_zoo.engines.targets.base import OpenEngine, Opening, Target, TritonBackend, Worker

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx_ir as ir

    from export_zoo.engines.precision.int8.rules import Int8Rules
    from export_zoo.engines.targets.float_for_speed import FloatForSpeed


class OnnxRuntime(Target):
    """ONNX Runtime on the CPU."""

    name = distribution = "onnxruntime"
    install = "install onnxruntime or onnxruntime-gpu"
    device: Literal["cpu", "gpu"] = "cpu"
    emulated = frozenset({"x86_64", "aarch64"})
    # `quantize` refuses to write an INT8 graph that can saturate.
    saturating_session: Mapping[str, str] | None = {}
    triton = TritonBackend("onnxruntime_onnx", "model.onnx", "KIND_CPU")

    @property
    def int8(self) -> Int8Rules:
        from export_zoo.engines.targets.onnxruntime.placement import INT8_RULES

        return INT8_RULES

    def takes_costs(self, path: Path) -> bool:
        from export_zoo.engines.targets.onnxruntime.costs import Costs

        Costs.read(path)
        return True

    def float_for_speed(self, graph: ir.Graph, kept: Set[str], costs: Path | None) -> FloatForSpeed:
        from export_zoo.base.graph_io import sha256_of
        from export_zoo.engines.targets.float_for_speed import FloatForSpeed
        from export_zoo.engines.targets.onnxruntime.costs import DEFAULT, Costs, float_layers

        path = costs or DEFAULT
        layers = float_layers(graph, kept, Costs.read(path))
        return FloatForSpeed(layers=layers, costs_sha256=sha256_of(path))

    def open(self, opening: Opening) -> OpenEngine:
        from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine

        return OnnxRuntimeEngine(
            opening.file,
            threads=opening.threads,
            streams=opening.streams,
            half=opening.precision.float16,
            saturating_session=opening.saturating_session,
        )

    def worker(self, opening: Opening) -> Worker:
        return Worker(
            "export_zoo.engines.targets.onnxruntime.engine:OnnxRuntimeEngine",
            {
                "threads": 1,
                "half": opening.precision.float16,
                "saturating_session": dict(opening.saturating_session),
            },
            self.distribution,
        )

    def node_times(self, opening: Opening, batch: npt.NDArray[np.float32]) -> Mapping[str, float]:
        from export_zoo.engines.targets.onnxruntime.profiling import node_times

        return node_times(opening.file, batch, half=opening.precision.float16)
