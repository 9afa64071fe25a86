"""An engine on an emulated CPU."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from types import TracebackType
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
import psutil

from export_zoo.base.errors import BadInputError, TargetUnavailableError
from export_zoo.engines.emulation.cpus import Cpu, emulator, launch
from export_zoo.engines.emulation.worker import receive, send
from export_zoo.engines.targets.base import Opening, Target

Float32Array = npt.NDArray[np.float32]

_NOISE = "TCG doesn't support requested feature"
"""Text of qemu's warning about each feature that the CPU has but the emulator lacks."""


STUCK_SECONDS = 120.0
"""Seconds without use of CPU time after which a process that must answer counts as stuck.

Threads may wait for each other in qemu.
"""

_POLLS = 24
"""Number of checks of the CPU time within STUCK_SECONDS.

Checks are counted instead of seconds, because seconds also pass while all processes are stopped.
"""


@dataclass(frozen=True)
class Emulated:
    """The emulated CPU and libraries that an engine ran on."""

    instruction_set: str
    saturates: bool
    """Whether ONNX Runtime's int8 sums saturate on this CPU."""
    session_config: dict[str, str]
    """Configuration that the session got because int8 sums saturate."""
    versions: dict[str, str]
    """Versions of onnxruntime, the library that ran, numpy and qemu."""


@cache
def qemu_version(cpu: Cpu) -> str:
    """Version of the emulator for a CPU, for example `7.2.22`; `unknown` if it is not printed.

    Raises:
        TargetUnavailableError: the emulator is not installed.
    """
    done = subprocess.run([emulator(cpu), "--version"], capture_output=True, text=True, check=False)
    words = done.stdout.split()
    return words[words.index("version") + 1] if "version" in words[:-1] else "unknown"


def _cpu_seconds(pid: int) -> float:
    """CPU time of a process and its children, in seconds."""
    total = 0.0
    with suppress(psutil.Error):
        for process in (one := psutil.Process(pid), *one.children(recursive=True)):
            with suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
    return total


class EmulatedEngine:
    """An engine that runs on an emulated CPU, in a process of its own. Use it as a context manager.

    Args:
        cpu: the CPU to emulate.
        target: whose engine it is, one that can be `emulated` there.
        opening: the engine; it gets one thread.

    Raises:
        TargetUnavailableError: the emulator is not installed, Python or the target's library does not start in it, or
            the graph cannot be run exactly on this CPU.
        BadInputError: the library does not load the file.
    """

    _stuck = False

    def __init__(self, cpu: Cpu, target: Target, opening: Opening) -> None:
        worker = target.worker(opening)
        how = launch(cpu, worker.distribution)
        self._cpu, self._library = cpu, worker.distribution
        file = str(opening.file.absolute())
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - close() closes it
        self._process = subprocess.Popen(
            [*how.command, "-m", "export_zoo.engines.emulation.worker", file, json.dumps(asdict(worker))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **how.environment},
            cwd=how.directory,  # `-m` searches this folder first, not the user's current folder
        )
        try:
            self.emulated = self._described()
        except BaseException:
            self.close()
            raise

    def _described(self) -> Emulated:
        assert self._process.stdout is not None
        with self._awaited():
            line = self._process.stdout.readline()
        if not line:
            raise self._lost("does not start")
        try:
            said: dict[str, Any] = json.loads(line)
        except ValueError:
            self._process.kill()
            raise self._lost(
                f"says {line[:80].decode(errors='replace').strip()!r} and does not start"
            ) from None
        if "error" in said:
            kind = (
                TargetUnavailableError
                if said["exit_code"] == TargetUnavailableError.exit_code
                else BadInputError
            )
            raise kind(f"--cpu {self._cpu.name}: {said['error']}", hint=said["hint"])
        said["versions"]["qemu"] = qemu_version(self._cpu)
        return Emulated(**said)

    def _lost(self, what: str) -> TargetUnavailableError:
        code = self._process.wait()
        self._errors.seek(0)
        lines = [
            line for line in self._errors.read().decode(errors="replace").splitlines() if _NOISE not in line
        ]
        said = "; ".join(line.strip() for line in lines[-3:]) or "nothing was printed"
        if self._stuck:
            what, said = "is stuck", f"it computed nothing for {STUCK_SECONDS:g} s, and was killed; {said}"
        return TargetUnavailableError(
            f"--cpu {self._cpu.name}: {self._library} {what} under qemu {qemu_version(self._cpu)}, exit code {code}: "
            f"{said}",
            hint=f"try another version of qemu-user or of {self._library}; docs/cpu.md lists versions that were tried",
        )

    @contextmanager
    def _awaited(self) -> Iterator[None]:
        """Context in which the process must answer. Kill the process if it is stuck."""
        answered = threading.Event()
        thread = threading.Thread(target=self._kill_if_stuck, args=(answered,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            answered.set()
            thread.join()

    def _kill_if_stuck(self, answered: threading.Event) -> None:
        used, idle = -1.0, 0
        while not answered.wait(STUCK_SECONDS / _POLLS):
            now = _cpu_seconds(self._process.pid)
            idle = idle + 1 if now == used else 0
            used = now
            if idle >= _POLLS:
                self._stuck = True
                self._process.kill()
                return

    def run_all(self, batch: Float32Array) -> tuple[Float32Array, ...]:
        """Run a preprocessed batch, float32 [N, 3, H, W], and return all outputs, float32.

        Raises:
            TargetUnavailableError: the emulated process ended or is stuck.
        """
        try:
            with self._awaited():
                send(cast(BinaryIO, self._process.stdin), (batch,))
                outputs = receive(cast(BinaryIO, self._process.stdout))
        except BrokenPipeError:
            outputs = None
        if outputs is None:
            raise self._lost("ended")
        return outputs

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                # stdin may hold part of a batch that the process did not read. Then closing it fails.
                with suppress(BrokenPipeError):
                    stream.close()

    def __enter__(self) -> EmulatedEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
