"""Latencies of a bundle's engines that `load` measured on this machine, kept for the next process.

The C++ library reads and writes the same files (engines/cpp/src/local_latencies.cpp).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

from export_zoo.base.files import cache_directory, replacing
from export_zoo.base.graph_io import sha256_of
from export_zoo.base.machine import instruction_set
from export_zoo.engines.bundle.reader import MANIFEST


def file_for(bundle: Path, gpu: str | None, threads: int) -> Path | None:
    """The file of a bundle's latencies on machines like this one.

    Args:
        gpu: compute capability of the GPU that would run the bundle's engines; None if all of them run on the CPU.
        threads: number of ONNX Runtime's threads, 0 for all cores.

    Returns:
        None if the user has no home directory to keep it in.
    """
    machine = [instruction_set()] if gpu is None else [instruction_set(), gpu]
    name = "-".join([sha256_of(bundle / MANIFEST)[:32], *machine, str(threads)])
    try:
        return cache_directory() / "latencies" / f"{name}.json"
    except RuntimeError:
        return None


def read(path: Path | None) -> dict[str, float]:
    """Median latency in milliseconds, by engine; empty if there is no file or if it is damaged."""
    if path is None:
        return {}
    try:
        document = json.loads(path.read_bytes())
        return {str(name): float(ms) for name, ms in document["median_ms"].items() if float(ms) > 0}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def write(path: Path | None, median_ms: Mapping[str, float]) -> None:
    """Keep latencies. A file that cannot be written is no error: the next process measures again."""
    if path is None:
        return
    text = json.dumps({"median_ms": dict(median_ms)}, indent=1) + "\n"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
