"""Makes an ARM64 root for qemu-aarch64: Debian's Python, numpy and ONNX Runtime, in a folder of its own.

    python -m export_zoo.engines.emulation.arm64_root [DIR]

Nothing is installed on this machine. apt-get reads and writes folders of its own, dpkg-deb unpacks the packages, and
the wheels of numpy and ONNX Runtime are unzipped. The folder holds:

    root/          Debian 12: libc, libstdc++, Python 3.11
    cpu/NAME/      what qemu-aarch64 takes as `/` for `-cpu NAME`: links into root/, and a /proc/cpuinfo of that CPU
    site/          numpy and ONNX Runtime
    root.json      the versions; it is written last

qemu-user 7.2 shows programs the /proc/cpuinfo of this machine. If that is not an ARM CPU's, ONNX Runtime from 1.28 on
crashes while it is imported. So each CPU has a file of its own here. ONNX Runtime also chooses some kernels by it.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper

from export_zoo.base.errors import EnvironmentFailureError, ExportZooError, TargetUnavailableError, UsageError
from export_zoo.base.machine import library_versions

RELEASE = "bookworm"
"""Debian's release. Its Python decides the wheels."""
PYTHON = "3.11"
MIRROR_VARIABLE = "DEBIAN_MIRROR"
"""URL of a mirror of Debian, `http://HOST/debian`, where apt here knows none, as on Ubuntu."""
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
"""Keys that sign Debian's lists of packages."""
PACKAGES = (
    "libc6",
    "libgcc-s1",
    "libstdc++6",
    "zlib1g",
    "libexpat1",
    "libffi8",
    f"python{PYTHON}-minimal",
    f"libpython{PYTHON}-minimal",
    f"libpython{PYTHON}-stdlib",
)
"""The packages that Python, numpy and ONNX Runtime need. Without OpenSSL, SQLite, bzip2 and xz hashlib still works."""
UNUSED = (
    "root/usr/share",
    "root/usr/lib/aarch64-linux-gnu/gconv",
    "site/onnxruntime/transformers",
    "site/onnxruntime/tools",
    "site/onnxruntime/quantization",
)
"""Folders that running an engine does not read."""
ONNXRUNTIME = "1.32.0"
"""ONNX Runtime where none is installed here: the newest that was run under qemu-aarch64 7.2, as each of `CPUS`.

1.27.0, 1.30.0 and 1.31.1 were run, too. The default is the version installed here, so that only the CPU differs.
"""
NUMPY = "2.4.6"
"""The last numpy for Python 3.11."""
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64")
"""Wheels that Debian 12's glibc 2.36 runs."""
CPUS = {
    "cortex-a53": ("0x41", "0x0", "0xd03", "4"),
    "neoverse-n1": ("0x41", "0x3", "0xd0c", "1"),
    "max": ("0x00", "0x0", "0x51", "0"),
}
"""CPUs of qemu-aarch64, and implementer, variant, part and revision as /proc/cpuinfo says them.

cortex-a53 has neither dot products nor FP16, neoverse-n1 has both; max has all that qemu implements, I8MM for example.
"""
_PROCESSORS = 512
"""Number of processors in /proc/cpuinfo. At least this machine's: those not listed have no kernels of their own."""
_NEEDED_BYTES = 500_000_000
"""Free disk space while the root is made: downloads and unpacked files together."""
_RECORD = "root.json"
_CHECK = """
import hashlib, platform, sys
import numpy, onnxruntime
assert platform.machine() == "aarch64", platform.machine()
assert "CPU implementer" in open("/proc/cpuinfo").read(), "the /proc/cpuinfo of another CPU"
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
(y,) = session.run(None, {"x": numpy.full((1, 64, 2, 2), 255, numpy.uint8)})
assert (y == 127).all(), y
"""
"""A program that runs `_write_convolution`'s model. 64 * 255 * 127 / 2^14 is 126.5."""


VARIABLE = "EXPORT_ZOO_ARM64_ROOT"


