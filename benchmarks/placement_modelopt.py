"""Our TensorRT placement of Q/DQ beside NVIDIA ModelOpt's on the same graphs, node by node.

    pip install 'nvidia-modelopt[onnx]'      # in an environment of its own: it pins old packages
    python benchmarks/placement_modelopt.py resnet50 densenet121 inception_v3 mobilenet_v2 vit_b_32 efficientnet_b0

An operand of a node counts as quantized where a DequantizeLinear makes it. Weights are random: placement does not look
at them. SQNR is that of each graph, run without fusing, to the FP32 graph, on other images than the 16 that both were
calibrated on (min/max); ours has FP16 scales.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from networks import simplified

from export_zoo.calibration.collect import collect
from export_zoo.calibration.preprocess import normalize
from export_zoo.calibration.synthetic import SyntheticStream, synthetic_images
from export_zoo.engines.parity.metrics import compare
from export_zoo.engines.precision.int8.qdq import quantize
from export_zoo.engines.precision.twin import write_twin
from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine
from export_zoo.engines.targets.registry import TARGETS

Operand = tuple[str, int]


def quantized_operands(path: Path) -> dict[Operand, str]:
    """Operator type by (node name, input index) of all quantized operands."""
    model = onnx.load(path)
    made_by = {name: node for node in model.graph.node for name in node.output}
    found: dict[Operand, str] = {}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Cast"):
            continue
        for index, name in enumerate(node.input):
            producer = made_by.get(name)
            while producer is not None and producer.op_type == "Cast":
                producer = made_by.get(producer.input[0])
            if producer is not None and producer.op_type == "DequantizeLinear":
                found[node.name, index] = node.op_type
    return found


def both(model: str, directory: Path) -> tuple[list[dict[Operand, str]], list[float]]:
    """Quantized operands of our graph and of ModelOpt's, and the SQNR of both in dB."""
    from modelopt.onnx.quantization import quantize as quantize_with_modelopt

    fp32, p = simplified(model, directory)
    ours, theirs = directory / "ours.onnx", directory / "theirs.onnx"
    stream = SyntheticStream(16, 0, p, 8)
    quantize(fp32, collect(fp32, stream), ours, rules=TARGETS["tensorrt"].int8)
    quantize_with_modelopt(
        str(fp32),
        quantize_mode="int8",
        calibration_data={"input": np.concatenate([normalize(batch, p) for batch in stream])},
        calibration_method="max",
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=str(theirs),
        log_level="ERROR",
    )
    write_twin(ours, directory / "twin.onnx")
    held_out = normalize(synthetic_images(16, p, 2), p)
    want = OnnxRuntimeEngine(fp32).run(held_out)
    found = [OnnxRuntimeEngine(path, fused=False).run(held_out) for path in (directory / "twin.onnx", theirs)]
    return [quantized_operands(path) for path in (ours, theirs)], [compare(want, f).sqnr for f in found]


def _summary(operands: dict[Operand, str]) -> str:
    counts = Counter(f"{op_type} input {index}" for (_, index), op_type in operands.items())
    return ", ".join(f"{count} x {what}" for what, count in sorted(counts.items())) or "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--nodes", action="store_true", help="name the nodes that differ")
    options = parser.parse_args()
    for model in options.models:
        with tempfile.TemporaryDirectory() as directory:
            (ours, theirs), (sqnr, sqnr_theirs) = both(model, Path(directory))
        print(f"{model}: ours {len(ours)}, ModelOpt's {len(theirs)}, both {len(ours.keys() & theirs.keys())}")
        print(f"  SQNR: ours {sqnr:.1f} dB, ModelOpt's {sqnr_theirs:.1f} dB")
        for who, mine, other in (("ours", ours, theirs), ("ModelOpt's", theirs, ours)):
            only = {operand: kind for operand, kind in mine.items() if operand not in other}
            print(f"  only {who}: {_summary(only)}")
            if options.nodes:
                print("    " + " ".join(f"{name}:{index}" for name, index in only))


if __name__ == "__main__":
    main()
