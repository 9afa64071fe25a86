"""A visit to a GPU machine, rehearsed: pieces are put together, steps run, and a report says what was not."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

SCRIPT, STEPS = ROOT / "ci" / "gpu_visit.py", ROOT / "ci" / "gpu_steps.py"
MIB = 1 << 20


@pytest.fixture(scope="module")
def visit():
    sys.path.insert(0, str(SCRIPT.parent))  # as for a program
    spec = importlib.util.spec_from_file_location("gpu_visit", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made(folder: Path, **mebibytes: int) -> dict[str, Path]:
    """Files of these sizes, each of bytes of its own."""
    folder.mkdir(exist_ok=True)
    for name, size in mebibytes.items():
        (folder / name).write_bytes(
            name.encode() * (size * MIB // len(name)) + b"\0" * (size * MIB % len(name))
        )
    return {f"goods/{name}": folder / name for name in mebibytes}


def sizes(pieces: Path) -> list[int]:
    return [sum(f.stat().st_size for f in piece.iterdir()) for piece in sorted(pieces.glob("piece-*"))]


def test_files_travel_in_pieces_and_come_out_as_they_were(visit, tmp_path):
    files = made(tmp_path / "from", small=1, large=9, empty=0, other=2)
    assert visit.write_pieces(files, tmp_path / "pieces", limit=4 * MIB) == []
    assert all(size <= 4 * MIB for size in sizes(tmp_path / "pieces"))
    assert visit.join(tmp_path / "pieces", tmp_path / "to") == []
    for name, path in files.items():
        assert (tmp_path / "to" / name).read_bytes() == path.read_bytes()
    assert {p.name for p in (tmp_path / "to" / "goods").iterdir()} == {p.name for p in files.values()}


def test_a_lost_piece_costs_what_has_a_part_in_it_and_nothing_else(visit, tmp_path):
    files = made(tmp_path / "from", first=2, large=7, last=3)
    visit.write_pieces(files, tmp_path / "pieces", limit=4 * MIB)
    whole = {name for name, path in files.items() if path.stat().st_size <= 3 * MIB}
    for lost in sorted((tmp_path / "pieces").glob("piece-*")):
        kept = tmp_path / "kept"
        shutil.copytree(tmp_path / "pieces", kept)
        gone = {entry["name"] for entry in json.loads((lost / "index.json").read_text())}
        shutil.rmtree(kept / lost.name)
        problems = visit.join(kept, tmp_path / "to")
        there = {name for name in files if (tmp_path / "to" / name).exists()}
        assert there == set(files) - gone
        assert whole - gone <= there
        assert {text.split(":")[0] for text in problems} <= gone
        # The lost one comes after all: only what was missing is put together.
        before = {name: (tmp_path / "to" / name).stat().st_mtime_ns for name in there}
        shutil.copytree(lost, kept / lost.name)
        assert visit.join(kept, tmp_path / "to") == []
        assert {name: (tmp_path / "to" / name).stat().st_mtime_ns for name in there} == before
        shutil.rmtree(kept)
        shutil.rmtree(tmp_path / "to")


def test_a_damaged_part_is_told_and_a_damaged_index_costs_its_piece_only(visit, tmp_path):
    files = made(tmp_path / "from", one=2, two=2)
    visit.write_pieces(files, tmp_path / "pieces", limit=4 * MIB)
    one, two = sorted((tmp_path / "pieces").glob("piece-*"))
    data = bytearray((one / "0").read_bytes())
    data[1000] ^= 1
    (one / "0").write_bytes(data)
    (problem,) = visit.join(tmp_path / "pieces", tmp_path / "to")
    assert problem.startswith("goods/one: ")
    assert (tmp_path / "to" / "goods" / "two").exists()
    (two / "index.json").write_text("[{")
    assert any(
        "piece-2: its index is damaged" in text for text in visit.join(tmp_path / "pieces", tmp_path / "to")
    )


def test_what_there_is_no_room_for_is_named(visit, tmp_path):
    files = made(tmp_path / "from", first=2, second=2, third=2, large=9)
    assert visit.write_pieces(files, tmp_path / "pieces", limit=4 * MIB, most=3) == ["goods/large"]
    assert len(sizes(tmp_path / "pieces")) == 3
    assert visit.join(tmp_path / "pieces", tmp_path / "to") == []
    assert {p.name for p in (tmp_path / "to" / "goods").iterdir()} == {"first", "second", "third"}


def test_pieces_of_an_earlier_pack_are_gone(visit, tmp_path):
    visit.write_pieces(made(tmp_path / "from", one=2, two=2), tmp_path / "pieces", limit=4 * MIB)
    visit.write_pieces(made(tmp_path / "from", one=2), tmp_path / "pieces", limit=4 * MIB)
    assert len(sizes(tmp_path / "pieces")) == 1


def test_a_pack_that_cannot_have_its_wheels_leaves_earlier_pieces(visit, tmp_path, monkeypatch, capsys):
    visit.write_pieces(made(tmp_path / "from", one=1), tmp_path / "pieces")
    (tmp_path / "pieces" / "piece-x").write_text("of mine")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert visit.pack(tmp_path / "pieces", ["execnet"], None) == 1
    assert "left as it was, for 1 wheel(s) could not be had" in capsys.readouterr().err
    assert visit.join(tmp_path / "pieces", tmp_path / "to") == []
    assert (tmp_path / "to" / "goods" / "one").exists()
    visit.write_pieces(made(tmp_path / "from", one=1), tmp_path / "pieces")
    assert (tmp_path / "pieces" / "piece-x").read_text() == "of mine"


def test_the_first_images_of_a_folder_go_along_and_a_folder_without_is_refused(visit, tmp_path):
    for number in range(200):
        (tmp_path / f"{number:03}.jpg").write_bytes(b"x")
    found = visit._images(tmp_path)
    assert len(found) == visit.IMAGES
    assert found["images/0000.jpg"] == tmp_path / "000.jpg"
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"--images .*empty: no JPEG or PNG files"):
        visit._images(tmp_path / "empty")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False
    )


NEEDING_NOTHING = (
    "wheels",
    "device",
    "convolutions",
    "resnet50",
    "digits speed",
    "lite0",
    "errors",
    "layers",
)


@pytest.fixture(scope="module")
def rehearsed(visit, tmp_path_factory) -> Path:
    """The steps that take seconds, with this machine standing in."""
    out = tmp_path_factory.mktemp("visit") / "out"
    steps = [f"--step={name}" for name in NEEDING_NOTHING]
    visit.write_pieces(made(out.parent / "from", some=1), out.parent / "pieces")
    done = run("run", out, "--from", out.parent / "pieces", "--work", out.parent / "work", *steps)
    assert done.returncode == 0, done.stderr + (out / "log.txt").read_text()
    return out


def test_each_step_writes_what_it_found_and_that_it_ended(rehearsed):
    lines = [json.loads(line) for line in (rehearsed / "lines.jsonl").read_text().splitlines()]
    ended = {line["step"]: line["ended"] for line in lines if "ended" in line}
    assert ended == dict.fromkeys(NEEDING_NOTHING, "done")
    found = {line["step"]: line for line in lines if "ended" not in line}
    assert found["wheels"]["skipped"] == "no wheels came"
    assert found["resnet50"]["skipped"] == "no images came"
    came = importlib.util.find_spec("efficientnet_lite_pytorch") is not None  # a benchmark's
    assert found["lite0"]["skipped"] == ("no images came" if came else "its package did not come")
    for step in ("digits speed", "errors"):
        assert found[step]["skipped"] == "digits was not exported"
    assert found["layers"]["skipped"] == "no engine of TensorRT-RTX runs here"
    assert found["device"]["versions"]["torch"]
    assert sum(file.stat().st_size for file in rehearsed.iterdir()) < 16 * MIB, "so much comes back, a file"
    assert len([*rehearsed.iterdir()]) <= 8


def test_what_a_machine_without_a_gpu_cannot_do_is_skipped_by_name(rehearsed):
    from export_zoo.base.cuda import has_cuda_device
    from export_zoo.engines.targets.registry import TARGETS

    if has_cuda_device() or TARGETS["tensorrt-rtx"].unavailable:
        pytest.skip("for machines with TensorRT-RTX and without a GPU")
    lines = [json.loads(line) for line in (rehearsed / "lines.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["step"] == "convolutions" and "ended" not in line]
    assert [line["precision"] for line in found] == ["fp16", "int8"]
    assert all(line["built"] and line["skipped"] == "not run: there is no CUDA device" for line in found)


def test_the_report_says_what_was_found_and_what_was_not_run(rehearsed, tmp_path):
    done = run("report", rehearsed)
    assert done.returncode == 0
    assert "### device: done" in done.stdout
    assert "### tests: not run" in done.stdout
    assert "- skipped no images came" in done.stdout
    assert re.search(
        r"^\| precision \| built for \|.*\n\|---\|---\|.*\n\| fp16 \| default \|", done.stdout, re.M
    )
    assert "there is no CUDA device" in done.stdout or "sqnr" in done.stdout
    shutil.copytree(rehearsed, tmp_path / "out")
    with (tmp_path / "out" / "lines.jsonl").open("a") as file:
        file.write('{"step": "te')
    cut = run("report", tmp_path / "out")
    assert cut.stdout == done.stdout
    assert "cut off" in cut.stderr


def test_a_step_that_fails_or_hangs_does_not_stop_the_next(visit, tmp_path, monkeypatch):
    (tmp_path / "ci").mkdir()
    broken = Path(shutil.copy(SCRIPT, tmp_path / "ci"))
    text = STEPS.read_text()
    for step, body in (("device", "1 / 0"), ("wheels", "subprocess.run(['sleep', '1234567'])")):
        head = f"def _{step}(visit: Visit) -> None:\n"
        assert head in text
        text = text.replace(head, f"{head}    {body}\n\n\ndef _was_{step}(visit: Visit) -> None:\n")
    (tmp_path / "ci" / "gpu_steps.py").write_text(text)
    command = [
        sys.executable,
        broken,
        "run",
        tmp_path / "out",
        "--from",
        tmp_path,
        "--work",
        tmp_path / "work",
    ]
    steps = ["--step=wheels", "--step=device", "--step=resnet50", "--seconds=3"]
    done = subprocess.run([*map(str, command), *steps], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    lines = [json.loads(line) for line in (tmp_path / "out" / "lines.jsonl").read_text().splitlines()]
    ended = {line["step"]: line["ended"] for line in lines if "ended" in line}
    assert [line["problem"].split(":")[0] for line in lines if line["step"] == "pieces"] == ["no pieces came"]
    assert "no pieces came" in run("report", tmp_path / "out").stdout
    assert ended == {"wheels": "stopped after 3 s", "device": "failed, exit code 1", "resnet50": "done"}
    left = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            left.append(path.read_bytes())
    assert b"sleep\x001234567\x00" not in left, "a step that is stopped ends with all that it started"
    assert "ZeroDivisionError" in (tmp_path / "out" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["pack", "x", "--without", "numpy"], "--without numpy: not among"),
        (["pack", "x", "--with", "numpy"], "'numpy' (choose from"),
        (["report", "nowhere"], "nowhere: has no lines.jsonl: give the folder that `run` wrote"),
        (["run", "x"], "--from"),
        (["run", str(SCRIPT), "--from", "y"], "a file: give a folder"),
        (["run", "x", "--from", "y", "--seconds", "-1"], "--seconds"),
        (["run", "x", "--from", "y", "--step", "dance"], "'dance'"),
    ],
)
def test_wrong_arguments_are_refused_with_what_to_give(arguments, says):
    done = run(*arguments)
    assert done.returncode == 2
    assert says in done.stderr