def default_root() -> Path:
    """$EXPORT_ZOO_ARM64_ROOT, else $XDG_CACHE_HOME/export-zoo/arm64-root, else ~/.cache/export-zoo/arm64-root."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "export-zoo" / "arm64-root"


def versions(root: Path) -> dict[str, str]:
    """Versions of Python, numpy and ONNX Runtime in a root; empty where there is none, or where it is damaged."""
    try:
        found = json.loads((root / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        return {}
    return found


def usable(root: Path) -> bool:
    """Whether `root` is a finished root whose parts are there. Nothing is run."""
    parts = (_python(root), *(root / "site" / name / "__init__.py" for name in ("numpy", "onnxruntime")))
    files = [*parts, *(root / "cpu" / cpu / "proc" / "cpuinfo" for cpu in CPUS)]
    loaders = [root / "cpu" / cpu / "lib" / "ld-linux-aarch64.so.1" for cpu in CPUS]
    return bool(versions(root)) and all(file.is_file() for file in (*files, *loaders))


def site(root: Path) -> Path:
    """The folder of numpy and ONNX Runtime in a root."""
    return root / "site"


def command(root: Path, cpu: str) -> list[str]:
    """The command that runs the root's Python as a CPU. Its environment needs `environment(root)`.

    Raises:
        TargetUnavailableError: qemu-aarch64 is not installed.
        UsageError: an unknown CPU.
    """
    if cpu not in CPUS:
        raise UsageError(f"{cpu!r}: not a CPU of the ARM64 root", hint=f"use {', '.join(CPUS)}")
    qemu = _program("qemu-aarch64", "qemu-user")
    return [qemu, "-cpu", cpu, "-L", str(root / "cpu" / cpu), str(_python(root))]


def environment(root: Path) -> dict[str, str]:
    """Environment variables that the root's Python needs, to be added to those of this process.

    A PYTHONHOME of this machine's Python would lead the root's to the wrong files.
    """
    return {"PYTHONPATH": str(root / "site"), "PYTHONHOME": "", "PYTHONDONTWRITEBYTECODE": "1"}


def mirror_of_apt() -> str:
    """The mirror of Debian that $DEBIAN_MIRROR names, or that this machine's own apt uses.

    Raises:
        TargetUnavailableError: there is none.
    """
    if chosen := os.environ.get(MIRROR_VARIABLE):
        return chosen
    if (cache := shutil.which("apt-cache")) is not None:
        done = subprocess.run([cache, "policy"], capture_output=True, text=True, check=False)
        if found := re.search(r"https?://\S*/debian(?=/? )", done.stdout):
            return found.group()
    raise TargetUnavailableError(
        "ARM64 root: apt knows no mirror of Debian here (is this Ubuntu?)",
        hint=f"set {MIRROR_VARIABLE}, or give --mirror: the URL of one, http://HOST/debian",
    )


def make(root: Path, *, onnxruntime: str | None = None, mirror: str | None = None) -> bool:
    """Make a root, unless it is there; False where it was.

    It is made beside `root` and renamed when it has run, so `root` is a whole root or does not exist.

    Args:
        onnxruntime: version of ONNX Runtime; by default the one installed here.
        mirror: URL of a mirror of Debian; by default `mirror_of_apt`'s.

    Raises:
        UsageError: something else is at `root`, or a root with another version than asked for.
        TargetUnavailableError: a program, or Debian's keys, are missing.
        EnvironmentFailureError: the network or the disk failed, or the root does not run.
    """
    if usable(root):
        have = versions(root)["onnxruntime"]
        if (wanted := onnxruntime or _installed() or have) != have:
            raise UsageError(
                f"{root}: has ONNX Runtime {have}, not {wanted}",
                hint=f"remove it, give another folder, or keep it with --onnxruntime {have}",
            )
        return False
    if root.is_symlink() or (root.exists() and not (root.is_dir() and not any(root.iterdir()))):
        raise UsageError(
            f"{root}: exists, and is not a usable ARM64 root", hint="remove it, or give another folder"
        )
    programs = _programs()
    onnxruntime = onnxruntime or _installed() or ONNXRUNTIME
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root.parent).free
        if free < _NEEDED_BYTES:
            raise OSError(errno.ENOSPC, f"{free / 1e6:.0f} MB free, {_NEEDED_BYTES / 1e6:.0f} MB needed")
        with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as temporary:
            made = Path(temporary) / "made"
            work = Path(temporary) / "work"
            made.mkdir()
            work.mkdir()
            _unpack_debian(made / "root", work, mirror or mirror_of_apt(), programs)
            _unpack_wheels(made / "site", work, onnxruntime)
            _add_cpus(made)
            for name in UNUSED:
                shutil.rmtree(made / name, ignore_errors=True)
            for tests in [*made.glob("site/numpy/**/tests"), *made.glob(f"root/usr/lib/python{PYTHON}/test")]:
                shutil.rmtree(tests, ignore_errors=True)
            _write_convolution(work / "convolution.onnx")
            for cpu in CPUS:
                _check(made, cpu, work / "convolution.onnx")
            record = {
                "debian": RELEASE,
                "python": PYTHON,
                "numpy": NUMPY,
                "onnxruntime": onnxruntime,
            }
            (made / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            return _put(made, root)
    except OSError as error:
        hint = (
            "free some disk space" if error.errno == errno.ENOSPC else "give a folder that can be written to"
        )
        reason = error.strerror or error
        raise EnvironmentFailureError(f"{root}: the ARM64 root was not made: {reason}", hint=hint) from error


def _installed() -> str | None:
    """The version of ONNX Runtime here."""
    version = library_versions("onnxruntime")["onnxruntime"]
    return None if version == "absent" else version


def _python(root: Path) -> Path:
    return root / "root" / "usr" / "bin" / f"python{PYTHON}"


def _put(made: Path, root: Path) -> bool:
    """Rename `made` to `root`; False where another process made it meanwhile."""
    try:
        made.rename(root)
    except OSError:
        if usable(root):
            return False
        raise
    return True


def _program(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise TargetUnavailableError(
            f"ARM64 root: {name} is not installed", hint=f"on Debian or Ubuntu: apt-get install {package}"
        )
    return found


def _programs() -> dict[str, str]:
    """Paths of the programs that make a root and run it."""
    if shutil.which("apt-get") is None:
        raise TargetUnavailableError(
            "ARM64 root: apt-get is not installed, so this is not Debian or Ubuntu",
            hint="make the root on Debian or Ubuntu (a container will do), and copy the folder",
        )
    found = {
        name: _program(name, package)
        for name, package in (("apt-get", "apt"), ("dpkg-deb", "dpkg"), ("qemu-aarch64", "qemu-user"))
    }
    if importlib.util.find_spec("pip") is None:
        raise TargetUnavailableError(
            f"ARM64 root: {sys.executable} has no pip", hint=f"{sys.executable} -m ensurepip"
        )
    if not KEYRING.is_file():
        raise TargetUnavailableError(
            f"ARM64 root: {KEYRING} is missing, which checks Debian's signatures",
            hint="apt-get install debian-archive-keyring",
        )
    return found


def _run(arguments: Sequence[str], what: str, hint: str, *, cwd: Path, **variables: str) -> str:
    """Standard output of a program.

    Raises:
        EnvironmentFailureError: it fails; with the last lines that it wrote.
    """
    done = subprocess.run(
        arguments,
        cwd=cwd,
        env={**os.environ, "LC_ALL": "C", **variables},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("E:", "ERROR:"))] or lines
        said = "; ".join(errors[-3:]) or f"exit code {done.returncode}"
        raise EnvironmentFailureError(f"ARM64 root: {what} failed: {said}", hint=hint)
    return done.stdout


def _unpack_debian(target: Path, work: Path, mirror: str, programs: dict[str, str]) -> None:
    """Download Debian's packages for ARM64 and unpack them to `target`."""
    for name in ("lists/partial", "archives/partial", "packages"):
        (work / name).mkdir(parents=True)
    sources = work / "sources.list"
    sources.write_text(f"deb [signed-by={KEYRING}] {mirror} {RELEASE} main\n", encoding="utf-8")
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "",
        "APT::Update::Error-Mode": "any",
        "Acquire::Languages": "none",
        "Acquire::Retries": "2",
        "Debug::NoLocking": "1",
        "Dir::Cache": str(work),
        "Dir::Cache::archives": str(work / "archives"),
        "Dir::Etc::sourcelist": str(sources),
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State": str(work),
        "Dir::State::Lists": str(work / "lists"),
        "Dir::State::status": "/dev/null",
    }
    apt = [programs["apt-get"], "-q", *(f"-o{key}={value}" for key, value in settings.items())]
    hint = f"check that {mirror} can be reached, or give another with --mirror"
    _run([*apt, "update"], "apt-get update", hint, cwd=work / "packages")
    _run([*apt, "download", *PACKAGES], "apt-get download", hint, cwd=work / "packages")
    target.mkdir()
    for package in sorted((work / "packages").glob("*.deb")):
        _run([programs["dpkg-deb"], "-x", str(package), str(target)], "dpkg-deb", "try again", cwd=work)


