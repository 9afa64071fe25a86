"""Draw what the INT8 benchmarks measured: plot.py QUALITY.json COST.json... --out docs

writes int8-quality.svg and calibration-cost.svg. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams |= {"svg.hashsalt": "export-zoo", "svg.fonttype": "none"}  # the same file for the same figures

import matplotlib.pyplot as plt  # noqa: E402

OURS, THEIRS = "#1b6ca8", "#c9c9c9"


def quality(rows: list[dict[str, Any]], out: Path) -> None:
    """Mean SQNR over seeds of ours and of the best peer, per network; a panel for each target and kind."""
    panels = [(p, k) for p in ("onnxruntime", "tensorrt-rtx") for k in ("plain", "twin")]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 3.2), sharey=True)
    for axis, (policy, kind) in zip(axes, panels, strict=True):
        for index, model in enumerate(models):
            figures: dict[str, list[float]] = {}
            for row in rows:
                if (row["model"], row["policy"], row["kind"]) == (model, policy, kind):
                    figures.setdefault(row["who"], []).append(row["sqnr"])
            means = {who: statistics.mean(values) for who, values in figures.items()}
            mine = means.pop("ours")
            axis.bar(index - 0.2, mine, 0.38, color=OURS, label="ours" if not index else None)
            best = max(means.values(), default=0)
            axis.bar(index + 0.2, best, 0.38, color=THEIRS, label="best peer" if not index else None)
        axis.set_title(f"{policy}, {'as trained' if kind == 'plain' else 'rescaled twin'}", fontsize=9)
        axis.set_xticks(range(len(models)), models, rotation=20, fontsize=7)
    axes[0].set_ylabel("SQNR, dB")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "int8-quality.svg", metadata={"Date": None})


def cost(rows: list[dict[str, Any]], out: Path) -> None:
    """Calibration time over plain forward passes."""
    rows = [row for row in rows if "ratio" in row]
    figure, axis = plt.subplots(figsize=(8, 0.24 * len(rows) + 0.8))
    names = [f"{row['model']}, {row['images']} images  {row['who']} {row['method']}" for row in rows]
    colours = [OURS if row["who"] == "ours" else THEIRS for row in rows]
    axis.barh(range(len(rows)), [row["ratio"] for row in rows], color=colours)
    axis.set_yticks(range(len(rows)), names, fontsize=7)
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=0.6)
    axis.set_xlabel("calibration time / plain forward passes", fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "calibration-cost.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("quality", type=Path, help="of int8_quality.py --json")
    parser.add_argument("cost", type=Path, nargs="+", help="of calibration_cost.py --json")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args()
    quality(json.loads(options.quality.read_text()), options.out)
    cost([row for path in options.cost for row in json.loads(path.read_text())], options.out)


if __name__ == "__main__":
    main()
