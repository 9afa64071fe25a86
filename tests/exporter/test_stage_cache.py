"""The stage cache: hits are exact, damage and kills cost a recomputation and no more, runs do not collide."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from support.paths import ROOT

from export_zoo.base.errors import EnvironmentFailureError, ExportZooError
from export_zoo.base.files import cache_directory
from export_zoo.exporter.run import cache as stage_cache
from export_zoo.exporter.run.cache import StageCache, StageResult, code_digest, digest, work_directory

KEY = {"model": "resnet18", "opset": 18}


class Make:
    """A stage that writes two files, and counts how often it had to."""

    def __init__(self, content: bytes = b"graph", data=None) -> None:
        self.content, self.data, self.count = content, data, 0

    def __call__(self, directory: Path):
        self.count += 1
        (directory / "graph.onnx").write_bytes(self.content)
        (directory / "note.txt").write_text("made")
        return {"nodes": 3} if self.data is None else self.data


def read(result: StageResult) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in result.directory.iterdir()}


FILES = {"graph.onnx": b"graph", "note.txt": b"made"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def run_once(root: Path | None, make, stage: str = "export", key=KEY) -> tuple[StageResult, dict[str, bytes]]:
    """The result of a run with this one stage, and the files that the run could see."""
    with StageCache(root) as cache:
        result = cache.run(stage, key, make)
        return result, read(result)


def entries(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("*/*") if path.parent.name != "work")


def works(root: Path) -> list[Path]:
    return sorted((root / "work").iterdir())


# --- hit and miss


def test_the_second_run_gets_what_the_first_made(root):
    make = Make()
    first, files = run_once(root, make)
    second, files_again = run_once(root, make)
    assert (first.cached, second.cached) == (False, True)
    assert make.count == 1
    assert files == files_again == FILES
    assert first.data == second.data == {"nodes": 3}
    assert first.key == second.key == digest({"stage": "export", **KEY})


def test_a_hit_within_a_run_gets_a_directory_of_its_own(root):
    make = Make()
    with StageCache(root) as cache:
        results = [cache.run("export", KEY, make) for _ in range(3)]
        assert [result.cached for result in results] == [False, True, True]
        assert len({result.directory for result in results}) == 3
        assert all(read(result) == FILES for result in results)
    assert make.count == 1


def test_a_cached_entry_shares_the_bytes_on_disk(root):
    with StageCache(root) as cache:
        result = cache.run("export", KEY, Make())
        kept = entries(root)[0] / "graph.onnx"
        assert kept.stat().st_ino == (result.directory / "graph.onnx").stat().st_ino


@pytest.mark.parametrize("data", [None, [], "text", 1.5, {"a": [1, {"b": None}], "ü": True}])
def test_data_comes_back_equal(root, data):
    results = [run_once(root, lambda directory: data)[0] for _ in range(2)]
    assert [result.cached for result in results] == [False, True]
    assert results[0].data == results[1].data == data


def test_a_stage_without_files_is_cached(root):
    calls = []
    for _ in range(2):
        assert run_once(root, lambda directory: calls.append(1))[1] == {}
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        ("simplify", KEY),
        ("export", {**KEY, "opset": 19}),
        ("export", {**KEY, "opset": "18"}),
        ("export", {**KEY, "opset": 18.5}),
        ("export", {**KEY, "more": None}),
        ("export", {"model": "resnet18"}),
        ("export", {**KEY, "model": "resnet34"}),
        ("export", {**KEY, "sizes": [1, 2]}),
        ("export", {**KEY, "sizes": [2, 1]}),
        ("export", {**KEY, "sizes": {"a": 12}}),
        ("export", {}),
    ],
)
def test_any_change_of_stage_or_key_is_a_miss(root, stage, key):
    run_once(root, Make(b"other"))
    result, files = run_once(root, Make(), stage, key)
    assert not result.cached
    assert files == FILES
    assert run_once(root, Make(b"third"), stage, key)[1] == FILES
    assert run_once(root, Make(b"third"))[1] == {**FILES, "graph.onnx": b"other"}


def test_the_order_of_a_key_does_not_matter(root):
    run_once(root, Make(), key={"a": 1, "b": {"c": 2, "d": 3}})
    assert run_once(root, Make(), key={"b": {"d": 3, "c": 2}, "a": 1})[0].cached


def test_every_distinct_key_has_its_own_digest():
    keys = [{}, {"a": 1}, {"a": "1"}, {"a": True}, {"a": None}, {"a": [1]}, {"a": {"1": 1}}, {"b": 1}]
    assert len({digest(key) for key in keys}) == len(keys)


def test_the_code_digest_changes_with_any_source_file(tmp_path):
    def of_copy(name: str, change=None, *, links: bool = False) -> str:
        """As installed, or as in a checkout, where export_zoo has links to the folders beside it."""
        copy = tmp_path / name
        for folder in ("export_zoo", "exporter", "engines", "calibration") if links else ("export_zoo",):
            ignored = shutil.ignore_patterns("__pycache__", "build", ".deps")
            shutil.copytree(ROOT / folder, copy / folder, symlinks=links, ignore=ignored)
        if change is not None:
            change(copy if links else copy / "export_zoo")
        return code_digest(copy / "export_zoo")

    def append(path: str):
        def change(copy: Path) -> None:
            with (copy / path).open("a") as file:
                file.write("# changed\n")

        return change

    digests = [
        of_copy("unchanged"),
        of_copy("preprocess", append("calibration/preprocess.py")),
        of_copy("bundle", append("engines/bundle/reader.py")),
        of_copy("zoo", append("exporter/models/zoo.py")),
        of_copy("new", append("exporter/new.py")),
        of_copy("renamed", lambda copy: (copy / "exporter/models/zoo.py").rename(copy / "exporter/zoos.py")),
    ]
    assert len(set(digests)) == len(digests)
    assert of_copy("unchanged_too") == digests[0]
    assert of_copy("checkout", links=True) == digests[0]
    assert of_copy("changed checkout", append("engines/bundle/reader.py"), links=True) == digests[2]
    assert code_digest() == digests[0]
    assert of_copy("cpp", append("engines/cpp/tests/make_bundles.py")) == digests[0]


# --- the cache directory


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("EXPORT_ZOO_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"
    monkeypatch.setenv("EXPORT_ZOO_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "export-zoo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "export-zoo"


def test_the_work_directory_is_removed(root):
    with StageCache(root) as cache:
        directory = cache.run("export", KEY, Make()).directory
        assert directory.parent in works(root)
    assert works(root) == []
    assert len(entries(root)) == 1


def test_the_work_directory_is_removed_after_an_error_too(root):
    with pytest.raises(ZeroDivisionError), StageCache(root) as cache:
        cache.run("export", KEY, lambda directory: 1 / 0)
    assert works(root) == []


def test_the_work_of_dead_runs_is_removed_and_that_of_living_ones_kept(root):
    ages = {"old": 25 * 3600, "dead": 3600, "living": 3600, "starting": 10}
    for name, age in ages.items():
        directory = root / "work" / name
        directory.mkdir(parents=True)
        (directory / "weights.bin").write_bytes(b"x")
        when = directory.stat().st_mtime - age
        os.utime(directory, (when, when))
    descriptor = os.open(root / "work" / "living", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with StageCache(root):
        assert {path.name for path in works(root)} > {"living", "starting"}
        assert (root / "work" / "living" / "weights.bin").exists()
        assert not {path.name for path in works(root)} & {"old", "dead"}
    os.close(descriptor)


def test_work_that_vanishes_while_it_is_looked_at_is_no_error(root):
    (root / "work").mkdir(parents=True)
    (root / "work" / "gone").symlink_to(root / "nowhere")  # listed, and not there: as in the race
    assert run_once(root, Make())[1] == FILES


def test_without_a_cache_everything_is_made_anew_and_nothing_stays(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    make = Make()
    with StageCache(None) as cache:
        results = [cache.run("export", KEY, make) for _ in range(2)]
        assert [result.cached for result in results] == [False, False]
        assert all(read(result) == FILES for result in results)
        assert results[0].directory != results[1].directory
        assert results[0].directory.is_relative_to(tmp_path)
    assert make.count == 2
    assert list(tmp_path.iterdir()) == []


# --- errors and damage


def test_a_stage_that_fails_keeps_nothing(root):
    def fail(directory: Path):
        (directory / "graph.onnx").write_bytes(b"half a gr")
        raise ValueError("no more disk")

    with pytest.raises(ValueError, match="no more disk"):
        run_once(root, fail)
    assert entries(root) == []
    result, files = run_once(root, Make())
    assert not result.cached
    assert files == FILES


def test_stages_before_the_failing_one_are_kept(root):
    def run(make_simplify) -> list[bool]:
        with StageCache(root) as cache:
            return [cache.run("export", KEY, Make()).cached, cache.run("simplify", KEY, make_simplify).cached]

    with pytest.raises(ZeroDivisionError):
        run(lambda directory: 1 / 0)
    assert run(Make()) == [True, False]


DAMAGES = {
    "a file was altered": lambda entry: (entry / "graph.onnx").write_bytes(b"grape"),
    "a file was cut": lambda entry: (entry / "graph.onnx").write_bytes(b"gra"),
    "a file was appended to": lambda entry: (entry / "note.txt").write_text("made later"),
    "the description is empty": lambda entry: (entry / "entry.json").write_bytes(b""),
    "the description is cut": lambda entry: os.truncate(entry / "entry.json", 30),
    "the description is zeros": lambda entry: (entry / "entry.json").write_bytes(b"\0" * 300),
    "the description is another's": lambda entry: (entry / "entry.json").write_text('{"a": 1}'),
}


def damaged(root: Path, damage) -> StageResult:
    """The first run after the damage: it must make the result again."""
    run_once(root, Make())
    (entry,) = entries(root)
    damage(entry)
    make = Make()
    result, files = run_once(root, make)
    assert (result.cached, make.count) == (False, 1)
    assert result.data == {"nodes": 3}
    assert files == FILES
    return result


def assert_hit(root: Path) -> None:
    make = Make(b"never")
    result, files = run_once(root, make)
    assert (result.cached, make.count) == (True, 0)
    assert result.data == {"nodes": 3}
    assert files == FILES


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_made_again_and_mended(root, damage):
    damaged(root, damage)
    assert_hit(root)


@pytest.mark.parametrize("name", ["graph.onnx", "entry.json"])
def test_an_entry_that_lacks_a_file_is_made_again(root, name):
    damaged(root, lambda entry: (entry / name).unlink())


@pytest.mark.parametrize("name", ["graph.onnx", "entry.json"])
def test_an_entry_that_lacks_a_file_is_mended(root, name):
    damaged(root, lambda entry: (entry / name).unlink())
    assert_hit(root)


@pytest.mark.parametrize(
    "text",
    ["null", "[]", '"text"', '{"files": ["graph.onnx"], "data": 1}', '{"files": {}}', '{"files": null}'],
)
def test_an_entry_whose_description_is_other_json_is_made_again(root, text):
    damaged(root, lambda entry: (entry / "entry.json").write_text(text))
    assert_hit(root)


def test_a_run_that_spoils_its_files_does_not_spoil_the_next(root):
    with StageCache(root) as cache:
        result = cache.run("export", KEY, Make())
        (result.directory / "graph.onnx").write_bytes(b"spoilt")  # the same inode as the cache's
    assert run_once(root, Make())[1] == FILES


def test_a_run_keeps_its_files_when_another_clears_the_cache(root):
    run_once(root, Make())
    with StageCache(root) as cache:
        hit = cache.run("export", KEY, Make())
        assert hit.cached
        shutil.rmtree(entries(root)[0])
        assert read(hit) == FILES


# --- pruning


def fill(root: Path, name: str) -> None:
    """Keep an entry of a megabyte."""
    run_once(root, Make(name.encode() * (1_000_000 // len(name))), key={"name": name})


def kept(root: Path) -> set[str]:
    return {json.loads((entry / "entry.json").read_text())["key"]["name"] for entry in entries(root)}


def set_age(root: Path, name: str, seconds: int) -> None:
    for entry in entries(root):
        if json.loads((entry / "entry.json").read_text())["key"]["name"] == name:
            when = 1_700_000_000 - seconds
            os.utime(entry, (when, when))


@pytest.fixture
def filled(root, monkeypatch) -> Path:
    """Four entries of a megabyte: `a` is the oldest, `d` the newest."""
    monkeypatch.setenv("EXPORT_ZOO_CACHE_GB", "1")
    for age, name in enumerate("dcba"):
        fill(root, name)
        set_age(root, name, 1000 * age)
    assert kept(root) == set("abcd")
    return root


@pytest.mark.parametrize(
    ("limit", "left"),
    [("1", "abcd"), ("inf", "abcd"), ("0.0035", "bcd"), ("0.0025", "cd"), ("0.0005", ""), ("0", "")],
)
def test_the_least_recently_used_entries_are_pruned_down_to_the_limit(filled, monkeypatch, limit, left):
    monkeypatch.setenv("EXPORT_ZOO_CACHE_GB", limit)
    with StageCache(filled):
        pass
    assert kept(filled) == set(left)


def test_a_hit_saves_an_entry_from_pruning(filled, monkeypatch):
    monkeypatch.setenv("EXPORT_ZOO_CACHE_GB", "0.0025")
    assert run_once(filled, Make(), key={"name": "a"})[0].cached
    assert kept(filled) == {"a", "d"}


def test_the_newest_entry_survives_its_own_run(filled, monkeypatch):
    monkeypatch.setenv("EXPORT_ZOO_CACHE_GB", "0.0015")
    fill(filled, "e")
    assert kept(filled) == {"e"}


def test_without_a_limit_of_ones_own_it_is_20_gigabytes(filled, monkeypatch):
    monkeypatch.delenv("EXPORT_ZOO_CACHE_GB")
    assert stage_cache.DEFAULT_LIMIT_GB == 20
    with StageCache(filled):
        pass
    assert kept(filled) == set("abcd")


def test_what_travelled_here_is_pruned_with_the_rest_but_for_what_was_used_today(root, monkeypatch):
    monkeypatch.setenv("EXPORT_ZOO_CACHE", str(root))
    fill(root, "a")
    set_age(root, "a", 1000)
    places = {name: stage_cache.input_place(name, "photos") for name in ("old", "new")}
    for place in places.values():
        place.mkdir(parents=True)
        (place / "a.jpg").write_bytes(bytes(1 << 20))
    os.utime(places["old"].parent, (1_700_000_000, 1_700_000_000))

    def left(limit: str) -> tuple[bool, bool, bool]:
        monkeypatch.setenv("EXPORT_ZOO_CACHE_GB", limit)
        with StageCache(root):
            pass
        return bool([*root.glob("export/*")]), places["old"].exists(), places["new"].exists()

    assert left("1") == (True, True, True)
    assert left("0.0025") == (False, True, True)
    assert left("0") == (False, False, True)


def test_a_failed_run_prunes_nothing(filled, monkeypatch):
    monkeypatch.setenv("EXPORT_ZOO_CACHE_GB", "0")
    with pytest.raises(ZeroDivisionError), StageCache(filled) as cache:
        cache.run("export", KEY, lambda directory: 1 / 0)
    assert kept(filled) == set("abcd")


def test_pruning_leaves_the_work_of_other_runs_and_stray_files_alone(filled, monkeypatch):
    with StageCache(filled) as other:
        held = other.run("export", {"name": "a"}, Make())
        (filled / "export" / "README").write_text("mine")
        monkeypatch.setenv("EXPORT_ZOO_CACHE_GB", "0")
        with StageCache(filled):
            pass
        assert (filled / "export" / "README").exists()
        assert len(read(held)["graph.onnx"]) == 1_000_000
        monkeypatch.setenv("EXPORT_ZOO_CACHE_GB", "1")


def test_pruning_leaves_folders_that_are_no_entries_alone(filled, monkeypatch):
    python = filled / "arm64-root" / "root"  # as export_zoo.engines.emulation.arm64_root makes it
    python.mkdir(parents=True)
    (python / "python3.11").write_bytes(b"x" * 1_000_000)
    monkeypatch.setenv("EXPORT_ZOO_CACHE_GB", "0")
    with StageCache(filled):
        pass
    assert (python / "python3.11").exists()
    assert not list(filled.glob("*/*/entry.json"))


def test_a_limit_that_is_no_number_is_refused_by_name(root, monkeypatch):
    monkeypatch.setenv("EXPORT_ZOO_CACHE_GB", "10GB")
    with pytest.raises(ExportZooError, match="EXPORT_ZOO_CACHE_GB"):
        run_once(root, Make())


def test_an_empty_limit_is_the_default(root, monkeypatch):
    monkeypatch.setenv("EXPORT_ZOO_CACHE_GB", "")
    run_once(root, Make())
    assert_hit(root)


# --- several runs at a time, and kills


def test_threads_that_make_the_same_entry_all_get_their_result_and_one_is_kept(root):
    together = threading.Barrier(4, timeout=60)
    found: dict[int, tuple[StageResult, dict[str, bytes]]] = {}

    def make(directory: Path):
        together.wait()  # all have missed, none has kept
        return Make()(directory)

    def run(index: int) -> None:
        found[index] = run_once(root, make)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [0, 1, 2, 3]
    for result, files in found.values():
        assert not result.cached
        assert result.data == {"nodes": 3}
        assert files == FILES
    assert len(entries(root)) == 1
    assert works(root) == []
    assert_hit(root)


RUN = """
import sys
import tempfile
from pathlib import Path
from export_zoo.exporter.run.cache import StageCache

