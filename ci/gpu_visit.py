#!/usr/bin/env python3
"""A visit to a machine with an NVIDIA GPU: what is carried there, what is run, and what was found.

    python ci/gpu_visit.py pack DIR              # here: numbered pieces, the most useful first
    python ci/gpu_visit.py run OUT --from DIR    # there, in a checkout: after each piece, or after all
    python ci/gpu_visit.py report OUT            # here: what was found, as Markdown

Such a machine is had seldom and briefly, has no network, and takes and gives little at a time. So everything is packed
beforehand; a piece that is lost takes no other with it; each step of `run` writes what it found at once, ends within
its limit, and does not stop the next. `run` needs nothing but the standard library until the wheels are in place.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent

PIECE_BYTES = 56 << 20
"""Size of a piece at most: 64 MiB travel at a time, and the checkout is among them."""
MOST_PIECES = 8
STEP_SECONDS = 480.0
"""Time of a step at most: a command there ends after ten minutes."""

PYTHON = "3.12"
WHEELS = (
    "annotated-types",
    "onnxsim",
    "pydantic",
    "pydantic-core",
    "ruamel.yaml",
    "safetensors",
    "typing-extensions",
    "typing-inspection",
    "execnet",
    "pytest-timeout",
    "pytest-xdist",
    "tensorrt-rtx-cu13-bindings",
    "tensorrt-rtx-cu13-libs",
)
"""Packages that the machine lacks, carried in the versions installed here; the largest come last."""
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
)

IMAGES = 160
"""Photographs that go along, to calibrate and to verify on."""

INDEX = "index.json"
LINES = "lines.jsonl"
LOG = "log.txt"


# -- pieces ----------------------------------------------------------------------------------------------------


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _arranged(sizes: Mapping[str, int], limit: int) -> list[list[tuple[str, int, int]]]:
    """Pieces of parts (file, first byte, bytes): files in their order, each in the first piece with room for it.

    Only what is larger than a piece is divided, so that a lost piece costs no file of another.
    """
    pieces: list[list[tuple[str, int, int]]] = []
    for name, size in sizes.items():
        for begin in range(0, max(size, 1), limit):
            part = min(limit, size - begin)
            for piece in pieces:
                if sum(taken for _, _, taken in piece) + part <= limit:
                    piece.append((name, begin, part))
                    break
            else:
                pieces.append([(name, begin, part)])
    return pieces


def write_pieces(
    files: Mapping[str, Path], out: Path, *, limit: int = PIECE_BYTES, most: int = MOST_PIECES
) -> list[str]:
    """Write files, by the paths that they get there and in order of worth, to the folders `out`/piece-1 and so on.

    Returns the names of those for which there is no room.
    """
    room = limit - (1 << 20)  # for the index, and for what a transfer adds
    pieces = _arranged({name: path.stat().st_size for name, path in files.items()}, room)
    left_out = {name for piece in pieces[most:] for name, _, _ in piece}
    for old in out.glob("piece-*"):
        shutil.rmtree(old)
    for number, piece in enumerate(pieces[:most], 1):
        folder, index = out / f"piece-{number}", []
        folder.mkdir(parents=True)
        for place, (name, begin, size) in enumerate(piece):
            if name in left_out:
                continue
            with files[name].open("rb") as file:
                file.seek(begin)
                (folder / str(place)).write_bytes(file.read(size))
            whole = {"size": files[name].stat().st_size, "sha256": _sha256(files[name])}
            index.append({"name": name, "part": str(place), "begin": begin, **whole})
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return sorted(left_out)


def join(pieces: Path, out: Path) -> list[str]:
    """Put together the files of those pieces that are in a folder. Returns what is missing or damaged, by name.

    Can be called after each piece: files that are there, and right, are left as they are.
    """
    parts: dict[tuple[str, int, str], dict[int, Path]] = {}
    problems = []
    for index in sorted(pieces.glob(f"piece-*/{INDEX}")):
        try:
            for entry in json.loads(index.read_text(encoding="utf-8")):
                whole = (entry["name"], entry["size"], entry["sha256"])
                parts.setdefault(whole, {})[entry["begin"]] = index.parent / entry["part"]
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"{index.parent.name}: its index is damaged ({error}): carry it again")
    for (name, size, sha256), found in parts.items():
        target = out / name
        if target.is_file() and _sha256(target) == sha256:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.part")
        with temporary.open("wb") as file:
            for _, part in sorted(found.items()):
                if part.is_file():
                    with part.open("rb") as source:
                        shutil.copyfileobj(source, file)
        if temporary.stat().st_size == size and _sha256(temporary) == sha256:
            temporary.replace(target)
        else:
            problems.append(
                f"{name}: {temporary.stat().st_size} of {size} bytes are here, or some are damaged"
            )
            temporary.unlink()
    return problems


# -- pack ------------------------------------------------------------------------------------------------------


def _download(names: Sequence[str], out: Path) -> dict[str, Path]:
    """Wheels for the machine, in the versions that are installed here; what cannot be had is told and left out."""
    found = {}
    for name in names:
        version = metadata.version(name)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--python-version", PYTHON, "--implementation", "cp", "--dest", str(out / name)]
        for tag in PLATFORMS:
            command += ["--platform", tag]
        done = subprocess.run([*command, f"{name}=={version}"], capture_output=True, text=True, check=False)
        wheels = sorted((out / name).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            print(f"{name} {version}: no wheel for Python {PYTHON}: {reason}", file=sys.stderr)
            continue
        found |= {f"wheels/{wheel.name}": wheel for wheel in wheels}
    return found


def _images(folder: Path | None) -> dict[str, Path]:
    """The first images of a folder, by name."""
    if folder is None:
        return {}
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not found:
        raise SystemExit(f"--images {folder}: no JPEG or PNG files: give a folder of photographs")
    return {f"images/{number:04}{path.suffix}": path for number, path in enumerate(found[:IMAGES])}


def pack(out: Path, wheels: Sequence[str], images: Path | None) -> int:
    """Write the pieces to `out`. Returns the exit code: 1 where something is missing."""
    with tempfile.TemporaryDirectory(prefix="export-zoo-") as directory:
        files = {**_images(images), **_download(wheels, Path(directory))}
        left_out = write_pieces(files, out)
    for name in left_out:
        print(f"{name}: no room in {MOST_PIECES} pieces of {PIECE_BYTES >> 20} MiB", file=sys.stderr)
    for piece in sorted(out.glob("piece-*")):
        size = sum(file.stat().st_size for file in piece.iterdir())
        names = [entry["name"] for entry in json.loads((piece / INDEX).read_text(encoding="utf-8"))]
        photographs = sum(name.startswith("images/") for name in names)
        told = [f"{photographs} images"] if photographs else []
        told += [Path(name).name for name in names if not name.startswith("images/")]
        print(f"{piece}: {size / 2**20:.1f} MiB: {', '.join(told)}")
    return int(sum(name.startswith("wheels/") for name in files) < len(wheels) or bool(left_out))


# -- run -------------------------------------------------------------------------------------------------------


def say(out: Path, step: str, **figures: Any) -> None:
    """Write one line of what was found, at once: the machine may be taken away before the step ends."""
    line = json.dumps({"step": step, **figures}, default=str)
    with (out / LINES).open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def _wheels(out: Path, work: Path) -> None:
    """Unpack the wheels that came, into a folder of our own."""
    wheels = sorted(str(path) for path in (work / "wheels").glob("*.whl"))
    if not wheels:
        say(out, "wheels", skipped="no wheels came")
        return
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--upgrade", "--quiet"]
    subprocess.run([*command, "--target", str(work / "site"), *wheels], check=True)
    say(out, "wheels", installed=[Path(wheel).name for wheel in wheels])


def _device(out: Path, work: Path) -> None:
    """Device, driver and versions."""
    from calibration.machine import cpu_model, library_versions
    from engines.target import device_capability, device_name, driver_too_old

    versions = library_versions("torch", "onnxruntime", "tensorrt", "onnx", "numpy")
    versions["tensorrt-rtx"] = _rtx_version()
    say(
        out,
        "device",
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        device=device_name() or "none",
        capability=device_capability(),
        driver=_driver_version(),
        driver_problem=driver_too_old(),
        cpu=cpu_model(),
        python=platform.python_version(),
        versions=versions,
    )


def _rtx_version() -> str:
    try:
        return str(importlib.import_module("tensorrt_rtx").__version__)
    except ImportError as error:
        return f"absent: {error}"


def _driver_version() -> str | None:
    if (program := shutil.which("nvidia-smi")) is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or done.stderr.strip()


def _convolution(folder: Path) -> dict[str, Path]:
    """One convolution with a ReLU as FP16 and INT8 graphs for TensorRT-RTX, made by the product's own code."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper, save

    from calibration.graph_io import sha256_of
    from calibration.preprocess import Preprocess
    from calibration.ranges import Ranges, TensorRange
    from engines.half import to_half
    from engines.precision import quantize

    weight = np.random.default_rng(0).normal(size=(64, 64, 3, 3)).astype(np.float32) / 24
    nodes = [
        helper.make_node("Conv", ["input", "weight"], ["conv"], name="conv", pads=[1] * 4),
        helper.make_node("Relu", ["conv"], ["relu"], name="relu"),
        helper.make_node("Neg", ["relu"], ["logits"], name="neg"),
    ]
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 64, 32, 32])
        for name in ("input", "logits")
    ]
    graph = helper.make_graph(
        nodes, "convolution", ports[:1], ports[1:], [numpy_helper.from_array(weight, "weight")]
    )
    plain = folder / "fp32.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), plain)
    to_half(plain, folder / "fp16.onnx")
    preprocess = Preprocess(
        resize_size=32,
        crop_height=32,
        crop_width=32,
        interpolation="bilinear",
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        source="ci/gpu_visit.py",
    )
    ranges = Ranges(
        graph_sha256=sha256_of(plain),
        preprocess=preprocess,
        image_sha256=[],
        unreadable=[],
        instruction_set="any",
        versions={},
        tensors={name: TensorRange(min=-4.0, max=4.0) for name in ("input", "conv", "relu")},
    )
    quantize(plain, ranges, folder / "int8.onnx", target="tensorrt-rtx")
    return {"fp16": folder / "fp16.onnx", "int8": folder / "int8.onnx"}


