"""Plots as SVG for a page: no files beside it, and colours of the page's scheme."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from export_zoo.base.errors import EnvironmentFailureError
from export_zoo.engines.bundle.manifest import Aim
from export_zoo.engines.diagnosis.diagnose import Diagnosis, Histogram
from export_zoo.engines.verification.throughput import Point

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXT, FIRST, SECOND, GRID = "#010203", "#020304", "#030405", "#040506"
"""Colours in plots, which stand for those of the page: each becomes a variable of its style sheet."""
_VARIABLES = {TEXT: "--text", FIRST: "--first", SECOND: "--second", GRID: "--grid"}

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "export-zoo",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": TEXT,
    "axes.edgecolor": GRID,
    "axes.labelcolor": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "grid.color": GRID,
}


def check() -> None:
    """Raise EnvironmentFailureError if matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise EnvironmentFailureError(
            "--html: matplotlib is not installed", hint="pip install 'export-zoo[report]'"
        ) from error
    del mpl


def _figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Figure, label: str) -> Markup:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))


def along(found: Diagnosis) -> Markup:
    """SQNR of each layer's output with all layers rounded, and of the network's with this layer alone."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        figure = _figure(9, 3.2)
        axes = figure.add_subplot()
        places = range(1, len(found.layers) + 1)
        for values, colour, label in (
            ([layer.along for layer in found.layers], FIRST, "output of the layer, all layers rounded"),
            (
                [layer.sqnr for layer in found.layers],
                SECOND,
                "output of the network, this layer alone rounded",
            ),
        ):
            axes.plot(places, _drawn(values), color=colour, label=label, marker=".", linewidth=1.5)
        axes.set_xlabel("layer, from input to output")
        axes.set_ylabel("SQNR in dB")
        axes.grid(visible=True, axis="y", linewidth=0.6)
        figure.legend(loc="outside upper left", frameon=False, ncols=2)
        return _svg(figure, "SQNR along the network")


def _drawn(values: Sequence[float | None]) -> list[float]:
    """Decibels for a plot: gaps where there is no error, and at most 20 dB below 0, where nothing is right any more."""
    return [float("nan") if value is None else max(value, -20.0) for value in values]


def curve(found: Diagnosis) -> Markup:
    """SQNR over the number of worst layers in float."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        figure = _figure(9, 2.6)
        axes = figure.add_subplot()
        steps = [step for step in found.mended if step.layers < len(found.layers)]
        axes.plot(
            [step.layers for step in steps],
            _drawn([step.sqnr for step in steps]),
            color=FIRST,
            marker="o",
            linewidth=1.5,
        )
        if found.limit is not None:
            axes.axhline(found.limit, color=SECOND, linewidth=1.2, linestyle="--")
            axes.annotate("limit", (0, found.limit), color=SECOND, xytext=(2, 3), textcoords="offset points")
        axes.set_xlabel("number of the worst layers in float")
        axes.set_ylabel("SQNR in dB")
        axes.grid(visible=True, axis="y", linewidth=0.6)
        return _svg(figure, "SQNR with the worst layers in float")


def histogram(found: Histogram, label: str) -> Markup:
    """Counts of a layer's input, on a logarithmic scale, and its range in 8 bits."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        figure = _figure(3.4, 1.7)
        axes = figure.add_subplot()
        count = len(found.counts)
        width = (found.max - found.min) / count or 1.0
        centres = [found.min + (index + 0.5) * width for index in range(count)]
        axes.bar(centres, found.counts, width=width, color=FIRST, linewidth=0)
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.5)
        for limit in (found.low, found.high):
            if limit is not None and abs(limit) < 10 * max(abs(found.min), abs(found.max), 1e-30):
                axes.axvline(limit, color=SECOND, linewidth=1.5)
        axes.tick_params(labelsize=8)
        return _svg(figure, label)


def bars(values: Mapping[str, float], unit: str, label: str) -> Markup:
    """A horizontal bar for each name, the first on top; empty without values."""
    import matplotlib as mpl

    if not values:
        return Markup("")
    with mpl.rc_context(_STYLE):
        figure = _figure(5, 0.9 + 0.3 * len(values))
        axes = figure.add_subplot()
        drawn = axes.barh(list(values), list(values.values()), color=FIRST, height=0.6)
        axes.bar_label(drawn, fmt="{:.3g}", padding=3, color=TEXT)
        axes.margins(x=0.15)
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        return _svg(figure, label)


def accuracy_over_speed(aim: Aim) -> Markup:
    """The curve of an aim: its metric over the engine's time, or over the layers in float if times are not known."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        figure = _figure(9, 2.8)
        axes = figure.add_subplot()
        times = [aim.ms_with(step) for step in aim.curve]
        timed = [time for time in times if time is not None]
        places: list[float] = timed if len(timed) == len(times) else [step.layers for step in aim.curve]
        axes.plot(places, [step.value for step in aim.curve], color=FIRST, marker="o", linewidth=1.5)
        apart, last = 0.03 * (max(places) - min(places)), float("-inf")
        for place, step in zip(places, aim.curve, strict=True):
            if place - last >= apart:  # labels would lie on each other
                last = place
                axes.annotate(
                    str(step.layers),
                    (place, step.value),
                    xytext=(5, -11),
                    textcoords="offset points",
                    fontsize=8,
                )
        axes.axhline(aim.value, color=SECOND, linewidth=1.2, linestyle="--")
        if aim.fp32_ms is not None and timed:
            axes.axvline(aim.fp32_ms, color=GRID, linewidth=1.2)
            axes.annotate(
                "FP32",
                (aim.fp32_ms, 0),
                xycoords=("data", "axes fraction"),
                xytext=(-3, 4),
                textcoords="offset points",
                horizontalalignment="right",
            )
        axes.set_xlabel(
            "ms for one image on one thread; numbers: layers in float"
            if timed
            else "number of layers in float"
        )
        axes.set_ylabel("SQNR in dB" if aim.metric == "sqnr" else aim.metric)
        axes.grid(visible=True, axis="y", linewidth=0.6)
        return _svg(figure, f"{aim.metric} over speed")


def throughput(points: Sequence[Point]) -> Markup:
    """Images per second of each engine over the batch, a panel for each combination of threads and streams."""
    import matplotlib as mpl

    combinations = list(dict.fromkeys((point.threads, point.streams) for point in points))
    with mpl.rc_context(_STYLE):
        figure = _figure(9, 3.0)
        axes = figure.subplots(1, len(combinations), sharey=True, squeeze=False)[0]
        for panel, (threads, streams) in zip(axes, combinations, strict=True):
            for engine, style in zip(dict.fromkeys(point.engine for point in points), _LINES, strict=False):
                own = [p for p in points if (p.engine, p.threads, p.streams) == (engine, threads, streams)]
                panel.plot(
                    [str(point.batch) for point in own],
                    [point.images_per_second for point in own],
                    label=engine,
                    marker="o",
                    linewidth=1.5,
                    **style,
                )
            panel.set_title(f"threads {threads}, streams {streams}", fontsize=10, color=TEXT)
            panel.set_xlabel("batch")
            panel.grid(visible=True, axis="y", linewidth=0.6)
        axes[0].set_ylim(bottom=0)
        axes[0].set_ylabel("images per second")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", frameon=False, ncols=4)
        return _svg(figure, "throughput")


_LINES: Sequence[Any] = tuple(
    {"color": colour, "linestyle": style} for style in ("-", "--", ":") for colour in (FIRST, SECOND, TEXT)
)
"""Lines of engines."""
