"""The machine and the libraries that a result comes from, for provenance and for keys of the stage cache."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import cache
from importlib import metadata
from pathlib import Path

from export_zoo.base.errors import UsageError

_DISTRIBUTIONS = {"onnxruntime": ("onnxruntime-gpu", "onnxruntime")}


@cache
def _cpu_info() -> dict[str, str]:
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    return fields


_LEAF_7, _LEAF_7_1 = 1, 6
"""Indices of CPUID's leaves in glibc's <sys/platform/x86.h>: leaf 7, and leaf 7 with subleaf 1."""

_EAX, _EBX, _ECX, _EDX = range(4)

_INSTRUCTION_SETS = (
    # Name, flag in /proc/cpuinfo, and position in CPUID: leaf, register, bit.
    ("amx-int8", "amx_int8", _LEAF_7, _EDX, 25),
    ("avx512-vnni", "avx512_vnni", _LEAF_7, _ECX, 11),
    ("avx-vnni", "avx_vnni", _LEAF_7_1, _EAX, 4),
    ("avx512", "avx512bw", _LEAF_7, _EBX, 30),
    ("avx2", "avx2", _LEAF_7, _EBX, 5),
)


def _cpuid() -> Callable[[int, int, int], bool] | None:
    """A function that tests a CPUID bit and whether the operating system enables it; None without glibc 2.33."""
    import ctypes

    class Leaf(ctypes.Structure):
        _fields_ = (("cpuid", ctypes.c_uint * 4), ("active", ctypes.c_uint * 4))

    try:
        leaf_of = ctypes.CDLL(None)["__x86_get_cpuid_feature_leaf"]
    except (AttributeError, OSError, TypeError):
        return None
    leaf_of.argtypes, leaf_of.restype = [ctypes.c_uint], ctypes.POINTER(Leaf)
    return lambda leaf, register, bit: bool(leaf_of(leaf).contents.active[register] >> bit & 1)


@cache
def instruction_set() -> str:
    """The widest integer instruction set of this CPU, for example `avx512-vnni`; otherwise `x86_64` or `aarch64`.

    It comes from CPUID: /proc/cpuinfo describes the host even where qemu-user emulates another CPU. Without glibc 2.33
    (musl, macOS, Windows) it comes from /proc/cpuinfo. The name is for people and for provenance. `saturation.probe`
    finds out whether INT8 sums saturate.
    """
    machine = platform.machine().lower()
    if machine not in ("x86_64", "amd64"):
        return machine
    has = _cpuid()
    flags = set(_cpu_info().get("flags", "").split()) if has is None else set()
    for name, flag, leaf, register, bit in _INSTRUCTION_SETS:
        if flag in flags or (has is not None and has(leaf, register, bit)):
            return name
    return machine


def one_blas_thread() -> AbstractContextManager[object]:
    """A context in which NumPy's matrix products use one thread: the number of threads changes a sum's last bit."""
    import threadpoolctl

    limit: Callable[..., AbstractContextManager[object]] = threadpoolctl.threadpool_limits
    return limit(limits=1, user_api="blas")


def usable_cores() -> int:
    """Cores that this process may run on, at most its container's quota of CPU time, rounded up. As in C++."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, cpu_quota())))


def cpu_quota(cgroups: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> float:
    """Cores' worth of CPU time that this process's control groups allow; infinite without a limit.

    cpu.max and cpu.cfs_quota_us of Linux's "Control Group v2" and "CFS Bandwidth Control", of the process's own group
    and of all groups above it.

    Args:
        cgroups: where the groups are mounted.
        process: which groups the process is in.
    """
    least = math.inf
    try:
        lines = process.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return least
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = cgroups / "cpu" if controllers else cgroups
        group = mount / path.lstrip("/")
        # In a container, the path may be that of the host; the mount is then the process's own group.
        for place in (group, *group.parents):
            least = min(least, _quota(place))
            if place == mount:
                break
    return least


def _quota(group: Path) -> float:
    """Cores' worth of CPU time that one control group allows; infinite without a limit."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with suppress(OSError, ValueError):
            quota, period = (
                int(n) for file in files for n in (group / file).read_text(encoding="ascii").split()
            )
            if quota > 0 and period > 0:
                return quota / period
    return math.inf


MOST_THREADS = 1024
"""As in C++. A runtime that is asked for a million begins to start them, until memory is full."""


def session_threads(threads: int, streams: int = 1) -> int:
    """Number of intra-op threads for a runtime; `threads` 0 means all cores that this process may run on.

    By default, ONNX Runtime starts a thread for each core of the machine and binds it to that core, even where taskset
    or a container limits the process to fewer cores.

    Args:
        streams: batches that are computed at the same time, each by as many threads. They share the cores if `threads`
            is 0.

    Raises:
        UsageError: `threads` is negative, `streams` is below 1, or there are more than MOST_THREADS in all.
    """
    if not 0 <= threads <= MOST_THREADS:
        raise UsageError(f"threads={threads}: must be 0 to {MOST_THREADS}", hint="give 0 for all cores")
    if not 1 <= streams <= MOST_THREADS // max(1, threads):
        raise UsageError(
            f"streams={streams}: must be 1 or more, with at most {MOST_THREADS} threads in all",
            hint="give one for each core, with threads=1",
        )
    usable = usable_cores()
    if threads or (streams == 1 and usable >= (os.cpu_count() or 1)):
        return threads
    return max(1, usable // streams)


def cpu_model() -> str:
    """`model name` of /proc/cpuinfo, and the number of usable cores."""
    name, cores = _cpu_info().get("model name", platform.processor() or platform.machine()), usable_cores()
    return f"{name}, {cores} {'core' if cores == 1 else 'cores'}"


_CGROUPS = (
    # Files of limit, usage and statistics, and the statistic of reclaimable memory: cgroup version 2, then version 1.
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


def available_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be allocated without swapping, within the limits of the machine and of this process's container.

    Args:
        cgroup: where the container's limits are mounted.
    """
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit, usage, statistics, reclaimable in _CGROUPS:
        try:
            most = int((cgroup / limit).read_text(encoding="ascii"))
            used = int((cgroup / usage).read_text(encoding="ascii"))
            lines = (cgroup / statistics).read_text(encoding="ascii").splitlines()
        except (OSError, ValueError):  # this cgroup version is absent, or there is no limit: "max"
            continue
        cached = next((int(line.split()[1]) for line in lines if line.split()[0] == reclaimable), 0)
        free = min(free, max(0, most - used + cached))
    return free


def library_versions(*names: str) -> dict[str, str]:
    """Installed versions by name, without importing anything; `absent` for packages that are not installed."""
    versions = {}
    for name in names:
        for distribution in _DISTRIBUTIONS.get(name, (name,)):
            try:
                versions[name] = metadata.version(distribution)
                break
            except metadata.PackageNotFoundError:
                versions[name] = "absent"
    return versions
