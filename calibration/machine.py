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


def instruction_set() -> str:
    """The widest integer instruction set that ONNX Runtime's kernels choose by, `avx512-vnni` say.

    uint8 x int8 products saturate in 16 bits on `avx2` and `avx512` (no VNNI), so INT8 logits are only
    comparable on the same one.
    """
    machine = platform.machine().lower()
    if machine not in ("x86_64", "amd64"):
        return machine
    flags = set(_cpu_info().get("flags", "").split())
    for name, needed in (
        ("amx-int8", {"amx_int8"}),
        ("avx512-vnni", {"avx512_vnni"}),
        ("avx-vnni", {"avx_vnni"}),
        ("avx512", {"avx512bw"}),
        ("avx2", {"avx2"}),
    ):
        if needed <= flags:
            return name
    return machine


def saturates(instructions: str) -> bool:
    """True where uint8 x int8 products are summed in saturating 16 bits (`vpmaddubsw`)."""
    return instructions in ("avx2", "avx512")


def one_blas_thread() -> AbstractContextManager[object]:
    """A context in which NumPy's matrix products use one thread: how many share a sum shows in its last bit."""
    import threadpoolctl

    limit: Callable[..., AbstractContextManager[object]] = threadpoolctl.threadpool_limits
    return limit(limits=1, user_api="blas")


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
