"""How well `export-zoo diagnose` ranks layers, beside other rankings.

    python benchmarks/diagnosis_truth.py BUNDLE... [--images 32] [--engine NAME]

A layer's true share is what the INT8 engine gains if only this layer is float, on held-out images that the ranking did
not see: the noise that goes. A Markdown line for each bundle: Spearman's rank correlation with the truth, of the noise
that each layer alone brings (what `diagnose` ranks by), of the same of divergences, of the error of its own output, of
its weights' norm, and of 100 random orders (mean and standard deviation). The last column is what can be reached: the
correlation of the truth on one half of the images with that on the other.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from export_zoo.engines.diagnosis.diagnose import Subject
from export_zoo.engines.diagnosis.local import local_errors
from export_zoo.engines.diagnosis.mixtures import constant_array
from export_zoo.engines.diagnosis.ranking import effect


def correlation(first, second) -> float:
    return float(spearmanr(first, second)[0])


def row(bundle: Path, name: str | None, images: int) -> str:
    subject = Subject(bundle, name)
    layers, held = [layer.name for layer in subject.layers], len(subject.held.pixels)
    seen, unseen = subject.batches(0, images), subject.batches(images, held)
    began, exact = time.monotonic(), subject.outputs((), seen)
    alone = [effect(exact, subject.outputs([layer], seen)) for layer in layers]
    seconds = time.monotonic() - began
    reference = subject.held.logits[images:]
    noise = effect(reference, subject.outputs(layers, unseen)).noise
    truth = np.array(
        [
            noise - effect(reference, subject.outputs([x for x in layers if x != layer], unseen)).noise
            for layer in layers
        ]
    )
    local = local_errors(subject.counterparts, subject.layers, iter(subject.batches(0, 8, 1)))
    own = [(part.weights + part.clipping + part.rounding) / part.signal for part in map(local.get, layers)]
    norms = [float(np.linalg.norm(constant_array(subject.nodes[layer].inputs[1]))) for layer in layers]
    whole, random = truth.sum(axis=1), np.random.default_rng(0)
    orders = [correlation(random.permutation(len(layers)), whole) for _ in range(100)]
    cells = [
        f"{bundle.name} {subject.engine.name}",
        str(len(layers)),
        f"{correlation([found.noise.sum() for found in alone], whole):.2f}",
        f"{correlation([found.divergence.sum() for found in alone], whole):.2f}",
        f"{correlation(own, whole):.2f}",
        f"{correlation(norms, whole):.2f}",
        f"{np.mean(orders):.2f} ± {np.std(orders):.2f}",
        f"{correlation(truth[:, ::2].sum(axis=1), truth[:, 1::2].sum(axis=1)):.2f}",
        f"{seconds:.0f} s",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--engine")
    given = parser.parse_args()
    print(
        "| engine | layers | alone | divergence | own output | weight norm | random | truth, halves | time |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for bundle in given.bundles:
        print(row(bundle, given.engine, given.images), flush=True)


if __name__ == "__main__":
    main()
