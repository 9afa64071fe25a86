"""The C++ library on ARM64 CPUs, emulated by qemu-aarch64. ci/cpp-arm64.sh calls it.

check_arm64.py sysroot DIR: Debian's libraries that the library is linked with, for ARM64.
check_arm64.py logits ZOO_INFER BUNDLES SYSROOT: logits of an ARM64 program beside those of this machine. BUNDLES is
what make_bundles.py wrote. The runtimes are those of the ARM64 root (python -m
export_zoo.engines.emulation.arm64_root), which is made if there is none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from export_zoo.engines.emulation import arm64
from export_zoo.engines.emulation.arm64_root import make, mirror_of_apt, unpack_debian

PACKAGES = (
    "libjpeg62-turbo-dev",
    "libjpeg62-turbo",
    "libpng-dev",
    "libpng16-16",
    "zlib1g-dev",
    "zlib1g",
    "libssl-dev",
    "libssl3",
)
CPUS = ("cortex-a53", "neoverse-n1")
LEAST_DB = 100.0
"""SQNR of FP32 logits to this machine's: sums are added in another order. Measured: 110 to 122 dB."""
IMAGES = 2


def sqnr(found: np.ndarray, want: np.ndarray) -> float:
    """In dB; infinite if they are equal."""
    noise = float(np.square(found.astype(np.float64) - want).sum())
    return (
        float("inf") if noise == 0 else 10 * np.log10(float(np.square(want.astype(np.float64)).sum()) / noise)
    )


class Emulated:
    def __init__(self, program: str, bundles: Path, sysroot: Path, folder: Path) -> None:
        self.program, self.bundles, self.folder = program, bundles, folder
        self.root = arm64.default_root()
        make(self.root)
        site = arm64.site(self.root)
        (onnxruntime,) = (site / "onnxruntime" / "capi").glob("libonnxruntime.so.*")
        libraries = ":".join(str(sysroot / part / "lib" / "aarch64-linux-gnu") for part in ("usr", "."))
        self.environment = {
            **os.environ,
            "EXPORT_ZOO_CACHE": str(folder / "cache"),
            "EXPORT_ZOO_ONNXRUNTIME": str(onnxruntime),
            "EXPORT_ZOO_OPENVINO": str(site / "openvino" / "libs"),
            "QEMU_SET_ENV": f"LD_LIBRARY_PATH={libraries}",
        }

    def run(self, cpu: str, model: str, *more: str) -> subprocess.CompletedProcess[str]:
        images = sorted((self.bundles / "images").iterdir())[:IMAGES]
        command = [
            arm64.program("qemu-aarch64", "qemu-user"),
            "-cpu",
            cpu,
            "-L",
            str(self.root / "cpu" / cpu),
        ]
        command += [
            self.program,
            str(self.bundles / f"{model}.bundle"),
            *map(str, images),
            "--json",
            "--no-measure",
            *more,
        ]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)

    def logits(self, cpu: str, model: str, engine: str) -> np.ndarray:
        out = self.folder / "logits.npy"
        done = self.run(cpu, model, "--engine", engine, "--logits", str(out))
        assert done.returncode == 0, (cpu, engine, done)
        print(f"{model}, {engine} on {cpu}: {json.loads(done.stdout)['backend']}", end=", ")
        return np.load(out)


def write_sysroot(sysroot: Path) -> None:
    with tempfile.TemporaryDirectory(dir=sysroot.parent) as work:
        made = Path(work) / "made"
        unpack_debian(made, Path(work), mirror_of_apt(), PACKAGES)
        made.rename(sysroot)


def check_logits(program: str, bundles: Path, sysroot: Path, folder: Path) -> None:
    there = Emulated(program, bundles, sysroot, folder)
    for cpu in CPUS:
        for model, engine, least in (
            ("resnet18", "onnxruntime-fp32", LEAST_DB),
            ("resnet18", "onnxruntime-int8", float("inf")),  # integers: to the bit
            ("mobilenet_v2", "openvino-fp32", LEAST_DB),
        ):
            want = np.load(bundles / f"{model}-{engine}.npy")[:IMAGES]
            found = there.logits(cpu, model, engine)
            print(f"{sqnr(found, want):.1f} dB to this machine's")
            assert sqnr(found, want) >= least, (cpu, engine)
        refused = there.run(cpu, "mobilenet_v2", "--engine", "openvino-int8")
        assert refused.returncode == 1, refused
        assert "OpenVINO's INT8 is wrong on this CPU: docs/cpu.md" in refused.stderr, refused.stderr


def main() -> None:
    match sys.argv[1:]:
        case ["sysroot", sysroot]:
            write_sysroot(Path(sysroot))
        case ["logits", program, bundles, sysroot]:
            with tempfile.TemporaryDirectory() as folder:
                check_logits(program, Path(bundles), Path(sysroot), Path(folder))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
