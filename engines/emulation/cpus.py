"""CPUs that qemu-user can emulate, and the command that runs Python on each."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export_zoo.base.errors import TargetUnavailableError, UsageError
from export_zoo.base.package import IMPORT_ROOT
from export_zoo.engines.emulation import arm64


@dataclass(frozen=True)
class Cpu:
    """A CPU that can be emulated. `name` is the value of `--cpu`."""

    name: str
    machine: str
    """`x86_64` or `aarch64`."""
    model: str
    """The CPU's name in qemu."""
    description: str


CPUS = {
    cpu.name: cpu
    for cpu in (
        Cpu("haswell", "x86_64", "Haswell-v4", "Intel 2013, AVX2 without VNNI: sums of INT8 saturate"),
        Cpu("nehalem", "x86_64", "Nehalem-v1", "Intel 2008, SSE4.2 without AVX: sums do not saturate"),
        Cpu("cortex-a53", "aarch64", "cortex-a53", "ARMv8.0: no dot products, no FP16"),
        Cpu(
            "neoverse-n1", "aarch64", "neoverse-n1", "ARMv8.2 with dot products: AWS Graviton 2, Ampere Altra"
        ),
    )
}


@dataclass(frozen=True)
class Launch:
    """How to run Python on an emulated CPU.

    `command` comes before Python's arguments. `environment` holds variables to add to the environment.
    """

    command: Sequence[str]
    environment: dict[str, str]
    directory: Path
    """Working directory: the folder from which this package is imported."""


def named(name: str) -> Cpu:
    """The CPU with this name.

    Raises:
        UsageError: the name is unknown.
    """
    if name not in CPUS:
        raise UsageError(
            f"--cpu {name!r}: unknown CPU", hint=f"use one of {', '.join(CPUS)}; --cpu list describes them"
        )
    return CPUS[name]


def emulator(cpu: Cpu) -> str:
    """The path of the emulator for a CPU.

    Raises:
        TargetUnavailableError: the emulator is not installed.
    """
    program = f"qemu-{cpu.machine}"
    if (found := shutil.which(program)) is None:
        raise TargetUnavailableError(
            f"--cpu {cpu.name}: {program} is not installed",
            hint="install qemu-user: apt-get install qemu-user (Debian, Ubuntu)",
        )
    return found


def launch(cpu: Cpu, library: str = "onnxruntime") -> Launch:
    """How to run Python, with numpy, ONNX Runtime, a target's library and this package, on a CPU.

    An x86-64 CPU runs this process's own Python and libraries. An ARM64 CPU runs those of `emulation.arm64_root`.

    Raises:
        TargetUnavailableError: the emulator or the ARM64 root is missing, the root has no such library, or this machine
            has no x86-64 Python for an x86-64 CPU.
    """
    qemu = emulator(cpu)
    if cpu.machine == "aarch64":
        root = arm64.default_root()
        if not arm64.usable(root):
            raise TargetUnavailableError(
                f"--cpu {cpu.name}: there is no ARM64 Python with ONNX Runtime in {root}",
                hint="make one with `python -m export_zoo.engines.emulation.arm64_root` (two minutes, 230 MB), or set "
                f"{arm64.VARIABLE} to the folder of an existing one",
            )
        if library not in arm64.versions(root):
            raise TargetUnavailableError(
                f"--cpu {cpu.name}: the ARM64 root {root} has no {library}",
                hint="remove it and make it again with `python -m export_zoo.engines.emulation.arm64_root`, by the "
                f"Python that has {library}",
            )
        environment = _environment([arm64.site(root), IMPORT_ROOT])
        return Launch(arm64.command(root, cpu.model), {**arm64.environment(root), **environment}, IMPORT_ROOT)
    if platform.machine().lower() not in ("x86_64", "amd64"):
        raise TargetUnavailableError(
            f"--cpu {cpu.name}: needs a Python for x86-64, but this machine is {platform.machine()}",
            hint="verify on an x86-64 machine",
        )
    # In a virtual environment, python is a link, and qemu does not find its libraries through it. So the base Python
    # runs, and PYTHONPATH names the libraries.
    paths = [
        IMPORT_ROOT,
        *(Path(path) for path in sys.path if path.endswith("-packages")),
        Path(np.__file__).parents[1],
    ]
    base = str(getattr(sys, "_base_executable", sys.executable))
    return Launch([qemu, "-cpu", cpu.model, base], _environment(paths), IMPORT_ROOT)


def _environment(paths: Sequence[Path]) -> dict[str, str]:
    unique = dict.fromkeys(str(path.absolute()) for path in paths)
    return {"PYTHONPATH": ":".join(unique), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONNOUSERSITE": "1"}
