"""Cost of an INT8 graph that cannot saturate: accuracy, time and instructions, beside the other ways out.

    python benchmarks/saturation_cost.py BUNDLE --images DIR [--instructions] [--json FILE]

BUNDLE is any bundle with an INT8 engine for onnxruntime that was calibrated; DIR holds images, of which those that the
bundle was verified on are left out. From its FP32 graph and ranges five INT8 graphs are made, all with weights rounded
by the same images and with biases corrected:

    free          weights as they are best, which saturate on CPUs without VNNI
    pairs         no two neighbours overflow 16 bits
    safe          the product's: channels have changed places before that
    7 bits        every weight within 63
    uint8         `free` with uint8 weights, whose sums are taken in 32 bits

Each is compared with eager PyTorch on the held-out images, in a plain session and in one with
session.x64quantprecision=1, and timed in turn with the others on this CPU. --instructions counts those of one image
with callgrind (valgrind), which presents a CPU with AVX2 and without AVX-512: two minutes for each way.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from export_zoo.base import graph_io  # noqa: E402
from export_zoo.base.machine import cpu_model, instruction_set, library_versions  # noqa: E402
from export_zoo.calibration.images import IMAGE_SUFFIXES  # noqa: E402
from export_zoo.calibration.layer_inputs import layer_statistics  # noqa: E402
from export_zoo.calibration.preprocess import normalize, read_pixels  # noqa: E402
from export_zoo.calibration.ranges import Ranges  # noqa: E402
from export_zoo.engines.bundle import reader  # noqa: E402
from export_zoo.engines.parity.metrics import compare  # noqa: E402
from export_zoo.engines.precision.int8 import int8_weights  # noqa: E402
from export_zoo.engines.precision.int8.qdq import quantize  # noqa: E402
from export_zoo.engines.precision.int8.rounding import LARGEST, rounding  # noqa: E402
from export_zoo.engines.precision.int8.rules import Int8Rules  # noqa: E402
from export_zoo.engines.precision.int8.saturation.channel_order import ChannelOrder  # noqa: E402
from export_zoo.engines.precision.int8.saturation.pairs import saturating_layers  # noqa: E402
from export_zoo.engines.precision.int8.saturation.probe import EXACT_SESSION, saturates  # noqa: E402
from export_zoo.engines.precision.int8.saturation.unsigned import unsigned_weights  # noqa: E402
from export_zoo.engines.precision.placement import weight_of  # noqa: E402
from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine  # noqa: E402
from export_zoo.engines.targets.registry import TARGETS  # noqa: E402
from export_zoo.engines.verification import bench  # noqa: E402
from export_zoo.engines.verification.gate import run_in_batches  # noqa: E402

IMAGES = 128
AS_IT_IS = ChannelOrder({}, {})
COUNTED_WAYS = ("fp32", "free", "safe", "uint8", "free, exact session")

COUNTED = """
import sys
import numpy as np
import onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = 1
for entry in sys.argv[4:]:
    options.add_session_config_entry(*entry.split("="))
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
x = np.load(sys.argv[2])
for _ in range(int(sys.argv[3])):
    session.run(None, {session.get_inputs()[0].name: x})
