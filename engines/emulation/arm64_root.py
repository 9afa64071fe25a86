"""Makes an ARM64 root for qemu-aarch64: a folder with Debian's Python, numpy, ONNX Runtime and OpenVINO.

    python -m export_zoo.engines.emulation.arm64_root [DIR]

Nothing is installed on this machine. apt-get reads and writes separate folders, dpkg-deb unpacks the packages, and the
wheels are unzipped. OpenVINO is in the root if it is installed here. The folder holds:

    root/          Debian 12: libc, libstdc++, Python 3.11
    cpu/NAME/      the `/` of qemu-aarch64 for `-cpu NAME`: links into root/, and a /proc/cpuinfo of that CPU
    site/          numpy, ONNX Runtime and OpenVINO
    root.json      the versions; written last

qemu-user 7.2 shows programs the /proc/cpuinfo of this machine. If this machine's CPU is not ARM, ONNX Runtime 1.28 and
later crash on import. So each CPU has its own /proc/cpuinfo here. ONNX Runtime also chooses some kernels by it.
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
from export_zoo.engines.emulation import arm64

RELEASE = "bookworm"
"""Debian release. Its Python version determines the wheels."""
MIRROR_VARIABLE = "DEBIAN_MIRROR"
"""Environment variable: URL of a Debian mirror, `http://HOST/debian`, if apt here has none, for example on Ubuntu."""
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
"""Keys that check the signatures of Debian's package lists."""
PACKAGES = (
    "libc6",
    "libgcc-s1",
    "libstdc++6",
    "zlib1g",
    "libexpat1",
    "libffi8",
    f"python{arm64.PYTHON}-minimal",
    f"libpython{arm64.PYTHON}-minimal",
    f"libpython{arm64.PYTHON}-stdlib",
)
"""Packages that Python and the wheels need.

OpenSSL, SQLite, bzip2 and xz are left out; hashlib still works.
"""
UNUSED = (
    "root/usr/share",
    "root/usr/lib/aarch64-linux-gnu/gconv",
    "site/onnxruntime/transformers",
    "site/onnxruntime/tools",
    "site/onnxruntime/quantization",
)
"""Folders that are removed because running an engine does not read them."""
ONNXRUNTIME = "1.32.0"
"""Version of ONNX Runtime if none is installed here: the newest that was run under qemu-aarch64 7.2, on each of `CPUS`.

1.27.0, 1.30.0 and 1.31.1 were run, too. The default is the version installed here, so that only the CPU differs.
"""
NUMPY = "2.4.6"
"""Version of numpy: the last one for Python 3.11."""
PLATFORMS = (
    "manylinux_2_35_aarch64",
    "manylinux_2_31_aarch64",
    "manylinux_2_28_aarch64",
    "manylinux_2_27_aarch64",
    "manylinux_2_17_aarch64",
)
"""Platform tags of wheels that run with Debian 12's glibc 2.36."""
_PROCESSORS = 512
"""Number of processors in /proc/cpuinfo.

At least this machine's number is needed: processors that are not listed get no kernels of their own.
"""
_NEEDED_BYTES = 700_000_000
"""Free disk space needed to make the root, in bytes: downloads and unpacked files together."""
_CHECK = """
import hashlib, platform, sys
import numpy, onnxruntime
assert platform.machine() == "aarch64", platform.machine()
assert "CPU implementer" in open("/proc/cpuinfo").read(), "the /proc/cpuinfo of another CPU"
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
(y,) = session.run(None, {"x": numpy.full((1, 64, 2, 2), 255, numpy.uint8)})
assert (y == 127).all(), y
"""
"""Python program that runs the model of `_write_convolution`. 64 * 255 * 127 / 2^14 is 126.5."""


