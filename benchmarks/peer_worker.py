"""Quantizes one graph with a peer, in the peer's own environment, and runs the result.

    peer_worker.py PEER OPTION GRAPH CALIBRATE HELD_OUT LOGITS [FOLDER]

CALIBRATE and HELD_OUT are float32 [N, 3, H, W] (.npy); LOGITS is written. The quantized model is left in FOLDER.
Prints a JSON line: `seconds` of quantizing, without imports, and `peak_mib` of the process until then.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

NAME = "input"
Run = Callable[[np.ndarray], np.ndarray]
"""Logits [1, classes] of one image [1, 3, H, W]."""


def _onnxruntime(graph: str) -> Run:
    import onnxruntime as ort

    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {NAME: image})[0]


def nncf(option: str, graph: str, images: np.ndarray, folder: Path) -> Run:
    """`onnx` or `openvino`, the back end; `+bias` for the slower bias correction, `+transformer` for its scheme for
    transformers. Otherwise, defaults.
    """
    import nncf
    import onnx
    import openvino as ov

    backend, *more = option.split("+")
    core = ov.Core()
    model = onnx.load(graph) if backend == "onnx" else core.read_model(graph)
    dataset = nncf.Dataset([image[None] for image in images], lambda image: {NAME: image})
    quantized = nncf.quantize(
        model,
        dataset,
        subset_size=len(images),
        fast_bias_correction="bias" not in more,
        model_type=nncf.ModelType.TRANSFORMER if "transformer" in more else None,
    )
    if backend == "onnx":
        onnx.save(quantized, folder / "out.onnx")
        return _onnxruntime(str(folder / "out.onnx"))
    ov.save_model(quantized, folder / "out.xml", compress_to_fp16=False)
    compiled = core.compile_model(quantized, "CPU")
    return lambda image: compiled({NAME: image})[0]


def modelopt(option: str, graph: str, images: np.ndarray, folder: Path) -> Run:
    """`max` or `entropy`."""
    from modelopt.onnx.quantization import quantize

    out = str(folder / "out.onnx")
    quantize(
        graph,
        quantize_mode="int8",
        calibration_data={NAME: images},
        calibration_method=option,
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=out,
        log_level="ERROR",
    )
    return _onnxruntime(out)


def aimet(option: str, graph: str, images: np.ndarray, folder: Path) -> Run:
    """`min_max` or `tf_enhanced`; `+cle` for cross-layer equalization."""
    import onnx
    from aimet_onnx.cross_layer_equalization import equalize_model
    from aimet_onnx.quantsim import QuantizationSimModel

    scheme, *more = option.split("+")
    model = onnx.load(graph)
    if "cle" in more:
        equalize_model(model)
    sim = QuantizationSimModel(model, quant_scheme=scheme, providers=["CPUExecutionProvider"])
    sim.compute_encodings([{NAME: image[None]} for image in images])
    return lambda image: sim.session.run(None, {NAME: image})[0]


def quark(option: str, graph: str, images: np.ndarray, folder: Path) -> Run:
    """A name of its configurations, such as `INT8_CNN_DEFAULT`."""
    from quark.onnx import ModelQuantizer
    from quark.onnx.quantization.config import Config, get_default_config

    class Reader:
        def __init__(self) -> None:
            self._images = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self._images, None)
            return None if image is None else {NAME: image[None]}

    out = str(folder / "out.onnx")
    ModelQuantizer(Config(global_quant_config=get_default_config(option))).quantize_model(
        graph, out, Reader()
    )
    return _onnxruntime(out)


PEERS: dict[str, Callable[[str, str, np.ndarray, Path], Run]] = {
    "nncf": nncf,
    "modelopt": modelopt,
    "aimet": aimet,
    "quark": quark,
}


def main() -> None:
    peer, option, graph, calibrate, held_out, logits, *left = sys.argv[1:]
    images: Any = np.load(calibrate)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        run = PEERS[peer](option, graph, images, Path(left[0] if left else folder))
        seconds = time.monotonic() - began
        # The peak is that of this program alone: getrusage would begin with the peak of the process that started it.
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak = int(status["VmHWM"].split()[0]) / 1024

        def outputs() -> Iterator[np.ndarray]:
            for image in np.load(held_out):
                yield run(image[None])

        np.save(logits, np.concatenate([*outputs()]))
    print(json.dumps({"seconds": seconds, "peak_mib": peak}))


if __name__ == "__main__":
    main()
