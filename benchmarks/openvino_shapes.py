"""OpenVINO: one model of a dynamic batch, as in our engines, beside a model for each batch.

    python benchmarks/openvino_shapes.py BUNDLE [BUNDLE ...]

For each engine of `openvino` and each batch: the speed of a model of that batch over that of the dynamic one, in turn
on one thread, whether logits are equal, and what a further model costs: seconds to compile it, and memory.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import psutil

from export_zoo.base import graph_io
from export_zoo.base.machine import cpu_model, instruction_set, library_versions
from export_zoo.calibration.preprocess import normalize
from export_zoo.engines.bundle.reader import held_out, read_manifest
from export_zoo.engines.targets.base import OpenEngine
from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine
from export_zoo.engines.targets.openvino.engine import OpenVinoEngine
from export_zoo.engines.verification.throughput import Setting, in_turn


def of_one_batch(graph: Path, batch: int, out: Path) -> None:
    """Write the graph with an input of this batch only."""
    model = graph_io.load(graph)
    feed = model.graph.inputs[0]
    assert feed.shape is not None
    feed.shape = ir.Shape([batch, *feed.shape[1:]])
    graph_io.save(model, out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--batches", nargs="+", type=int, choices=range(1, 1025), metavar="N", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each engine")
    given = parser.parse_args()
    for place in given.bundles:
        manifest = read_manifest(place)
        if not any(engine.target == "openvino" for engine in manifest.artifacts.engines):
            parser.error(f"{place}: has no engine of openvino: export with --target openvino")
        if max(given.batches) > (most := min(manifest.artifacts.held_out.count, manifest.recipe.batch.max)):
            parser.error(f"--batches {max(given.batches)}: {place} has {most} images for a batch")
    print(f"{cpu_model()}, {instruction_set()}, {library_versions('openvino')}\n")
    print(
        "| model | engine | batch | over dynamic | logits | compile s | MiB |\n|---|---|---|---|---|---|---|"
    )
    for place in given.bundles:
        manifest = read_manifest(place)
        pixels = held_out(place, manifest).pixels
        baseline: OpenEngine = OnnxRuntimeEngine(place / manifest.recipe.graph.path, threads=1)
        for engine in manifest.artifacts.engines:
            if engine.target != "openvino":
                continue
            dynamic = OpenVinoEngine(place / engine.file.path, threads=1)
            for batch in given.batches:
                images = normalize(pixels[:batch], manifest.recipe.preprocess)
                dynamic.run_all(images)
                with tempfile.TemporaryDirectory() as directory:
                    of_one_batch(place / engine.file.path, batch, Path(directory) / "fixed.onnx")
                    before, start = psutil.Process().memory_info().rss, time.perf_counter()
                    fixed = OpenVinoEngine(Path(directory) / "fixed.onnx", threads=1)
                    took = time.perf_counter() - start
                same = all(
                    np.array_equal(one, other)
                    for one, other in zip(dynamic.run_all(images), fixed.run_all(images), strict=True)
                )
                more = (psutil.Process().memory_info().rss - before) / 2**20
                running = {"onnxruntime-fp32": [baseline], "dynamic": [dynamic], "fixed": [fixed]}
                points = {p.engine: p for p in in_turn(running, images, Setting(batch, 1, 1), given.seconds)}
                ratio = points["fixed"].images_per_second / points["dynamic"].images_per_second
                print(
                    f"| {place.stem} | {engine.name} | {batch} | {ratio:.2f}x "
                    f"| {'equal' if same else 'differ'} | {took:.1f} | {more:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