def mirror_of_apt() -> str:
    """URL of the Debian mirror: $DEBIAN_MIRROR, else the mirror that this machine's apt uses.

    Raises:
        TargetUnavailableError: there is no mirror.
    """
    if chosen := os.environ.get(MIRROR_VARIABLE):
        return chosen
    if (cache := shutil.which("apt-cache")) is not None:
        done = subprocess.run([cache, "policy"], capture_output=True, text=True, check=False)
        if found := re.search(r"https?://\S*/debian(?=/? )", done.stdout):
            return found.group()
    raise TargetUnavailableError(
        "ARM64 root: apt has no Debian mirror here (is this Ubuntu?)",
        hint=f"set {MIRROR_VARIABLE} or --mirror to the URL of a Debian mirror, http://HOST/debian",
    )


def make(root: Path, *, onnxruntime: str | None = None, mirror: str | None = None) -> bool:
    """Make a root, unless it exists. Returns False if it existed.

    The root is made beside `root`, and renamed after it has run. So `root` is a complete root or does not exist.

    Args:
        onnxruntime: version of ONNX Runtime. Default: the version installed here.
        mirror: URL of a Debian mirror. Default: that of `mirror_of_apt`.

    Raises:
        UsageError: `root` is something else, or a root with another version of ONNX Runtime or OpenVINO.
        TargetUnavailableError: a program, Debian's keys or a Debian mirror is missing.
        EnvironmentFailureError: the network or the disk failed, or the root does not run.
    """
    openvino = _installed("openvino")
    if arm64.usable(root):
        have = arm64.versions(root)
        if (wanted := onnxruntime or _installed("onnxruntime") or have["onnxruntime"]) != have["onnxruntime"]:
            raise UsageError(
                f"{root}: has ONNX Runtime {have['onnxruntime']}, not {wanted}",
                hint=f"remove it, give another folder, or keep it with --onnxruntime {have['onnxruntime']}",
            )
        if openvino and onnxruntime is None and openvino != have.get("openvino"):
            raise UsageError(
                f"{root}: has {'OpenVINO ' + have['openvino'] if 'openvino' in have else 'no OpenVINO'}; {openvino} is "
                "installed here",
                hint="remove it, give another folder, or keep it for engines of ONNX Runtime with "
                f"--onnxruntime {have['onnxruntime']}",
            )
        return False
    if root.is_symlink() or (root.exists() and not (root.is_dir() and not any(root.iterdir()))):
        raise UsageError(
            f"{root}: exists, and is not a usable ARM64 root", hint="remove it, or give another folder"
        )
    _programs()  # what is missing is told before anything is made
    wheels = {"numpy": NUMPY, "onnxruntime": onnxruntime or _installed("onnxruntime") or ONNXRUNTIME}
    if openvino:
        wheels["openvino"] = openvino
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
            unpack_debian(made / "root", work, mirror or mirror_of_apt(), PACKAGES)
            _unpack_wheels(made / "site", work, wheels)
            _add_cpus(made)
            for name in UNUSED:
                shutil.rmtree(made / name, ignore_errors=True)
            for tests in [
                *made.glob("site/numpy/**/tests"),
                *made.glob(f"root/usr/lib/python{arm64.PYTHON}/test"),
            ]:
                shutil.rmtree(tests, ignore_errors=True)
            _write_convolution(work / "convolution.onnx")
            for cpu in arm64.CPUS:
                _check(made, cpu, work / "convolution.onnx")
            record = {"debian": RELEASE, "python": arm64.PYTHON, **wheels}
            (made / arm64.RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            return _put(made, root)
    except OSError as error:
        hint = (
            "free some disk space" if error.errno == errno.ENOSPC else "give a folder that can be written to"
        )
        reason = error.strerror or error
        raise EnvironmentFailureError(f"{root}: the ARM64 root was not made: {reason}", hint=hint) from error


def _installed(name: str) -> str | None:
    """Version of a library that is installed here; None without it."""
    version = library_versions(name)[name]
    return None if version == "absent" else version


def _put(made: Path, root: Path) -> bool:
    """Rename `made` to `root`. Returns False if another process made `root` in the meantime."""
    try:
        made.rename(root)
    except OSError:
        if arm64.usable(root):
            return False
        raise
    return True


def _programs() -> dict[str, str]:
    """Paths of the programs that make a root and run it, by name."""
    if shutil.which("apt-get") is None:
        raise TargetUnavailableError(
            "ARM64 root: apt-get is not installed, so this is not Debian or Ubuntu",
            hint="make the root on Debian or Ubuntu (a container is enough), and copy the folder",
        )
    found = {
        name: arm64.program(name, package)
        for name, package in (("apt-get", "apt"), ("dpkg-deb", "dpkg"), ("qemu-aarch64", "qemu-user"))
    }
    if importlib.util.find_spec("pip") is None:
        raise TargetUnavailableError(
            f"ARM64 root: {sys.executable} has no pip", hint=f"{sys.executable} -m ensurepip"
        )
    if not KEYRING.is_file():
        raise TargetUnavailableError(
            f"ARM64 root: {KEYRING} is missing; it is needed to check Debian's signatures",
            hint="run apt-get install debian-archive-keyring",
        )
    return found


def _run(arguments: Sequence[str], what: str, hint: str, *, cwd: Path, **variables: str) -> str:
    """Run a program and return its standard output.

    Raises:
        EnvironmentFailureError: the program failed. The message has the last lines that it wrote.
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


def unpack_debian(target: Path, work: Path, mirror: str, packages: Sequence[str]) -> None:
    """Download Debian's packages for ARM64 and unpack them to `target`, a new folder. `work` is an empty folder.

    Raises:
        TargetUnavailableError: a program or Debian's keys are missing.
        EnvironmentFailureError: the network or the disk failed.
    """
    programs = _programs()
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
    hint = f"check that {mirror} can be reached, or give another mirror with --mirror"
    _run([*apt, "update"], "apt-get update", hint, cwd=work / "packages")
    _run([*apt, "download", *packages], "apt-get download", hint, cwd=work / "packages")
    target.mkdir(parents=True)
    for package in sorted((work / "packages").glob("*.deb")):
        _run([programs["dpkg-deb"], "-x", str(package), str(target)], "dpkg-deb", "try again", cwd=work)


def _unpack_wheels(site: Path, work: Path, versions: dict[str, str]) -> None:
    """Download ARM64 wheels of these libraries and unzip them to `site`."""
    wheels = work / "wheels"
    arguments = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    arguments += ["--python-version", arm64.PYTHON, "--implementation", "cp", "--dest", str(wheels)]
    for platform in PLATFORMS:
        arguments += ["--platform", platform]
    _run(
        [*arguments, *(f"{name}=={version}" for name, version in versions.items())],
        "pip download",
        f"check that the package index can be reached. If it has no onnxruntime {versions['onnxruntime']} for "
        f"ARM64 and Python {arm64.PYTHON}, use --onnxruntime {ONNXRUNTIME}",
        cwd=work,
    )
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)


def _add_cpus(made: Path) -> None:
    for cpu, (implementer, variant, part, revision) in arm64.CPUS.items():
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
    """Write a model of one int8 convolution. All weights are 127. The output is the sum divided by 2^14."""
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
    """Import numpy and ONNX Runtime on an emulated CPU, and run a convolution."""
    hint = "use another version (--onnxruntime), or a newer qemu-user"
    program = [*arm64.command(made, cpu), "-c", _CHECK, str(model)]
    _run(program, f"running ONNX Runtime as {cpu}", hint, cwd=made, **arm64.environment(made))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m export_zoo.engines.emulation.arm64_root",
        description="Make an ARM64 root for qemu-aarch64: Debian's Python, numpy, ONNX Runtime, and OpenVINO if it is "
        "installed here.",
    )
    parser.add_argument("root", nargs="?", type=Path, metavar="DIR", help=f"default: {arm64.default_root()}")
    parser.add_argument("--onnxruntime", metavar="VERSION", help="default: the version installed here")
    parser.add_argument("--mirror", metavar="URL", help="Debian mirror (default: $DEBIAN_MIRROR, else apt's)")
    options = parser.parse_args(arguments)
    root: Path = (options.root or arm64.default_root()).absolute()
    try:
        made = make(root, onnxruntime=options.onnxruntime, mirror=options.mirror)
    except ExportZooError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    have = arm64.versions(root)
    print(f"{root}: {'made' if made else 'already there'}, ", end="")
    print(", ".join(f"{name} {version}" for name, version in have.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
