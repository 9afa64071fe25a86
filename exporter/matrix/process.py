"""One command of `export-zoo` in a process of its own, within limits of time and memory."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from export_zoo.base.errors import TargetRefusalError, TargetUnavailableError
from export_zoo.base.machine import available_memory
from export_zoo.base.package import IMPORT_ROOT
from export_zoo.exporter.run.at_once import StoppedError
from export_zoo.exporter.run.cache import work_directory

_POLL_SECONDS = 0.1


_SPARE_BYTES = 1 << 30
"""Memory left to the rest of the machine if no budget is given."""


def _memory_of(process: psutil.Process) -> int:
    """Bytes that a process and its children hold."""
    total = 0
    with contextlib.suppress(psutil.Error):
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += one.memory_info().rss
    return total


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):
        for one in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.Error):
                one.kill()


def _watch(
    process: subprocess.Popen[bytes], seconds: float, budget: int, stopped: threading.Event | None
) -> tuple[str, int]:
    """Wait for a cell's process. Returns why it was killed, empty if it was not, and its peak memory in bytes.

    Raises:
        StoppedError: `stopped` was set; the process was killed.
    """
    begin, peak = time.monotonic(), 0
    watched = psutil.Process(process.pid)
    try:
        while process.poll() is None:
            held = _memory_of(watched)
            peak = max(peak, held)
            if held > budget:
                return f"took more than {budget >> 20} MiB of memory", peak
            if time.monotonic() - begin > seconds:
                return f"took longer than {seconds:g} s", peak
            if stopped is not None and stopped.is_set():
                raise StoppedError
            time.sleep(_POLL_SECONDS)
        return "", peak
    finally:
        _kill(watched)  # after Ctrl-C, too
        process.wait()


def _reason(document: dict[str, Any], code: int, log: str) -> str:
    error = document.get("error") or {}
    if error.get("message"):
        hint = error.get("hint") if error.get("kind") == TargetUnavailableError.kind else ""
        return f"{error['message']}; next: {hint}" if hint else str(error["message"])
    last = (log.strip().splitlines() or [""])[-1]
    if code < 0:
        return f"killed by signal {-code}" + (f": {last}" if last else "")
    return last or f"exit code {code}"


def _budget(memory: float | None) -> int:
    if memory is not None:
        return int(memory * 2**30)
    return max(2 * _SPARE_BYTES, available_memory() - _SPARE_BYTES)


@dataclass(frozen=True)
class Ended:
    """A finished process of a cell.

    Attributes:
        document: contents of the --json file; empty if none was written.
        killed: the exceeded limit for which the process was killed, else empty.
        peak: peak memory in bytes.
    """

    document: dict[str, Any]
    code: int
    killed: str
    peak: int
    log: str

    @property
    def exit_code(self) -> int | None:
        return None if self.killed else self.code

    @property
    def gate(self) -> bool:
        refused = (self.document.get("error") or {}).get("kind") == TargetRefusalError.kind
        return not self.killed and self.code in (3, 6) and not refused

    @property
    def reason(self) -> str:
        return self.killed or _reason(self.document, self.code, self.log)


_COMMAND = f"""
import contextlib, ctypes, importlib.util, signal, sys
with contextlib.suppress(AttributeError, OSError, TypeError):
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
sys.path = [*filter(None, sys.path)]
if importlib.util.find_spec("export_zoo") is None:
    sys.path.append({str(IMPORT_ROOT)!r})
from export_zoo.exporter.cli.app import run
run()
"""
"""Runs `export-zoo` without the current directory on sys.path; `python -m` would put it first.

On Linux the process ends with the one that started it, however that ends (prctl's PR_SET_PDEATHSIG).
"""


def run_limited(
    arguments: Sequence[str],
    *,
    seconds: float,
    memory: float | None,
    cores: Collection[int] | None = None,
    stopped: threading.Event | None = None,
) -> Ended:
    """Run `export-zoo` with these arguments, --json and --quiet, within the limits.

    Args:
        cores: cores that it may use; None for all.
        stopped: ends it when set.

    Raises:
        StoppedError: `stopped` was set; the process was killed.
    """
    with work_directory() as directory:
        json_path, log_path = directory / "result.json", directory / "log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, *arguments, f"--json={json_path}", "--quiet"],
                stdin=subprocess.DEVNULL,
                env={
                    **os.environ,
                    "TMPDIR": str(directory),
                },  # removed with it, even if the process is killed
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches only this process, which kills the cell's
            )
            if cores is not None:
                with contextlib.suppress(psutil.Error):  # before it starts threads, which inherit this
                    psutil.Process(process.pid).cpu_affinity([*cores])
            killed, peak = _watch(process, seconds, _budget(memory), stopped)
        document: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            document = json.loads(json_path.read_text(encoding="utf-8"))
        log_text = log_path.read_text(encoding="utf-8", errors="replace")
    return Ended(document, process.returncode, killed, peak, log_text)
