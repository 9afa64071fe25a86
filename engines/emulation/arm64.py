"""The ARM64 root: where it is, what is in it, and how its Python is run by qemu-aarch64. `arm64_root` makes it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from export_zoo.base.errors import TargetUnavailableError, UsageError

PYTHON = "3.11"
"""Python of the root, Debian 12's."""
RECORD = "root.json"
"""File of a complete root, with its versions."""
CPUS = {
    "cortex-a53": ("0x41", "0x0", "0xd03", "4"),
    "neoverse-n1": ("0x41", "0x3", "0xd0c", "1"),
    "max": ("0x00", "0x0", "0x51", "0"),
}
"""CPUs of qemu-aarch64, with implementer, variant, part and revision as in /proc/cpuinfo.

cortex-a53 has neither dot products nor FP16, and neoverse-n1 has both. max has all features that qemu implements, for
example I8MM.
"""
VARIABLE = "EXPORT_ZOO_ARM64_ROOT"


def default_root() -> Path:
    """The default folder of the ARM64 root.

    $EXPORT_ZOO_ARM64_ROOT, else $XDG_CACHE_HOME/export-zoo/arm64-root, else ~/.cache/export-zoo/arm64-root.
    """
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "export-zoo" / "arm64-root"


def versions(root: Path) -> dict[str, str]:
    """Versions of Debian, Python and the libraries in a root; empty if the root is missing or damaged."""
    try:
        found = json.loads((root / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        return {}
    return found


def usable(root: Path) -> bool:
    """Whether `root` is a complete ARM64 root. Only checks files, runs nothing."""
    parts = (python(root), *(root / "site" / name / "__init__.py" for name in ("numpy", "onnxruntime")))
    files = [*parts, *(root / "cpu" / cpu / "proc" / "cpuinfo" for cpu in CPUS)]
    loaders = [root / "cpu" / cpu / "lib" / "ld-linux-aarch64.so.1" for cpu in CPUS]
    return bool(versions(root)) and all(file.is_file() for file in (*files, *loaders))


def site(root: Path) -> Path:
    """The folder of the libraries in a root."""
    return root / "site"


def command(root: Path, cpu: str) -> list[str]:
    """The command that runs the root's Python on a CPU. Its environment needs `environment(root)`.

    Raises:
        TargetUnavailableError: qemu-aarch64 is not installed.
        UsageError: the CPU is unknown.
    """
    if cpu not in CPUS:
        raise UsageError(f"{cpu!r}: not a CPU of the ARM64 root", hint=f"use {', '.join(CPUS)}")
    qemu = program("qemu-aarch64", "qemu-user")
    return [qemu, "-cpu", cpu, "-L", str(root / "cpu" / cpu), str(python(root))]


def environment(root: Path) -> dict[str, str]:
    """Environment variables that the root's Python needs, in addition to those of this process.

    PYTHONHOME is emptied: this machine's value would lead the root's Python to the wrong files.
    """
    return {"PYTHONPATH": str(root / "site"), "PYTHONHOME": "", "PYTHONDONTWRITEBYTECODE": "1"}


def python(root: Path) -> Path:
    """The Python of a root."""
    return root / "root" / "usr" / "bin" / f"python{PYTHON}"


def program(name: str, package: str) -> str:
    """Path of a program of this machine. Raises TargetUnavailableError with the package that has it."""
    found = shutil.which(name)
    if found is None:
        raise TargetUnavailableError(
            f"ARM64 root: {name} is not installed", hint=f"on Debian or Ubuntu: apt-get install {package}"
        )
    return found