def _unpack_wheels(site: Path, work: Path, onnxruntime: str) -> None:
    """Download the ARM64 wheels of numpy and ONNX Runtime and unzip them to `site`."""
    wheels = work / "wheels"
    arguments = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    arguments += ["--python-version", PYTHON, "--implementation", "cp", "--dest", str(wheels)]
    for platform in PLATFORMS:
        arguments += ["--platform", platform]
    _run(
        [*arguments, f"numpy=={NUMPY}", f"onnxruntime=={onnxruntime}"],
        "pip download",
        f"check that the package index can be reached; or, if it has no onnxruntime {onnxruntime} for "
        f"ARM64 and Python {PYTHON}, use --onnxruntime {ONNXRUNTIME}",
        cwd=work,
    )
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)


def _add_cpus(made: Path) -> None:
    for cpu, (implementer, variant, part, revision) in CPUS.items():
        directory = made / "cpu" / cpu
        (directory / "proc").mkdir(parents=True)
        for name in ("etc", "lib", "usr"):
            (directory / name).symlink_to(Path("..", "..", "root", name))
        fields = (
            f"BogoMIPS\t: 100.00\nFeatures\t: fp asimd\nCPU implementer\t: {implementer}\nCPU architecture: 8\n"
            f"CPU variant\t: {variant}\nCPU part\t: {part}\nCPU revision\t: {revision}\n\n"
        )
        processors = "".join(f"processor\t: {index}\n{fields}" for index in range(_PROCESSORS))
        (directory / "proc" / "cpuinfo").write_text(processors, encoding="utf-8")


