"""The C++ library and zoo-serve against what one would write without them: ratios taken in one run.

    bash ci/cpp.sh                                          # builds what is measured
    .venv/bin/pip install fastapi 'uvicorn[standard]'       # the peer of zoo-serve
    sudo apt-get install wrk                                # asks both
    .venv/bin/python benchmarks/cpp.py --json bench-results/cpp.json

Without --bundle, one of resnet18 (random weights: speed does not depend on them) is exported first. zoo-serve is
compared with FastAPI on an otherwise idle machine and beside one busy process.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import overload as load
import psutil
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from torchvision.transforms._presets import ImageClassification

from export_zoo.base.machine import cpu_model, instruction_set, library_versions

ROOT = Path(__file__).parent.parent
SIDES = (320, 640, 1920, 4000)  # longer sides of the photographs, pixels

WRK = """
local bodies, at = {}, 0
function init(args)
  for i, path in ipairs(args) do
    local file = assert(io.open(path, "rb"))
    bodies[i] = file:read("*all")
    file:close()
  end
end
function request()
  at = at % #bodies + 1
  return wrk.format("POST", nil, nil, bodies[at])
end
function done(summary, latency, requests)
  local form = '{"requests": %d, "seconds": %f, "status": %d, "broken": %d, "p50_ms": %f, "p99_ms": %f}'
  io.write("\\nRESULT ", string.format(form,
    summary.requests, summary.duration / 1e6, summary.errors.status,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3), "\\n")
