"""Prints CPU time and disk of the gate's steps beside their budget: `python ci/budget.py FOLDER`. Ends with 1 above it.

ci/run.sh writes FOLDER: `steps` has a line "name | user time, system time of all finished children so far | used MB" at
the begin of each step and at the end; `disk` has a line "used MB" every few seconds, with the step's number.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

BUDGET = Path(__file__).with_name("budget.txt")


def budget() -> dict[str, tuple[float, float]]:
    """CPU minutes and GB by step."""
    rows = (line.split("|") for line in BUDGET.read_text().splitlines() if line and not line.startswith("#"))
    return {name.strip(): (float(minutes), float(gigabytes)) for name, minutes, gigabytes in rows}


def reference_seconds() -> float:
    """CPU seconds of a fixed computation here: one on the machine that the budget is for."""
    best = float("inf")
    for _ in range(3):
        begin = time.process_time()
        sum(i * i for i in range(12_000_000))
        best = min(best, time.process_time() - begin)
    return best


def _seconds(text: str) -> float:
    """Seconds of a time such as `1m2.345s`, as bash's `times` prints it."""
    found = re.fullmatch(r"(\d+)m([\d.,]+)s", text)
    assert found is not None, text
    return 60 * int(found[1]) + float(found[2].replace(",", "."))


def measured(folder: Path) -> list[tuple[str, float, float]]:
    """Name, CPU seconds, and GB of disk above the begin at the peak, of each step."""
    lines = [line.split("|") for line in (folder / "steps").read_text().splitlines()]
    names = [name.strip() for name, _, _ in lines]
    cpu = [sum(map(_seconds, times.split())) for _, times, _ in lines]
    used = [float(disk) for _, _, disk in lines]
    peaks = {number: max(used[number], used[number + 1]) for number in range(len(lines) - 1)}
    for line in (folder / "disk").read_text().splitlines():
        number, disk = line.split()
        if int(number) in peaks:
            peaks[int(number)] = max(peaks[int(number)], float(disk))
    return [
        (name, cpu[number + 1] - cpu[number], (peaks[number] - used[0]) / 1000)
        for number, name in enumerate(names[:-1])
    ]


def main() -> int:
    known, factor = budget(), reference_seconds()
    print(f"one reference second takes {factor:.2f} s of this core")
    print(f"{'step':<32} {'CPU min':>8} {'budget':>8} {'GB':>6} {'budget':>8}")
    over = []
    total = 0.0
    for name, seconds, gigabytes in measured(Path(sys.argv[1])):
        minutes, allowed = seconds / factor / 60, known.get(name)
        total += minutes
        if allowed is None:
            over.append(f"{name}: not in {BUDGET.name}")
            continue
        print(f"{name:<32} {minutes:>8.1f} {allowed[0]:>8.1f} {gigabytes:>6.1f} {allowed[1]:>8.1f}")
        if minutes > allowed[0]:
            over.append(f"{name}: {minutes:.1f} CPU minutes, {allowed[0]:g} are allowed")
        if gigabytes > allowed[1]:
            over.append(f"{name}: {gigabytes:.1f} GB, {allowed[1]:g} are allowed")
    print(f"{'all':<32} {total:>8.1f}")
    for text in over:
        print(f"over budget: {text}: make room, or change {BUDGET.name} and say why", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
