"""Peers to measure against, with their recommended settings."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process


class _Batches(CalibrationDataReader):
    def __init__(self, batches: Iterable[np.ndarray], name: str) -> None:
        self._batches, self._name = iter(batches), name

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch}


def quantize_with_onnxruntime(
    fp32: Path,
    out: Path,
    batches: Iterable[np.ndarray],
    name: str = "input",
    *,
    method: str = "MinMax",
    activations: str = "uint8",
) -> None:
    """ONNX Runtime's static quantizer: Q/DQ, int8 weights per channel; by default uint8 activations, MinMax ranges.

    Its documented preprocessing (shape inference and graph optimization) comes first.
    """
    logging.getLogger().setLevel(logging.ERROR)
    prepared = out.with_suffix(".prepared.onnx")
    quant_pre_process(str(fp32), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(out),
        _Batches(batches, name),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8 if activations == "uint8" else QuantType.QInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[method],
    )