def make(directory):
    (directory / "graph.onnx").write_bytes(b"graph")
    print("making", flush=True)
    sys.stdin.readline()
    (directory / "note.txt").write_text("made")
    return {"nodes": 3}

with StageCache(Path(sys.argv[1])) as cache:
    result = cache.run("export", {"model": "resnet18", "opset": 18}, make)
    print(result.cached, sorted(path.name for path in result.directory.iterdir()), flush=True)
"""


def start(root: Path) -> subprocess.Popen[str]:
    """Another process, in the middle of making the entry of KEY."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(root)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "making\n"
    return process


@pytest.mark.slow
def test_processes_that_make_the_same_entry_both_get_their_result_and_one_is_kept(root):
    processes = [start(root), start(root)]
    for process in processes:
        out, err = process.communicate("go on\n", timeout=60)
        assert (process.returncode, err) == (0, "")
        assert out == "False ['graph.onnx', 'note.txt']\n"
    assert len(entries(root)) == 1
    assert works(root) == []
    assert_hit(root)


@pytest.mark.slow
def test_a_process_that_finds_the_entry_made_meanwhile_leaves_it_alone(root):
    process = start(root)
    run_once(root, Make())
    (entry,) = entries(root)
    inode = (entry / "graph.onnx").stat().st_ino
    assert process.communicate("go on\n", timeout=60)[1] == ""
    assert process.returncode == 0
    assert (entry / "graph.onnx").stat().st_ino == inode
    assert_hit(root)


