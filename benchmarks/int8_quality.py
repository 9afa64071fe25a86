"""INT8 accuracy of our engines beside the peers': networks trained on digits, and the same networks rescaled.

    python benchmarks/int8_quality.py
    python benchmarks/int8_quality.py --modelopt .venv-modelopt/bin/python --json result.json

A rescaled twin has powers of two (2^-5 to 2^5 a channel) moved between the channels of neighbouring layers: the same
function to the bit, in PyTorch, too. Ours is what `export-zoo` makes with its defaults. Peers get the same FP32 graph
and the same images to calibrate on; all are judged on the same held-out images, by SQNR to eager PyTorch's logits and
by top-1 agreement. ModelOpt patches ONNX Runtime's quantizer: it has an environment of its own. What it leaves
unquantized is FP16, its default, and its graphs are run as ours of TensorRT are: on the CPU, rounding to half where an
engine would.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import digits as recipe  # noqa: E402
import torch  # noqa: E402
from peers import quantize_with_onnxruntime  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from export_zoo import ExportOptions, export  # noqa: E402
from export_zoo.base import graph_io  # noqa: E402
from export_zoo.base.machine import cpu_model, library_versions  # noqa: E402
from export_zoo.calibration import images  # noqa: E402
from export_zoo.calibration.preprocess import normalize  # noqa: E402
from export_zoo.engines.bundle import reader as bundle  # noqa: E402
from export_zoo.engines.parity.metrics import compare  # noqa: E402
from export_zoo.engines.precision.int8 import equalize  # noqa: E402
from export_zoo.engines.precision.twin import write_twin  # noqa: E402
from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine  # noqa: E402
from export_zoo.engines.verification.gate import run_in_batches  # noqa: E402
from export_zoo.exporter.option_values import BatchRange, Tolerance  # noqa: E402
from export_zoo.exporter.pipeline import KeptError  # noqa: E402

MODELS = ("resnet18", "mobilenet_v2", "squeezenet1_1", "vgg11_bn")
TARGETS = ("onnxruntime", "tensorrt-rtx")


def rescale(graph: Path, state: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """The state dict with powers of two moved across every link of the graph."""
    twin = {name: tensor.clone() for name, tensor in state.items()}
    rng, names = np.random.default_rng(seed), list(twin)
    for link in equalize.links(graph_io.load(graph).graph):
        scales = torch.from_numpy(np.exp2(rng.integers(-5, 6, link.channels)).astype(np.float32))
        module = graph_io.module_of(link.producer)
        following = [
            name for name in names[names.index(f"{module}.weight") :] if not name.startswith(f"{module}.")
        ]
        norm = following[0].rpartition(".")[0]
        scaled = (
            norm if f"{norm}.running_mean" in twin else module
        )  # the BatchNorm that was folded into it, if any
        for kind in ("weight", "bias"):
            tensor = twin[f"{scaled}.{kind}"]
            tensor *= scales.reshape(-1, *[1] * (tensor.ndim - 1))
        for reader in link.readers:
            value = reader.node.inputs[1]
            weight = twin[str(value.name if value is not None else "")]
            factors = scales.repeat_interleave(reader.repeat)
            part = slice(reader.offset, reader.offset + len(factors))
            if weight.ndim == 4 and weight.shape[1] == 1 and len(weight) == len(scales):  # depthwise
                weight /= scales.reshape(-1, 1, 1, 1)
            else:
                weight[:, part] /= factors.reshape(1, -1, *[1] * (weight.ndim - 2))
    return twin


def ours(model: str, weights: Path, folder: Path, out: Path) -> dict[str, dict[str, Any]]:
    """Figures of our INT8 engines by target, and the bundle at `out` (or `out`.failed)."""
    anything = tuple(
        Tolerance.parse(f"{m}={v}")
        for m, v in (
            ("sqnr", "-100"),
            ("top1", "0"),
            ("cosine", "-1"),
            ("accuracy_drop", "1"),
            ("misplaced", "1"),
        )
    )
    options = ExportOptions(
        model,
        precisions=("int8",),
        targets=TARGETS,
        calib=folder,
        verify_images=224,
        weights=str(weights),
        num_classes=10,
        input_size=(32, 32),
        resize_size=32,
        batch=BatchRange.parse("8"),
        tolerances=anything,
        out=out,
    )
    try:
        result = export(options)
    except KeptError as error:
        result = error.result
    return {
        e.target: {"sqnr": e.gate.eager_metrics["sqnr"], "top1": e.gate.eager_metrics["top1"]}
        for e in result.engines
    }


def theirs(place: Path, folder: Path, modelopt: str | None) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Figures of each peer, and the policy that it competes with."""
    manifest = bundle.read_manifest(place)
    p, held = manifest.recipe.preprocess, bundle.held_out(place, manifest)
    splits = images.split(images.scan(folder, option="--calib"), calibrate=512, verify=224, seed=0)
    pixels = images.ImageStream(splits["calibrate"], p, 8, folder).all()
    graph = place / manifest.recipe.graph.path

    def judge(path: Path, *, half: bool) -> dict[str, Any]:
        if half:
            write_twin(path, path.with_suffix(".twin.onnx"))
            engine = OnnxRuntimeEngine(path.with_suffix(".twin.onnx"), fused=False)
        else:
            engine = OnnxRuntimeEngine(path)
        (found,) = run_in_batches(engine, held.pixels, p, 8)
        metrics = compare(held.logits, found)
        return {"sqnr": metrics.sqnr, "top1": metrics.top1}

    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "peer.onnx"
        for activations in ("uint8", "int8"):
            for method in ("MinMax", "Entropy", "Percentile"):
                batches = (normalize(pixels[start : start + 8], p) for start in range(0, len(pixels), 8))
                quantize_with_onnxruntime(graph, out, batches, method=method, activations=activations)
                yield "onnxruntime", f"onnxruntime {method} {activations}", judge(out, half=False)
        if modelopt:
            inputs = Path(directory) / "inputs.npy"
            np.save(inputs, normalize(pixels, p))
            for method in ("max", "entropy"):
                worker = Path(__file__).with_name("modelopt_worker.py")
                command = [modelopt, worker, graph, inputs, method, out]
                subprocess.run([*map(str, command)], check=True, capture_output=True)
                yield "tensorrt-rtx", f"modelopt {method}", judge(out, half=True)


