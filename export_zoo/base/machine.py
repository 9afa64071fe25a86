"""What machine and which libraries a result comes from: provenance, and keys of the stage cache."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from importlib import metadata
from pathlib import Path

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
    # Name, the flag of /proc/cpuinfo, and where CPUID says it: leaf, register, bit.
    ("amx-int8", "amx_int8", _LEAF_7, _EDX, 25),
    ("avx512-vnni", "avx512_vnni", _LEAF_7, _ECX, 11),
    ("avx-vnni", "avx_vnni", _LEAF_7_1, _EAX, 4),
    ("avx512", "avx512bw", _LEAF_7, _EBX, 30),
    ("avx2", "avx2", _LEAF_7, _EBX, 5),
)


def _cpuid() -> Callable[[int, int, int], bool] | None:
    """Asks CPUID for a bit that the operating system lets programs use; None without glibc 2.33."""
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
    """The widest integer instruction set of this CPU, `avx512-vnni` for example; `x86_64` or `aarch64` for all others.

    It comes from CPUID: /proc/cpuinfo describes the host even where qemu-user emulates another CPU. Without glibc 2.33
    (musl, macOS, Windows) it comes from /proc/cpuinfo. It is a name for people and for provenance; whether INT8
    sums saturate is found by `saturation.probe`.
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
    """A context in which NumPy's matrix products use one thread: how many share a sum shows in its last bit."""
    import threadpoolctl

    limit: Callable[..., AbstractContextManager[object]] = threadpoolctl.threadpool_limits
    return limit(limits=1, user_api="blas")


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def session_threads(threads: int) -> int:
    """Intra-op threads to ask ONNX Runtime for, where 0 asks for all cores: those that this process may run on.

    Left alone, ONNX Runtime takes a thread for each core of the machine and binds it to that core, whatever cores
    taskset or a container leaves to the process.
    """
    usable = usable_cores()
    return threads or (usable if usable < (os.cpu_count() or 1) else 0)


def cpu_model() -> str:
    """`model name` of /proc/cpuinfo, and the number of usable cores."""
    name, cores = _cpu_info().get("model name", platform.processor() or platform.machine()), usable_cores()
    return f"{name}, {cores} {'core' if cores == 1 else 'cores'}"


_CGROUPS = (
    # Limit, usage, statistics and, of these, what is given back when it is needed: of version 2, and of version 1.
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


def available_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be taken without swapping, here and in the container that this process is in.

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
        except (OSError, ValueError):  # no such version here, or no limit: "max"
            continue
        cached = next((int(line.split()[1]) for line in lines if line.split()[0] == reclaimable), 0)
        free = min(free, max(0, most - used + cached))
    return free


def library_versions(*names: str) -> dict[str, str]:
    """Installed versions by name, without importing anything; `absent` for what is not installed."""
    versions = {}
    for name in names:
        for distribution in _DISTRIBUTIONS.get(name, (name,)):
            try:
                versions[name] = metadata.version(distribution)
                break
            except metadata.PackageNotFoundError:
                versions[name] = "absent"
    return versions