def _convolutions(out: Path, work: Path) -> None:
    """Does TensorRT-RTX build and run one convolution for this GPU, and by which name of its compute capability?"""
    import numpy as np

    from calibration.errors import ExportZooError
    from engines.onnxruntime_engine import OnnxRuntimeEngine
    from engines.parity import compare
    from engines.target import CURRENT, BuildOptions, device_capability
    from engines.tensorrt_build import build_engine
    from engines.tensorrt_engine import TensorRTEngine
    from engines.twin import write_twin

    if _rtx_version().startswith("absent"):
        say(out, "convolutions", skipped=f"tensorrt-rtx is {_rtx_version()}")
        return
    here = device_capability()
    batch = np.random.default_rng(1).normal(size=(4, 64, 32, 32)).astype(np.float32)
    with tempfile.TemporaryDirectory(prefix="export-zoo-") as directory:
        for precision, graph in _convolution(Path(directory)).items():
            write_twin(graph, graph.with_suffix(".twin.onnx"))
            expected = OnnxRuntimeEngine(graph.with_suffix(".twin.onnx"), fused=False).run(batch)
            for asked in ("default", *([here, CURRENT] if here else [])):
                plan, found = graph.with_suffix(".plan"), {"precision": precision, "built for": asked}
                options = BuildOptions(compute_capabilities=() if asked == "default" else (asked,))
                try:
                    built = build_engine(graph, plan, target="tensorrt-rtx", batch=(1, 4, 8), options=options)
                    found["capabilities"] = ", ".join(built.compute_capabilities)
                    if here is None:
                        say(
                            out,
                            "convolutions",
                            **found,
                            built=True,
                            skipped="not run: there is no CUDA device",
                        )
                        continue
                    sqnr = compare(expected, TensorRTEngine(plan, target="tensorrt-rtx").run(batch)).sqnr
                    say(out, "convolutions", **found, built=True, ran=True, sqnr=round(sqnr, 2))
                except ExportZooError as error:
                    say(out, "convolutions", **found, built=plan.exists(), error=error.message)


