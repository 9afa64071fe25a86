"""The page and the table of a bundle's latency and throughput."""

from __future__ import annotations

from export_zoo.engines.precision.registry import BASELINE
from export_zoo.engines.verification.throughput import Point, Throughput
from export_zoo.exporter.page import plots
from export_zoo.exporter.page.templates import render

COLUMNS = ("batch", "threads", "streams", "p50 ms", "p90 ms", "p99 ms", "images/s", "vs FP32")


def row(point: Point) -> tuple[str, ...]:
    """The engine, and a text for each of COLUMNS."""

    def ms(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    setting = (str(point.batch), str(point.threads), str(point.streams))
    times = (ms(point.p50_ms), ms(point.p90_ms), ms(point.p99_ms))
    return (point.engine, *setting, *times, f"{point.images_per_second:.1f}", f"{point.speedup:.2f}x")


def answers(found: Throughput) -> list[str]:
    """A sentence about each engine, which says whether it is faster than FP32 here."""
    texts = []
    for engine in dict.fromkeys(point.engine for point in found.points):
        own = [point for point in found.points if point.engine == engine]
        low, high = (pick(point.speedup for point in own) for pick in (min, max))
        best = max(own, key=lambda point: point.images_per_second)
        at = f"at batch {best.batch}, threads {best.threads}, streams {best.streams}"
        text = f"{engine}: at most {best.images_per_second:.1f} images per second, {at}"
        if not engine.endswith(f"-{BASELINE.name}"):
            text += f"; {low:.2f} to {high:.2f} times the throughput of FP32 in the same setting (median of rounds)"
        texts.append(text)
    return texts


def html(found: Throughput, title: str) -> str:
    """The page. Raises EnvironmentFailureError if matplotlib is not installed."""
    plots.check()
    return render(
        "throughput.html.jinja",
        title=title,
        found=found,
        answer=". ".join(answers(found)) + ".",
        columns=COLUMNS,
        rows=[row(point) for point in found.points],
        plot=plots.throughput(found.points),
    )
