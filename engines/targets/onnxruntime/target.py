"""ONNX Runtime as a target: its engine is the precision graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from export_zoo.engines.targets.base import OpenEngine, Opening, Target, TritonBackend

if TYPE_CHECKING:
    from export_zoo.engines.precision.int8.rules import Int8Rules


class OnnxRuntime(Target):
    """ONNX Runtime on the CPU."""

    name = distribution = "onnxruntime"
    install = "install onnxruntime or onnxruntime-gpu"
    device: Literal["cpu", "gpu"] = "cpu"
    emulated = True
    # `quantize` refuses to write an INT8 graph that can saturate.
    saturating_session: Mapping[str, str] | None = {}
    triton = TritonBackend("onnxruntime_onnx", "model.onnx", "KIND_CPU")

    @property
    def int8(self) -> Int8Rules:
        from export_zoo.engines.targets.onnxruntime.placement import INT8_RULES

        return INT8_RULES

    def open(self, opening: Opening) -> OpenEngine:
        from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine

        return OnnxRuntimeEngine(
            opening.file,
            threads=opening.threads,
            half=opening.precision.float16,
            saturating_session=opening.saturating_session,
        )