def _export(out: Path, work: Path, step: str, *arguments: str) -> None:
    """Run `export-zoo` for this GPU, and tell each engine's state, error and speed beside FP32 on the CPU."""
    from engines.target import CURRENT, has_cuda_device, targets

    bundle, result = work / f"{step}.bundle", work / f"{step}.json"
    given = [
        *arguments,
        "--target",
        "onnxruntime",
        "--batch",
        "1:8:64",
        "--out",
        str(bundle),
        "--json",
        str(result),
    ]
    for precision in ("fp32", "fp16", "int8"):
        given += ["--precision", precision]
    if not targets()["tensorrt-rtx"].unavailable:
        given += ["--target", "tensorrt-rtx"]
        if has_cuda_device():
            given += ["--compute-capability", CURRENT]
    command = [sys.executable, "-c", "from exporter.cli import run; run()", *given]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, check=False)
    document = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
    for engine in document.get("engines", []):
        gate, latency = engine["gate"], engine["latency"] or {}
        say(
            out,
            step,
            engine=engine["name"],
            state=engine["state"],
            ran=gate["ran"],
            sqnr=gate["eager_metrics"]["sqnr"],
            top1=gate["eager_metrics"]["top1"],
            batches=gate["batches"],
            failures=gate["failures"],
            median_ms=latency.get("median_ms"),
            over_fp32=latency.get("speedup"),
        )
    say(out, step, exit_code=done.returncode, error=document.get("error"), warnings=document.get("warnings"))