"""


def graphs(root: Path, folder: Path, out: Path) -> dict[str, Path]:
    """The INT8 graphs by name."""
    manifest = reader.read_manifest(root)
    p, graph = manifest.recipe.preprocess, root / manifest.recipe.graph.path
    ranges = Ranges.read(root / manifest.recipe.calibration.ranges.path)
    held = set(manifest.artifacts.held_out.image_sha256)
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
    files = [f for f in files if graph_io.sha256_of(f) not in held]
    chosen = files[:: max(1, len(files) // IMAGES)][:IMAGES]
    pixels = np.stack([read_pixels(f.read_bytes(), p)[0] for f in chosen])
    layers = [str(n.name) for n in graph_io.load(graph).graph if weight_of(n) is not None]
    found = dict(layer_statistics(graph, pixels, p, layers, largest=LARGEST))
    moments = {name: each.moments for name, each in found.items() if each.moments is not None}
    means = {name: each.mean for name, each in found.items()}

    safe = TARGETS["onnxruntime"].int8
    free = replace(safe, sums_in_16_bits=False)

    def write(name: str, order: ChannelOrder | None, rules: Int8Rules = safe) -> None:
        steps = rounding(graph_io.load(graph).graph, moments.items(), rules, order=order)
        quantize(graph, ranges, made[name], rules=rules, means=means, rounding=steps, order=order)

    made = {
        name: out / f"{name.replace(' ', '-')}.onnx" for name in ("free", "pairs", "safe", "7 bits", "uint8")
    }
    write("safe", None)
    write("pairs", AS_IT_IS)
    write("free", None, free)
    with (
        mock.patch.object(int8_weights, "MAX_WEIGHT", 63),
        mock.patch("export_zoo.engines.precision.int8.rounding.MAX_WEIGHT", 63),
    ):
        write("7 bits", None, free)
    model = graph_io.load(made["free"])
    unsigned_weights(model.graph)
    graph_io.save(model, made["uint8"])
    return made


def instructions(graph: Path, inputs: Path, session: dict[str, str]) -> float:
    """Instructions of one run, in millions: those of 101 runs, less those of one, by 100.

    Starting Python takes a thousand million, and some millions more or less each time.
    """
    counts = []
    for runs in (1, 101):
        command = [
            "valgrind",
            "--tool=callgrind",
            "--callgrind-out-file=/dev/null",
            sys.executable,
            "-c",
            COUNTED,
        ]
        entries = [f"{key}={value}" for key, value in session.items()]
        done = subprocess.run(
            [*command, str(graph), str(inputs), str(runs), *entries],
            capture_output=True,
            text=True,
            check=True,
        )
        counts.append(int(re.search(r"Collected : (\d+)", done.stderr).group(1)))
    return (counts[1] - counts[0]) / 100e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--instructions", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    manifest = reader.read_manifest(given.bundle)
    held, p = reader.held_out(given.bundle, manifest), manifest.recipe.preprocess
    fp32 = given.bundle / manifest.recipe.graph.path
    print(f"{cpu_model()}, {instruction_set()}, {library_versions('onnxruntime')}")
    print(f"sums of uint8 x int8 saturate here: {saturates()}")
    with tempfile.TemporaryDirectory() as directory:
        made = {"fp32": fp32, **graphs(given.bundle, given.images, Path(directory))}
        ways = {name: (path, {}) for name, path in made.items()}
        ways["free, exact session"] = (made["free"], dict(EXACT_SESSION))
        ways["safe, exact session"] = (made["safe"], dict(EXACT_SESSION))
        sessions = {
            name: OnnxRuntimeEngine(path, threads=given.threads, saturating_session=session)
            for name, (path, session) in ways.items()
        }
        times = {}
        for batch in (1, 8):
            index = np.arange(batch) % len(held.pixels)
            inputs = normalize(held.pixels[index], p)
            times[batch] = bench.measure(sessions, inputs, baseline="fp32", machine=cpu_model())
        np.save(Path(directory) / "one.npy", normalize(held.pixels[:1], p))
        rows, logits = [], {}
        for name, (path, session) in ways.items():
            logits[name] = run_in_batches(sessions[name], held.pixels, p, manifest.recipe.batch.opt)[0]
            found = compare(held.logits, logits[name])
            row = {
                "way": name,
                "can_saturate": bool(saturating_layers(graph_io.load(path).graph)),
                "sqnr": found.sqnr,
                "agreement": found.top1,
                "ms_batch_1": times[1][name].median_ms,
                "ms_batch_8": times[8][name].median_ms,
                "speedup_batch_1": times[1][name].speedup,
                "speedup_batch_8": times[8][name].speedup,
            }
            count = ""
            if given.instructions and name in COUNTED_WAYS:
                row["million_instructions"] = instructions(path, Path(directory) / "one.npy", session)
                count = f"  {row['million_instructions']:8.1f} M instructions"
            rows.append(row)
            print(
                f"{name:20} {found.sqnr:7.2f} dB  {100 * found.top1:5.1f} %  batch 1 {row['ms_batch_1']:7.2f} ms "
                f"{row['speedup_batch_1']:5.2f}x  batch 8 {row['ms_batch_8']:7.2f} ms {row['speedup_batch_8']:5.2f}x"
                f"  {'can saturate' if row['can_saturate'] else 'cannot'}{count}",
                flush=True,
            )
    same = bool(np.array_equal(logits["safe"], logits["safe, exact session"]))
    print(f"safe: a plain and an exact session give the same bits: {same}")
    if given.json:
        document = {"machine": cpu_model(), "instruction_set": instruction_set(), "threads": given.threads}
        versions = library_versions("onnxruntime")
        given.json.write_text(
            json.dumps({**document, "versions": versions, "same": same, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
