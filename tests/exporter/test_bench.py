"""`export-zoo bench`: latency and throughput of a bundle's engines."""

from __future__ import annotations

import shutil
import threading
import time

import numpy as np
import pytest

from export_zoo.engines.bundle.manifest import Batch
from export_zoo.engines.targets.onnxruntime import engine
from export_zoo.engines.verification import throughput
from export_zoo.engines.verification.throughput import Setting, settings


def test_each_engine_is_measured_in_each_setting(digits_bundle, cli):
    given = ["--batch", "1", "--batch", "4", "--threads", "1", "--streams", "1", "--streams", "2"]
    done = cli("bench", digits_bundle, *given, "--seconds", "0.3")
    assert done.code == 0, done.err
    points = done.json["throughput"]["points"]
    found = [(p["engine"], p["batch"], p["threads"], p["streams"]) for p in points]
    engines = ["onnxruntime-fp32", "onnxruntime-int8"]
    assert found == [(e, batch, 1, streams) for batch in (1, 4) for streams in (1, 2) for e in engines]
    for point in points:
        assert point["p50_ms"] > 0
        assert (point["p90_ms"] is None) == (point["runs"] < 10)
        assert (point["p99_ms"] is None) == (point["runs"] < 100)
        if point["p99_ms"] is not None:
            assert point["p50_ms"] <= point["p90_ms"] <= point["p99_ms"]
        if point["engine"].endswith("fp32"):
            assert point["speedup"] == 1
    assert "times the throughput of FP32 in the same setting" in done.out
    assert cli("bench", digits_bundle, "--batch", "1", "--seconds", "0.05", "--quiet").out == ""


def test_one_engine_is_measured_beside_fp32(digits_bundle, cli):
    few = ["--batch", "1", "--threads", "1", "--streams", "1", "--seconds", "0.05"]
    done = cli("bench", digits_bundle, "--engine", "onnxruntime-int8", *few)
    engines = [point["engine"] for point in done.json["throughput"]["points"]]
    assert engines == ["onnxruntime-fp32", "onnxruntime-int8"]


class _Sleeping:
    """Takes 10 ms a run, and notes how many run at once."""

    def __init__(self) -> None:
        self.most, self._running, self._lock = 0, 0, threading.Lock()

    def run_all(self, batch: np.ndarray, /) -> None:
        with self._lock:
            self._running += 1
            self.most = max(self.most, self._running)
        time.sleep(0.01)
        with self._lock:
            self._running -= 1


def test_streams_run_at_once_and_their_throughput_adds_up():
    sleeping, batch = _Sleeping(), np.zeros((4, 3, 8, 8), np.float32)
    running = {"onnxruntime-fp32": [sleeping], "three": [sleeping] * 3}
    first, second = throughput.in_turn(running, batch, Setting(4, 1, 3), 0.5)
    assert sleeping.most == 3
    assert 10 <= first.p50_ms < 20
    assert first.images_per_second == pytest.approx(400, rel=0.4)
    assert second.speedup == pytest.approx(3, rel=0.3)


def test_the_settings_that_are_measured_by_default(monkeypatch):
    monkeypatch.setattr(throughput, "usable_cores", lambda: 4)
    batch = Batch(min=1, opt=8, max=8)
    combinations = [(1, 1), (1, 4), (4, 1)]
    assert settings(batch) == [Setting(size, *both) for size in (1, 8) for both in combinations]
    assert settings(batch, [2], [3], [5, 5]) == [Setting(2, 3, 5)]
    assert settings(batch, [2], [2]) == [Setting(2, 2, 1), Setting(2, 2, 2)]
    assert settings(batch, [2], [], [2]) == [Setting(2, 1, 2)]


class _Failing:
    """Has no memory for the second run."""

    def __init__(self) -> None:
        self._runs = 0

    def run_all(self, batch: np.ndarray, /) -> None:
        self._runs += 1
        if self._runs > 1:
            raise MemoryError("at batch 4")


def test_a_stream_that_fails_ends_all():
    with pytest.raises(MemoryError, match="at batch 4"):
        throughput._at_once([_Sleeping(), _Failing()], np.zeros((4, 3, 8, 8), np.float32), 0.2)


def test_too_little_memory_is_not_blamed_on_the_file(digits_bundle, cli, monkeypatch):
    def session(*_: object, **__: object) -> None:
        raise RuntimeError("std::bad_alloc")

    monkeypatch.setattr(engine.ort, "InferenceSession", session)
    done = cli("bench", digits_bundle, "--streams", "2", "--threads", "1", "--batch", "1")
    assert done.code == 7
    assert "batch 1, threads 1, streams 2: memory or threads do not suffice" in done.err
    assert "give fewer --streams" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--engine", "none"], 5, "no engine 'none'"),
        (["--batch", "0"], 2, "0 is not in the range"),
        (["--batch", "64"], 2, "--batch 64: the bundle takes 1 to 32"),
        (["--seconds", "nan"], 2, "--seconds"),
    ],
)
def test_what_cannot_be_measured_is_said(digits_bundle, cli, arguments, code, says):
    done = cli("bench", digits_bundle, *arguments)
    assert done.code == code, done.err
    assert says in done.err


def test_a_damaged_bundle_is_said(digits_bundle, cli, tmp_path):
    bundle = shutil.copytree(digits_bundle, tmp_path / "bundle")
    next((bundle / "files").glob("*int8*.onnx")).write_bytes(b"spoilt")
    done = cli("bench", bundle)
    assert done.code == 5
    assert "checksum mismatch" in done.err
