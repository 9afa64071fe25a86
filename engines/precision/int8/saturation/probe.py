"""Test whether sums of uint8 x int8 products saturate in ONNX Runtime's kernels in this process.

On x86-64 without VNNI (Intel before Cascade Lake and Ice Lake, AMD before Zen 4) `vpmaddubsw` adds two products in
16 bits and saturates: 255 x 127 + 255 x 127 is 64,770 and becomes 32,767. The name of a CPU does not show which kernels
ONNX Runtime uses. The result of a graph with a known answer does.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import onnxruntime as ort

EXACT_SESSION: Mapping[str, str] = {"session.x64quantprecision": "1"}
"""Session configuration that makes ONNX Runtime's sums exact on CPUs where its kernels saturate: int8 weights outside
[-64, 64] become uint8 at load (microsoft/onnxruntime, pull request 12088). On CPUs with VNNI, where nothing saturates,
it makes INT8 2 to 3 times slower. So it is set only where sums saturate."""

_PRODUCTS = 64
_MODEL = (
    # onnx.helper: opset 13, IR 8; MatMulInteger(a uint8 [1, 64], b = 64 x 127 int8 [64, 1]) -> y int32 [1, 1].
    b'\x08\x08:\x98\x01\n\x18\n\x01a\n\x01b\x12\x01y"\rMatMulInteger\x12\x05probe*K\x08@\x08\x01\x10\x03B\x01bJ@'
    + b"\x7f" * _PRODUCTS
    + b"Z\x13\n\x01a\x12\x0e\n\x0c\x08\x02\x12\x08\n\x02\x08\x01\n\x02\x08@b\x13\n\x01y\x12\x0e\n\x0c\x08\x06\x12\x08\n"
    b"\x02\x08\x01\n\x02\x08\x01B\x04\n\x00\x10\r"
)


@cache
def saturates() -> bool:
    """True if sums of uint8 x int8 products saturate. Measured once per process, in a few milliseconds."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(_MODEL, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"a": np.full((1, _PRODUCTS), 255, dtype=np.uint8)})
    return int(np.asarray(found).item()) != _PRODUCTS * 255 * 127
