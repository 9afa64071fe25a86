"""How well `exporter/models/memory.py` foretells the peak memory that the matrix measured.

    python benchmarks/memory.py [docs/zoo/results]

Of each model: the expected peak, the measured ones of its FP32 and INT8 cells for ONNX Runtime (FP32 comes first, and
exports; INT8 calibrates), and the ratio to the larger. At the end the least and the largest ratio.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from export_zoo.exporter.matrix.results import CellResult, stored
from export_zoo.exporter.models import memory, zoo
from export_zoo.exporter.option_values import BatchRange
from export_zoo.exporter.options import ExportOptions


def expected(result: CellResult) -> float:
    """MiB."""
    batch = next(word for word in result.command if word.startswith("--batch=")).removeprefix("--batch=")
    spec = zoo.resolve(ExportOptions(result.model, weights="none", input_size=result.input_size))
    found = zoo.footprint(spec)
    assert found is not None
    calibrated = result.precision != "fp32"
    return memory.expected_bytes(found, calibrated=calibrated, batch=BatchRange.parse(batch).max) / memory.MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", default=Path("docs/zoo/results"))
    results = stored(parser.parse_args().results)
    ratios = []
    print(f"{'model':24s} {'input':>9s} {'expected':>9s} {'FP32':>7s} {'INT8':>7s}  expected/peak")
    for name in sorted({result.model for result in results.values()}):
        cells = {
            precision: cell
            for precision in ("fp32", "int8")
            if (cell := results.get(f"{name}-onnxruntime-{precision}")) is not None and cell.status == "ok"
        }
        if len(cells) < 2 or cells["int8"].input_size is None:
            continue
        peak = max(cell.peak_mib for cell in cells.values())
        ratios.append(expected(cells["int8"]) / peak)
        height, width = cells["int8"].input_size
        print(
            f"{name:24s} {height:>4d}x{width:<4d} {expected(cells['int8']):9.0f} {cells['fp32'].peak_mib:7d} "
            f"{cells['int8'].peak_mib:7d}  {ratios[-1]:.2f}"
        )
    if not ratios:
        raise SystemExit("no model has results of both FP32 and INT8 for onnxruntime")
    print(f"{len(ratios)} models, expected over measured peak {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