def rows(model: str, seed: int, modelopt: str | None, directory: Path) -> Iterator[dict[str, Any]]:
    folder = directory / "images"
    recipe.write_images(folder)
    network, accuracy = recipe.train(model, seed)
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(state, directory / "plain.safetensors")
    figures = ours(model, directory / "plain.safetensors", folder, directory / "plain")
    place = directory / "plain"
    manifest = bundle.read_manifest(place)
    save_file(rescale(place / manifest.recipe.graph.path, state, seed + 100), directory / "twin.safetensors")
    for kind in ("plain", "twin"):
        place = directory / kind
        if kind == "twin":
            figures = ours(model, directory / "twin.safetensors", folder, place)
        about = {"model": model, "seed": seed, "kind": kind, "accuracy": accuracy}
        for target in TARGETS:
            yield {**about, "policy": target, "who": "ours", **figures[target]}
        for policy, who, figure in theirs(place, folder, modelopt):
            yield {**about, "policy": policy, "who": who, **figure}


def table(found: list[dict[str, Any]]) -> None:
    """Mean SQNR over seeds of ours, and of the best peer on each network."""
    print(
        f"{'model':<15}{'kind':<7}{'policy':<14}{'ours dB':>8}{'top-1':>8}  {'best peer':<28}{'dB':>6}{'top-1':>8}"
    )
    gains: dict[str, list[float]] = {}
    keys = list(dict.fromkeys((r["model"], r["kind"], r["policy"]) for r in found))
    for key in keys:
        here = [r for r in found if (r["model"], r["kind"], r["policy"]) == key]
        means = {
            who: [statistics.mean(r[m] for r in here if r["who"] == who) for m in ("sqnr", "top1")]
            for who in dict.fromkeys(r["who"] for r in here)
        }
        mine = means.pop("ours")
        line = f"{key[0]:<15}{key[1]:<7}{key[2]:<14}{mine[0]:>8.1f}{100 * mine[1]:>7.1f}%"
        if means:
            best = max(means, key=lambda who: means[who][0])
            gains.setdefault(f"{key[1]} {key[2]}", []).append(mine[0] - means[best][0])
            line += f"  {best:<28}{means[best][0]:>6.1f}{100 * means[best][1]:>7.1f}%"
        print(line)
    for name, values in gains.items():
        print(f"mean over models, {name}: {statistics.mean(values):+.1f} dB beside the best peer on each")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--modelopt", help="Python of an environment that has nvidia-modelopt[onnx]")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(f"{cpu_model()}; {library_versions('torch', 'onnxruntime', 'tensorrt-rtx')}")
    found: list[dict[str, Any]] = []
    for model in options.models:
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as directory:
                for row in rows(model, seed, options.modelopt, Path(directory)):
                    found.append(row)
                    if options.json:  # as it goes: a run takes an hour
                        options.json.write_text(json.dumps(found, indent=1) + "\n")
                    print(
                        f"  {row['model']} seed {row['seed']} {row['kind']:<6}{row['policy']:<14}{row['who']:<28}"
                        f"{row['sqnr']:>6.1f} dB {100 * row['top1']:>6.1f} %",
                        flush=True,
                    )
    table(found)


if __name__ == "__main__":
    main()