end
"""


def photographs(directory: Path) -> dict[int, list[Path]]:
    """scikit-learn's two photographs as JPEGs of several sizes."""
    found: dict[int, list[Path]] = {}
    for side in SIDES:
        for i, pixels in enumerate(load_sample_images().images):
            image = Image.fromarray(pixels)
            path = directory / f"{side}-{i}.jpg"
            image.resize((side, side * image.height // image.width), Image.Resampling.LANCZOS).save(
                path, quality=90
            )
            found.setdefault(side, []).append(path)
    return found


def libonnxruntime() -> str:
    return str(next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")))


def run(*command: object) -> str:
    environment = {**os.environ, "EXPORT_ZOO_ONNXRUNTIME": libonnxruntime()}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{command[0]}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def infer(build: Path, bundle: Path, engines: list[dict[str, Any]], rounds: int) -> Iterator[dict[str, Any]]:
    """Context::infer over a bare call of ONNX Runtime's C++ API: the median over the bare one's median."""
    for engine in engines:
        for threads in (1, os.cpu_count() or 1):
            for batch in (1, 8):
                output = run(
                    build / "benchmarks" / "bench-infer",
                    *(bundle, engine["name"], bundle / engine["file"]["path"], batch, threads, rounds),
                )
                times = np.array([line.split() for line in output.splitlines()], np.float64)
                ours, bare = np.median(times, axis=0) / 1e3
                yield {
                    "engine": engine["name"],
                    "threads": threads,
                    "batch": batch,
                    "ours_ms": ours,
                    "bare_ms": bare,
                    "ratio": ours / bare,
                }


def preprocess(
    build: Path, bundle: Path, files: dict[int, list[Path]], resize: int, crop: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """JPEG bytes to tensor, one thread each, Pillow and torchvision over ours."""
    torch.set_num_threads(1)
    transform = ImageClassification(crop_size=crop, resize_size=resize)
    for side, paths in files.items():
        bodies = [path.read_bytes() for path in paths]
        ours, theirs = [], []
        for _ in range(rounds):
            output = run(build / "benchmarks" / "bench-preprocess", bundle, 5, *paths)
            ours += [float(line) for line in output.split()][1:]  # the first warms up
            for repeat in range(5):
                start = time.perf_counter()
                for body in bodies:
                    transform(ImageOps.exif_transpose(Image.open(io.BytesIO(body))).convert("RGB"))
                if repeat:
                    theirs.append((time.perf_counter() - start) * 1e3)
        mine, peer = np.median(ours) / len(paths), np.median(theirs) / len(paths)
        yield {"side": side, "ours_ms": mine, "torchvision_ms": peer, "ratio": peer / mine}


@contextmanager
def running(command: list[object], **environment: object) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """The port of a server that answers /healthz, and its process; it is stopped at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    known = {**os.environ, "EXPORT_ZOO_ONNXRUNTIME": libonnxruntime()}
    process = subprocess.Popen(
        [*map(str, command), "--port", str(port)],
        env=known | {name: str(value) for name, value in environment.items()},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit(f"{command[0]}: ended with {process.returncode}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        yield port, process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def ask(port: int, script: Path, files: list[Path], connections: int, seconds: int) -> dict[str, Any]:
    url = f"http://127.0.0.1:{port}/v1/predict"
    output = run(
        *("wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s", "-s", script, url),
        *("--", *files),
    )
    result: dict[str, Any] = json.loads(output.split("RESULT")[1].strip().splitlines()[0])
    if result["status"] or result["broken"]:
        raise SystemExit(f"{url}: {result}")
    return result


def cpu_seconds(process: psutil.Process) -> float:
    """CPU time of a process and its children, in seconds."""
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


@contextmanager
def busy(is_busy: bool) -> Iterator[None]:
    """A process that keeps one core busy, or none."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if is_busy else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def serve(
    build: Path, bundle: Path, engine: dict[str, Any], files: list[Path], size: tuple[int, int], seconds: int
) -> Iterator[dict[str, Any]]:
    """zoo-serve over FastAPI in its better set-up: requests a second, and CPU time of each request."""
    resize, crop = size
    cores = os.cpu_count() or 1
    program = build / "examples" / "zoo-serve" / "zoo-serve"
    ways: dict[str, tuple[list[object], dict[str, object]]] = {
        # FastAPI has no deadline. With one, 64 connections to a slow network would be refused instead of answered late.
        "zoo-serve": ([program, bundle, "--engine", engine["name"], "--deadline", 60000], {}),
    }
    for workers, threads in ((1, cores), (cores, 1)):
        ways[f"FastAPI, {workers} workers of {threads} threads"] = (
            [
                *(sys.executable, "-m", "uvicorn", "fastapi_service:app", "--app-dir", Path(__file__).parent),
                *("--workers", workers, "--log-level", "critical", "--no-access-log"),
            ],
            {
                "PEER_ENGINE": bundle / engine["file"]["path"],
                "PEER_THREADS": threads,
                "PEER_RESIZE": resize,
                "PEER_CROP": crop,
            },
        )
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory) / "post.lua"
        script.write_text(WRK)
        for is_busy, connections in itertools.product((False, True), (1, 16, 64)):
            rows = []
            for who, (command, environment) in ways.items():
                with running(command, **environment) as (port, process), busy(is_busy):
                    ask(port, script, files, connections, 2)  # warms up
                    before = cpu_seconds(psutil.Process(process.pid))
                    found = ask(port, script, files, connections, seconds)
                    used = cpu_seconds(psutil.Process(process.pid)) - before
                    rate, cpu_ms = found["requests"] / found["seconds"], 1e3 * used / found["requests"]
                rows.append({"who": who, "rate": rate, "cpu_ms": cpu_ms, **found})
            ours, *peers = rows
            best = max(peers, key=lambda row: row["rate"])
            yield {
                "model": bundle.stem,
                "engine": engine["name"],
                "machine": "busy" if is_busy else "idle",
                "connections": connections,
                "ratio": ours["rate"] / best["rate"],
                "cpu_ratio": ours["cpu_ms"] / best["cpu_ms"],
                "servers": rows,
            }


def overloaded(
    build: Path, bundle: Path, engines: list[dict[str, Any]], files: list[Path], seconds: int
) -> Iterator[dict[str, Any]]:
    """zoo-serve at twice its capacity, with clients that give up, and SIGTERM under that load."""
    images = [file.read_bytes() for file in files]
    for engine in engines:
        command = [build / "examples" / "zoo-serve" / "zoo-serve", bundle, "--engine", engine["name"]]
        with running(command) as (port, process):
            asyncio.run(load.capacity(port, images, 2))  # warms up
            most = asyncio.run(load.capacity(port, images, seconds))
            found = asyncio.run(load.overload(port, images, 2 * most, seconds))
            more = threading.Thread(
                target=lambda port=port, most=most: asyncio.run(load.overload(port, images, 2 * most, 3))
            )
            more.start()
            time.sleep(1)
            begin = time.monotonic()
            process.terminate()
            code = process.wait()
            took = time.monotonic() - begin
            more.join()
        yield {
            "engine": engine["name"],
            "capacity": most,
            "goodput": len(found.good) / seconds / most,
            "p99": found.p99() / load.CLIENT_SECONDS,
            "refused": found.refused,
            "given_up": found.given_up,
            "sigterm_s": took,
            "exit_code": code,
        }


def of_bundle(bundle: Path) -> tuple[list[dict[str, Any]], tuple[int, int]]:
    """Engines of ONNX Runtime in a bundle, and what it resizes and crops to."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    engines = [engine for engine in manifest["artifacts"]["engines"] if engine["target"] == "onnxruntime"]
    spec = manifest["recipe"]["preprocess"]
    return engines, (spec["resize_size"], spec["crop_height"])


def show(
    header: str, rows: Iterable[dict[str, Any]], line: Callable[[dict[str, Any]], str]
) -> list[dict[str, Any]]:
    """A table, each row as it is measured."""
    print(f"\n{header}")
    shown = []
    for row in rows:
        shown.append(row)
        print(line(row), flush=True)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "engines" / "cpp" / "build" / "release")
    parser.add_argument(
        "--bundle", type=Path, action="append", help="repeatable; the first is for all but serving"
    )
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seconds", type=int, default=10, help="of each server")
    parser.add_argument(
        "--only", nargs="+", choices=["infer", "preprocess", "serve", "overload"], help="default: all"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    only = options.only or ["infer", "preprocess", "serve", "overload"]
    result: dict[str, Any] = {
        "machine": cpu_model(),
        "instruction_set": instruction_set(),
        "cores": os.cpu_count(),
        "versions": library_versions("onnxruntime", "pillow", "torch", "torchvision", "fastapi", "uvicorn"),
    }
    print(f"{cpu_model()}, {instruction_set()}, {os.cpu_count()} cores; {result['versions']}")
    with tempfile.TemporaryDirectory() as directory:
        bundles = options.bundle or []
        if not bundles:
            bundle = Path(directory) / "resnet18.bundle"
            bundles.append(bundle)
            calib = Path(directory) / "calib"
            run(sys.executable, ROOT / "examples" / "photos.py", "--out", calib, "--count", 64)
            command = "export resnet18 --weights none --precision fp32 --precision int8 --target onnxruntime"
            command += f" --calib {calib} --out {bundle}"
            subprocess.run([Path(sys.executable).with_name("export-zoo"), *command.split()], check=True)
        bundle = bundles[0]
        engines, size = of_bundle(bundle)
        files = photographs(Path(directory))
        if "infer" in only:
            result["infer"] = show(
                f"{'infer':<20}{'threads':>8}{'batch':>6}{'ours ms':>10}{'bare ms':>10}{'ratio':>8}",
                infer(options.build, bundle, engines, options.rounds),
                lambda row: (
                    f"{row['engine']:<20}{row['threads']:>8}{row['batch']:>6}{row['ours_ms']:>10.3f}"
                    f"{row['bare_ms']:>10.3f}{row['ratio']:>8.3f}"
                ),
            )
        if "preprocess" in only:
            result["preprocess"] = show(
                f"{'JPEG to tensor':<20}{'ours ms':>10}{'torchvision ms':>16}{'x':>8}",
                preprocess(options.build, bundle, files, *size, max(3, options.rounds // 20)),
                lambda row: (
                    f"{str(row['side']) + ' pixels':<20}{row['ours_ms']:>10.2f}"
                    f"{row['torchvision_ms']:>16.2f}{row['ratio']:>8.2f}"
                ),
            )
        if "serve" in only:
            result["serve"] = show(
                f"{'zoo-serve over FastAPI':<24}{'engine':<20}{'machine':>8}{'connections':>12}{'rate':>8}{'CPU':>8}  "
                f"a second and CPU ms of each",
                (
                    row
                    for place in bundles
                    for engine in of_bundle(place)[0]
                    for row in serve(
                        options.build, place, engine, files[640], of_bundle(place)[1], options.seconds
                    )
                ),
                lambda row: (
                    f"{row['model']:<24}{row['engine']:<20}{row['machine']:>8}{row['connections']:>12}"
                    f"{row['ratio']:>7.2f}x{row['cpu_ratio']:>7.2f}x  "
                    + ", ".join(f"{one['rate']:.1f} {one['cpu_ms']:.1f}" for one in row["servers"])
                ),
            )
        if "overload" in only:
            result["overload"] = show(
                f"{'twice its capacity':<20}{'a second':>10}{'goodput':>9}{'p99':>6}{'refused':>9}{'given up':>10}"
                f"{'SIGTERM s':>11}{'exit code':>11}",
                overloaded(options.build, bundle, engines, files[640], options.seconds),
                lambda row: (
                    f"{row['engine']:<20}{row['capacity']:>10.1f}{row['goodput']:>9.2f}{row['p99']:>6.2f}"
                    f"{row['refused']:>9}{row['given_up']:>10}{row['sigterm_s']:>11.2f}{row['exit_code']:>11}"
                ),
            )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
