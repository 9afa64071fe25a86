"""CPUs that qemu-user can be, and the command that runs Python on each."""

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
from export_zoo.engines.emulation import arm64_root


@dataclass(frozen=True)
class Cpu:
    """A CPU by the name that `--cpu` takes."""

    name: str
    machine: str
    """`x86_64` or `aarch64`."""
    model: str
    """What qemu calls it."""
    description: str


CPUS = {
    cpu.name: cpu
    for cpu in (
        Cpu("haswell", "x86_64", "Haswell-v4", "Intel 2013, AVX2 without VNNI: sums of INT8 saturate"),
        Cpu("nehalem", "x86_64", "Nehalem-v1", "Intel 2008, SSE4.2 without AVX: sums do not saturate"),
        Cpu("cortex-a53", "aarch64", "cortex-a53", "ARMv8.0: neither dot products nor FP16"),
        Cpu(
            "neoverse-n1", "aarch64", "neoverse-n1", "ARMv8.2 with dot products: AWS Graviton 2, Ampere Altra"
        ),
    )
}


@dataclass(frozen=True)
class Launch:
    """How Python is run on a CPU: the command before its arguments, variables for its environment, and where."""

    command: Sequence[str]
    environment: dict[str, str]
    directory: Path
    """Where this package is."""


def named(name: str) -> Cpu:
    """A CPU by its name.

    Raises:
        UsageError: there is no such one.
    """
    if name not in CPUS:
        raise UsageError(
            f"--cpu {name!r}: not known", hint=f"one of {', '.join(CPUS)}; --cpu list tells more"
        )
    return CPUS[name]


def emulator(cpu: Cpu) -> str:
    """The path of the emulator.

    Raises:
        TargetUnavailableError: it is not installed.
    """
    program = f"qemu-{cpu.machine}"
    if (found := shutil.which(program)) is None:
        raise TargetUnavailableError(
            f"--cpu {cpu.name}: {program} is not installed",
            hint="install qemu-user: apt-get install qemu-user (Debian, Ubuntu)",
        )
    return found


def launch(cpu: Cpu) -> Launch:
    """How to run Python, with numpy, ONNX Runtime and this package, on a CPU.

    x86-64 runs this process's own Python and libraries; ARM64 those of `emulation.arm64_root`.

    Raises:
        TargetUnavailableError: the emulator, or the ARM64 root, is not there.
    """
    qemu = emulator(cpu)
    if cpu.machine == "aarch64":
        root = arm64_root.default_root()
        if not arm64_root.usable(root):
            raise TargetUnavailableError(
                f"--cpu {cpu.name}: there is no ARM64 Python with ONNX Runtime in {root}",
                hint="make it with `python -m export_zoo.engines.emulation.arm64_root` (a minute, 130 MB), or set "
                f"{arm64_root.VARIABLE} to where it is",
            )
        environment = _environment([arm64_root.site(root), IMPORT_ROOT])
        return Launch(
            arm64_root.command(root, cpu.model), {**arm64_root.environment(root), **environment}, IMPORT_ROOT
        )
    if platform.machine().lower() not in ("x86_64", "amd64"):
        raise TargetUnavailableError(
            f"--cpu {cpu.name}: needs a Python for x86-64, this machine is {platform.machine()}",
            hint="verify on an x86-64 machine",
        )
    # A virtual environment's python is a link that qemu does not follow to its libraries: the base's, with their path.
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
