"""Quantizes one graph with NNCF's accuracy control on OpenVINO, in NNCF's own environment, and runs the result.

    nncf_accuracy_worker.py SQNR SECONDS GRAPH CALIBRATE SELECT HELD_OUT LOGITS

CALIBRATE, SELECT and HELD_OUT are float32 [N, 3, H, W] (.npy); LOGITS is written. Accuracy is the SQNR to the FP32
model on SELECT, in dB, at most 100. Prints a JSON line: `seconds` of quantizing, the best SQNR within SECONDS
(`in_time`), the number of models that it tried on all of SELECT
(`tried`), the last one's SQNR (`select`), `float_layers`, and `speedup` beside FP32, one image on one thread.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import nncf
import numpy as np
import openvino as ov

NAME = "input"
PERFECT = 100.0
LAYERS = ("Convolution", "GroupConvolution", "MatMul")
THREADS = {"INFERENCE_NUM_THREADS": 1}


def in_float32() -> None:
    """Make all models compute floats in float32, as ours do: NNCF's, too, which takes OpenVINO's default.

    That is bfloat16 on CPUs that have it, in which FP32 models have 27 dB: no INT8 model could have 30.
    """
    compile_model = ov.Core.compile_model

    def compiled(self: ov.Core, model: Any, device_name: str = "CPU", config: Any = None) -> Any:
        return compile_model(self, model, device_name, {"INFERENCE_PRECISION_HINT": "f32", **(config or {})})

    ov.Core.compile_model = compiled


def outputs(run: Callable[[dict[str, np.ndarray]], Any], images: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([run({NAME: image})[0] for image in images]).astype(np.float64)


def in_float(model: ov.Model) -> int:
    """Number of layers whose input is not quantized."""
    found = 0
    for operation in model.get_ops():
        if operation.get_type_name() in LAYERS:
            source = operation.input_value(0).get_node()
            found += source.get_type_name() != "FakeQuantize"
    return found


def speedup(before: ov.CompiledModel, after: ov.CompiledModel, image: np.ndarray) -> float:
    ratios = []
    for _ in range(60):
        seconds = []
        for model in (before, after):
            model({NAME: image})
            begin = time.perf_counter()
            model({NAME: image})
            seconds.append(time.perf_counter() - begin)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def main() -> None:
    in_float32()
    wanted, limit = map(float, sys.argv[1:3])
    graph, calibrate, select, held_out, logits = sys.argv[3:]
    core = ov.Core()
    model = core.read_model(graph)
    chosen = [image[None] for image in np.load(select)]
    exact = outputs(core.compile_model(model, "CPU"), chosen)
    signal = ((exact - exact.mean(axis=0)) ** 2).sum()
    begin, history = time.monotonic(), list[tuple[float, float]]()

    def validate(compiled: Any, data: Iterable[np.ndarray]) -> tuple[float, list[float]]:
        items = [*data]
        places = [next(i for i, image in enumerate(chosen) if image is item) for item in items]
        noise = ((outputs(compiled, items) - exact[places]) ** 2).sum(axis=1)
        sqnr = min(PERFECT, 10 * float(np.log10(signal / max(noise.sum(), 1e-30))))
        if len(items) == len(chosen):
            history.append((time.monotonic() - begin, sqnr))
        return sqnr, [-float(one) for one in noise]

    found = nncf.quantize_with_accuracy_control(
        model,
        nncf.Dataset([image[None] for image in np.load(calibrate)], lambda image: {NAME: image}),
        nncf.Dataset(chosen, lambda image: {NAME: image}),
        validation_fn=validate,
        max_drop=PERFECT - wanted,
        drop_type=nncf.DropType.ABSOLUTE,
    )
    seconds = time.monotonic() - begin
    np.save(logits, outputs(core.compile_model(found, "CPU"), (image[None] for image in np.load(held_out))))
    before, after = (core.compile_model(one, "CPU", THREADS) for one in (core.read_model(graph), found))
    figures = {
        "seconds": seconds,
        "in_time": max((sqnr for at, sqnr in history if at <= limit and sqnr < PERFECT), default=None),
        "tried": len(history),
        "select": history[-1][1],
        "float_layers": in_float(found),
        "speedup": speedup(before, after, chosen[0]),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
