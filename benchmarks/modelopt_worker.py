"""Quantize one graph with NVIDIA ModelOpt, in an environment of its own: modelopt_worker.py GRAPH INPUTS METHOD OUT."""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime as ort
from modelopt.onnx.quantization import quantize

graph, inputs, method, out = sys.argv[1:]
name = ort.InferenceSession(graph, providers=["CPUExecutionProvider"]).get_inputs()[0].name
quantize(
    graph,
    quantize_mode="int8",
    calibration_data={name: np.load(inputs)},
    calibration_method=method,
    calibration_eps=["cpu"],
    high_precision_dtype="fp16",
    output_path=out,
    log_level="ERROR",
)