@pytest.mark.slow
def test_a_run_that_ends_does_not_take_the_work_of_another_away(root):
    process = start(root)
    run_once(root, Make(), key={"other": 1})
    assert len(works(root)) == 1
    out, err = process.communicate("go on\n", timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out == "False ['graph.onnx', 'note.txt']\n"


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_stage_leaves_no_entry(root):
    process = start(root)
    assert [path.name for path in root.rglob("graph.onnx")] == ["graph.onnx"]
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert entries(root) == []
    (abandoned,) = works(root)
    make = Make()
    result, files = run_once(root, make)
    assert (result.cached, make.count, files) == (False, 1, FILES)
    assert_hit(root)

    os.utime(abandoned, (0, 0))  # long ago
    assert_hit(root)
    assert works(root) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's full disk")
@pytest.mark.parametrize("cached", [True, False])
def test_full_disk_names_the_cache_and_what_moves_it(tmp_path, cached):
    root = tmp_path / "cache" if cached else None
    with StageCache(root) as cache, pytest.raises(EnvironmentFailureError) as raised:
        cache.run("export", {"a": 1}, lambda _: Path("/dev/full").write_bytes(b"x" * 10**6))
    assert "No space left on device (export)" in raised.value.message
    assert raised.value.message.startswith(str(root) if root else tempfile.gettempdir())
    assert "EXPORT_ZOO_CACHE" in raised.value.hint
    assert "TMPDIR" in raised.value.hint


def test_what_a_killed_run_without_a_cache_left_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    StageCache(None).__enter__()  # killed: it never leaves
    (abandoned,) = tmp_path.iterdir()
    somebodys = tmp_path / "export-zoo-clone"
    somebodys.mkdir()
    with StageCache(None):
        assert abandoned.exists()
    for directory in (abandoned, somebodys):
        os.utime(directory, (0, 0))
    with StageCache(None):
        assert not abandoned.exists()
    assert list(tmp_path.iterdir()) == [somebodys]


def test_scratch_of_a_killed_process_is_removed_and_that_of_a_living_one_can_be_locked(root, monkeypatch):
    monkeypatch.setenv("EXPORT_ZOO_CACHE", str(root))
    monkeypatch.setattr(stage_cache, "_GRACE_SECONDS", -1)
    dead = root / "work" / "dead"
    (dead / "files").mkdir(parents=True)
    with work_directory() as first, work_directory() as second:
        assert not dead.exists()
        assert first.exists()
        assert second.exists()
        descriptor = os.open(first, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as `publish` locks the folder of a bundle
        os.close(descriptor)
    assert [*(root / "work").iterdir()] == []