def _digits(out: Path, work: Path) -> None:
    """resnet18, trained there on scikit-learn's digits: the only network here that is trained and needs no weights."""
    trained = work / "digits"
    if not (trained / "resnet18.safetensors").is_file():
        recipe = [
            sys.executable,
            str(ROOT / "examples" / "digits.py"),
            "--model",
            "resnet18",
            "--out",
            str(trained),
        ]
        subprocess.run(recipe, check=True)
    given = [
        "resnet18",
        "--weights",
        str(trained / "resnet18.safetensors"),
        "--calib",
        str(trained / "images"),
    ]
    _export(out, work, "digits", *given, "--num-classes", "10", "--input-size", "32", "--resize-size", "32")


def _random(model: str) -> Callable[[Path, Path], None]:
    """A network of torchvision with random weights: its speed is that of a trained one."""

    def step(out: Path, work: Path) -> None:
        images = work / "images"
        if not images.is_dir():
            say(out, model, skipped="no images came")
            return
        _export(out, work, model, model, "--weights", "none", "--calib", str(images))

    return step


def _tests(out: Path, work: Path) -> None:
    """The tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rA", "-q", "--no-header", "--timeout=400"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    ended = ("PASSED", "FAILED", "ERROR", "SKIPPED")
    for line in done.stdout.splitlines():
        if line.startswith(ended):
            say(out, "tests", line=line[:300])
    say(out, "tests", exit_code=done.returncode)


STEPS: dict[str, Callable[[Path, Path], None]] = {
    "wheels": _wheels,
    "device": _device,
    "convolutions": _convolutions,
    "digits": _digits,
    "resnet50": _random("resnet50"),
    "mobilenet_v2": _random("mobilenet_v2"),
    "tests": _tests,
}
"""In the order in which they are run: the surest and shortest first."""


def _ended(
    command: Sequence[str], environment: Mapping[str, str], log: IO[bytes], work: Path, seconds: float
) -> str:
    """Run a step, and end it with all that it started where it takes too long. Returns how it ended."""
    process = subprocess.Popen(
        command, env=environment, stdout=log, stderr=log, cwd=work, start_new_session=True
    )
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return "done" if code == 0 else f"failed, exit code {code}"


def run(out: Path, pieces: Path, work: Path, steps: Sequence[str], seconds: float) -> int:
    """Join what came, and run steps, each in a process of its own. Returns the exit code: 1 where one failed."""
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    for problem in join(pieces, work):
        say(out, "pieces", problem=problem)
        print(problem, file=sys.stderr)
    failed = []
    for step in steps:
        begin = time.monotonic()
        command = [sys.executable, str(Path(__file__).resolve()), "step", step, str(out), str(work)]
        # Wheels that came go before what the machine has; this checkout before both.
        paths = [str(ROOT), str(work / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
        with (out / LOG).open("ab") as log:
            log.write(f"== {step}\n".encode())
            log.flush()
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
            ended = _ended(command, environment, log, work, seconds)
        if ended != "done":
            failed.append(step)
        say(out, step, ended=ended, seconds=round(time.monotonic() - begin, 1))
        print(f"{step}: {ended}")
    return int(bool(failed))


# -- report ----------------------------------------------------------------------------------------------------


def _read(out: Path) -> list[dict[str, Any]]:
    """The lines of a visit; one that was cut off is left out."""
    found = []
    for line in (out / LINES).read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            print(f"{out / LINES}: left out, for it was cut off: {line[:60]}", file=sys.stderr)
    return found


def report(out: Path) -> str:
    """What was found, as Markdown: the device, then a section for each step. What was not run says so."""
    lines = _read(out)
    parts = []
    for step in STEPS:
        mine = [line for line in lines if line["step"] == step]
        ended = [line for line in mine if "ended" in line]
        state = f"{ended[-1]['ended']}, {ended[-1]['seconds']} s" if ended else "not run"
        parts.append(f"### {step}: {state}\n")
        for line in mine:
            if "ended" not in line:
                told = ", ".join(f"{key} {value}" for key, value in line.items() if key != "step")
                parts.append(f"- {told}")
        parts.append("")
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    given = commands.add_parser("pack", help="write pieces to DIR")
    given.add_argument("dir", type=Path, metavar="DIR")
    given.add_argument(
        "--without", action="append", default=[], metavar="WHEEL", help="leave a wheel out; repeatable"
    )
    given.add_argument("--images", type=Path, metavar="DIR", help=f"photographs: the first {IMAGES} go along")
    given = commands.add_parser("run", help="run the steps, and write what they find to OUT")
    given.add_argument("out", type=Path, metavar="OUT")
    given.add_argument(
        "--from", dest="pieces", type=Path, required=True, metavar="DIR", help="where the pieces are"
    )
    given.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "gpu-visit", metavar="DIR")
    given.add_argument("--step", action="append", choices=list(STEPS), help="only this; repeatable")
    given.add_argument("--seconds", type=float, default=STEP_SECONDS, help="of a step at most")
    given = commands.add_parser("report", help="print what was found, as Markdown")
    given.add_argument("out", type=Path, metavar="OUT")
    given = commands.add_parser("step")
    given.add_argument("step", choices=list(STEPS))
    given.add_argument("out", type=Path)
    given.add_argument("work", type=Path)
    options = parser.parse_args(arguments)
    match options.command:
        case "pack":
            unknown = sorted(set(options.without) - set(WHEELS))
            if unknown:
                parser.error(f"--without {unknown[0]}: not among {', '.join(WHEELS)}")
            return pack(options.dir, [name for name in WHEELS if name not in options.without], options.images)
        case "run":
            steps = options.step or list(STEPS)
            return run(
                options.out.absolute(), options.pieces, options.work.absolute(), steps, options.seconds
            )
        case "report":
            if not (options.out / LINES).is_file():
                parser.error(f"{options.out}: has no {LINES}: give the folder that `run` wrote")
            print(report(options.out))
        case _:
            STEPS[options.step](options.out, options.work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
