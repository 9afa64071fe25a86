"""Measures what a matrix costs beside its cells: on a Ray cluster, by number of cells and compared with one machine.

    python benchmarks/matrix_scale.py --cells 10000
    python benchmarks/matrix_scale.py --overhead ci/matrix.yaml --job sample

The first runs cells that do nothing on a Ray cluster of one node, and prints seconds and the driver's memory. The other
runs a matrix by `--on local` and by `--on ray`, in turn, each time without a cache, and prints seconds and their ratio.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from export_zoo.exporter.cli.export import read_arguments
from export_zoo.exporter.cluster.files import packed
from export_zoo.exporter.cluster.ray_cluster import RayCluster
from export_zoo.exporter.matrix import cell, plan
from export_zoo.exporter.matrix import run as matrix_run
from export_zoo.exporter.matrix.cluster_place import ClusterPlace, Delivery, Order
from export_zoo.exporter.matrix.results import CellResult

RAY = str(Path(sys.executable).with_name("ray"))
"""Ray's command in this environment, whether or not that is activated."""

TEXT = "models: resnet18\nprecisions: fp32\ntargets: onnxruntime\n"


def nothing(places: Sequence[str], order: Order) -> Delivery:
    """The task of a cell that does nothing."""
    one = order.cell
    result = CellResult(
        one.model, one.target, one.precision, tuple(one.command()), "ok", versions=cell.versions(one)
    )
    return Delivery(result, packed(Path()))


def peak_mib() -> float:
    """Largest memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def many(count: int, at_once: int) -> None:
    """Run cells that do nothing, and print what they cost."""
    import ray

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "matrix.yaml"
        file.write_text(TEXT)
        (one,) = plan.cells(file, plan.read(file), plan.Names(("resnet18",)), read_arguments)
        cells = [dataclasses.replace(one, model=f"network{index}") for index in range(count)]
        ray.init(num_cpus=at_once, log_to_driver=False)
        place = ClusterPlace(RayCluster(None), cores=1, task=nothing)
        before, begin = peak_mib(), time.perf_counter()
        options = {"seconds": 60, "place": place, "keep_bundles": False}
        results = matrix_run.run(cells, Path(directory) / "out", **options)
        seconds, after = time.perf_counter() - begin, peak_mib()
        assert len(results) == count, "a result for each cell"
        assert {result.status for result in results} == {"ok"}, results[0].reason
        begin = time.perf_counter()
        assert matrix_run.run(cells, Path(directory) / "out", **options) == results, "found, not made again"
        ray.shutdown()
    print(
        f"{count} cells that do nothing, {at_once} at once: {seconds:.0f} s, {1e3 * seconds / count:.1f} ms each"
    )
    print(f"driver: {after:.0f} MiB at most, {before:.0f} MiB before the first cell")
    print(f"a second run, which finds their results: {time.perf_counter() - begin:.0f} s")


def timed(file: Path, job: str | None, place: str, out: Path) -> float:
    """Seconds of a matrix in a process of its own, with an empty cache, which the node of a cluster has, too."""
    command = [
        sys.executable,
        "-m",
        "export_zoo",
        "matrix",
        str(file),
        "--on",
        place,
        "--out",
        str(out),
        "--quiet",
    ]
    command += [f"--job={job}"] if job is not None else []
    environment = {**os.environ, "EXPORT_ZOO_CACHE": str(out / "cache")}
    start = [RAY, "start", "--head", "--include-dashboard=false"]
    try:
        if place == "ray":
            subprocess.run(start, check=True, env=environment, capture_output=True)
        begin = time.perf_counter()
        subprocess.run(command, check=True, env=environment)
        return time.perf_counter() - begin
    finally:
        if place == "ray":
            subprocess.run([RAY, "stop"], check=False, capture_output=True)


def overhead(file: Path, job: str | None, repeats: int) -> None:
    """Run a matrix on this machine and on a Ray cluster of this machine, in turn, and print the ratio."""
    seconds: dict[str, list[float]] = {"local": [], "ray": []}
    for repeat in range(repeats):
        for place in ("local", "ray") if repeat % 2 == 0 else ("ray", "local"):
            with tempfile.TemporaryDirectory() as directory:
                seconds[place].append(timed(file, job, place, Path(directory)))
    for place, found in seconds.items():
        print(f"--on {place}: " + ", ".join(f"{value:.1f} s" for value in found))
    ratio = statistics.median(seconds["ray"]) / statistics.median(seconds["local"])
    print(f"ratio of the medians: {ratio:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, help="number of cells that do nothing")
    parser.add_argument("--at-once", type=int, default=8, help="of these, at once")
    parser.add_argument("--overhead", type=Path, metavar="FILE", help="matrix file")
    parser.add_argument("--job", help="job of that file")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.cells:
        many(options.cells, options.at_once)
    if options.overhead:
        overhead(options.overhead, options.job, options.repeats)


if __name__ == "__main__":
    main()
