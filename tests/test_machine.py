"""How many cores a process may use, and how streams share them."""

from __future__ import annotations

import math

import pytest

from export_zoo.base.machine import cpu_quota, session_threads, usable_cores


def test_streams_share_the_cores(monkeypatch):
    monkeypatch.setattr("export_zoo.base.machine.usable_cores", lambda: 6)
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    assert [session_threads(0, streams) for streams in (1, 2, 4, 8)] == [0, 3, 1, 1]
    assert session_threads(3, 2) == 3
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert session_threads(0) == 6


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/a/b", {}, math.inf),
        ("0::/a/b", {"a/b/cpu.max": "max 100000"}, math.inf),
        (
            "0::/a/b",
            {"a/b/cpu.max": "max 100000", "a/cpu.max": "250000 100000", "cpu.max": "900000 100000"},
            2.5,
        ),
        ("0::/of/the/host", {"cpu.max": "50000 100000"}, 0.5),
        ("0::/c", {"a/cpu.max": "250000 100000"}, math.inf),
        ("0::/", {"cpu.max": "many"}, math.inf),
        (
            "4:cpu,cpuacct:/docker\n0::/",
            {"cpu/docker/cpu.cfs_quota_us": "300000", "cpu/docker/cpu.cfs_period_us": "100000"},
            3,
        ),
        (
            "4:cpu,cpuacct:/\n0::/",
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            math.inf,
        ),
        (
            "3:cpuset:/docker",
            {"cpu/docker/cpu.cfs_quota_us": "1", "cpu/docker/cpu.cfs_period_us": "1"},
            math.inf,
        ),
        ("nonsense", {"cpu.max": "50000 100000"}, math.inf),
    ],
)
def test_the_quota_of_a_container_counts(tmp_path, groups, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "groups").write_text(groups + "\n")
    assert cpu_quota(tmp_path, tmp_path / "groups") == cores
    assert cpu_quota(tmp_path / "absent", tmp_path / "absent") == math.inf


def test_no_more_cores_are_used_than_the_quota_rounded_up(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    for quota, cores in ((math.inf, 8), (2.5, 3), (0.1, 1), (16, 8)):
        monkeypatch.setattr("export_zoo.base.machine.cpu_quota", lambda quota=quota: quota)
        assert usable_cores() == cores
