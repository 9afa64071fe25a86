"""Runs the library on other x86-64 CPUs, emulated by qemu-x86_64.

check_cpus.py names PROGRAM: the instruction set that instruction_set.cpp prints.
check_cpus.py logits ZOO_INFER BUNDLES: INT8 logits where sums saturate (Haswell), and where they do not (Nehalem).

Exits with 77, which ctest calls skipped, where these CPUs cannot be emulated.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

SKIPPED = 77
HASWELL, NEHALEM = "Haswell-v4", "Nehalem-v1"  # AVX2 without VNNI; SSE4.2
EXACT = "exact INT8 sums (session.x64quantprecision)"
ENTRY = {"session.x64quantprecision": "1"}


def emulator() -> str:
    """Path of qemu-x86_64."""
    found = shutil.which("qemu-x86_64")
    if found is None:
        print("skipped: there is no qemu-x86_64 (Debian's package qemu-user)")
        sys.exit(SKIPPED)
    if platform.machine() != "x86_64":
        print(f"skipped: the programs are built for {platform.machine()}, not for x86_64")
        sys.exit(SKIPPED)
    return found


def on(cpu: str, *command: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command on a CPU; on the one of this machine where the name is empty."""
    emulated = [emulator(), "-cpu", cpu] if cpu else []
    done = subprocess.run([*emulated, *map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == code, (cpu, done)
    return done


def check_names(program: str) -> None:
    for cpu, want in ((HASWELL, "avx2"), (NEHALEM, "x86_64")):
        found = on(cpu, program).stdout.strip()
        assert found == want, f"{cpu} is called {found}, not {want}"
    print(f"this machine: {on('', program).stdout.strip()}")


class Bundles:
    """zoo-infer on copies of bundles.

    Args:
        program: zoo-infer.
        bundles: what make_bundles.py wrote.
        folder: where copies and logits go.
    """

    def __init__(self, program: str, bundles: Path, folder: Path) -> None:
        self.program, self.bundles, self.folder = program, bundles, folder

    def copy(self, name: str, session: dict[str, str] | None) -> Path:
        """A copy of a bundle whose INT8 engine needs these session entries; None: its manifest does not say."""
        to = self.folder / "copy.bundle"
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(self.bundles / f"{name}.bundle", to)
        manifest = json.loads((to / "manifest.json").read_text(encoding="utf-8"))
        for engine in manifest["artifacts"]["engines"]:
            engine.pop("saturating_cpu_session", None)
            if session is not None and engine["precision"] == "int8":
                engine["saturating_cpu_session"] = session
        (to / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        return to

    def infer(
        self, cpu: str, bundle: Path, images: list[Path], *more: str
    ) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
        """The logits, and what zoo-infer prints."""
        logits = self.folder / "logits.npy"
        done = on(cpu, self.program, bundle, *images, "--json", "--no-measure", "--logits", logits, *more)
        return np.load(logits), json.loads(done.stdout)


def check_logits(program: str, bundles: Path, folder: Path) -> None:
    here = Bundles(program, bundles, folder)
    bright = sorted((bundles / "bright").iterdir())
    exact = np.load(bundles / "saturating-exact.npy")
    asked = ("--engine", "onnxruntime-int8")

    for cpu, session, equal, entry in (
        ("", None, True, None),  # None: whatever this machine needs
        (HASWELL, None, True, True),
        (HASWELL, ENTRY, True, True),
        (HASWELL, {}, False, False),  # without the entry the sums saturate: this comparison can turn red
        (NEHALEM, None, True, False),
        (NEHALEM, {}, True, False),
    ):
        logits, said = here.infer(cpu, here.copy("saturating", session), bright, *asked)
        case = f"saturating.bundle, CPU {cpu or 'of this machine'}, session {session}: {said['backend']}"
        assert np.array_equal(logits, exact) == equal, (case, logits, exact)
        assert entry is None or (EXACT in said["backend"]) == entry, case
        assert said["why"] == "asked for", said
        print(case)

    # Nodes share a weight: refused with the entry, exact without it on Nehalem.
    shared = here.copy("shared", None)
    _, said = here.infer(HASWELL, shared, bright)
    assert said["engine"] == "onnxruntime-fp32", said
    assert said["why"].startswith("fastest verified engine that may be loaded here, measured "), said
    assert "; onnxruntime-int8 was left out: " in said["why"], said
    print(said["why"])
    refused = on(HASWELL, program, shared, *bright, *asked, code=1).stderr
    print(refused)
    for part in ("onnxruntime-int8.onnx", "export the bundle again, or load onnxruntime-fp32", "(cpu)"):
        assert part in refused, (part, refused)
    logits, _ = here.infer(NEHALEM, shared, bright, *asked)
    assert np.array_equal(logits, np.load(bundles / "shared-exact.npy"))

    # A network as export-zoo makes it.
    images = sorted((bundles / "images").iterdir())[:2]
    native, said = here.infer("", bundles / "resnet18.bundle", images, *asked)
    print(f"resnet18.bundle, CPU of this machine: {said['backend']}")
    emulated, said = here.infer(HASWELL, bundles / "resnet18.bundle", images, *asked)
    print(f"resnet18.bundle, CPU {HASWELL}: {said['backend']}")
    assert np.array_equal(native, emulated), np.abs(native - emulated).max()

    # OpenVINO's INT8 engines cannot saturate.
    mobilenet, asked = bundles / "mobilenet_v2.bundle", ("--engine", "openvino-int8")
    emulated, said = here.infer(HASWELL, mobilenet, images, *asked)
    print(f"mobilenet_v2.bundle, CPU {HASWELL}: {said['backend']}")
    assert np.array_equal(np.load(bundles / "mobilenet_v2-openvino-int8.npy")[: len(images)], emulated)


def main() -> None:
    emulator()
    match sys.argv[1:]:
        case ["names", program]:
            check_names(program)
        case ["logits", program, bundles]:
            with tempfile.TemporaryDirectory() as folder:
                check_logits(program, Path(bundles), Path(folder))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