def _write_convolution(path: Path) -> None:
    """Write a model of one int8 convolution. All weights are 127, and the output is the sum over 2^14."""
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "one": np.array(1, np.float32),
        "scale": np.array(2**14, np.float32),
        "zero": np.array(0, np.uint8),
        "weight": np.full((16, 64, 1, 1), 127, np.int8),
        "weight_zero": np.array(0, np.int8),
    }
    inputs = ["x", "one", "zero", "weight", "one", "weight_zero", "scale", "zero"]
    graph = helper.make_graph(
        [helper.make_node("QLinearConv", inputs, ["y"])],
        "convolution",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 64, 2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [1, 16, 2, 2])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())


def _check(made: Path, cpu: str, model: Path) -> None:
    """Import numpy and ONNX Runtime as a CPU, and run a convolution."""
    hint = "use another version (--onnxruntime), or a newer qemu-user"
    program = [*command(made, cpu), "-c", _CHECK, str(model)]
    _run(program, f"running ONNX Runtime as {cpu}", hint, cwd=made, **environment(made))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m export_zoo.engines.emulation.arm64_root",
        description="Make an ARM64 root for qemu-aarch64: Debian's Python, numpy and ONNX Runtime.",
    )
    parser.add_argument("root", nargs="?", type=Path, metavar="DIR", help=f"default: {default_root()}")
    parser.add_argument("--onnxruntime", metavar="VERSION", help="default: the version installed here")
    parser.add_argument("--mirror", metavar="URL", help="Debian's mirror (default: that of apt here)")
    options = parser.parse_args(arguments)
    root: Path = (options.root or default_root()).absolute()
    try:
        made = make(root, onnxruntime=options.onnxruntime, mirror=options.mirror)
    except ExportZooError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    have = versions(root)
    print(f"{root}: {'made' if made else 'already there'}, ", end="")
    print(f"Python {have['python']}, numpy {have['numpy']}, ONNX Runtime {have['onnxruntime']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
