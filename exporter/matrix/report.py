"""Reports of a matrix run: a line per cell, a table, JUnit XML, and a page (HTML or Markdown)."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from export_zoo.engines.parity.tasks import HEADLINES, headline
from export_zoo.engines.precision.registry import BASELINE
from export_zoo.exporter.matrix.results import CellResult
from export_zoo.exporter.page.templates import render

COLUMNS = (
    "model",
    "engine",
    "result",
    "state",
    "SQNR dB",
    "agreement",
    "vs FP32",
    "MB",
    "nodes",
    "s",
    "peak MiB",
)
BESIDE = ("host dB", "logits")
"""Further columns if a CPU was emulated: this machine's SQNR, and whether the logits of both CPUs are bit-identical."""


def verdict(result: CellResult) -> str:
    """Verdict of a cell: `ok`, `GATE` (its parity gate failed), `FAILED`, `excluded` or `skipped`."""
    return ("GATE" if result.gate else "FAILED") if result.status == "failed" else result.status


def engine_of(result: CellResult) -> str:
    """Name of the engine, `onnxruntime-int8`, with ` on haswell` added if the CPU is emulated."""
    return f"{result.engine_name} on {result.cpu}" if result.emulated else result.engine_name


def columns_of(results: Sequence[CellResult]) -> tuple[str, ...]:
    """Columns of a table. BESIDE is included only if a CPU was emulated."""
    return (*COLUMNS, *BESIDE) if any(result.emulated and result.engine for result in results) else COLUMNS


def beside_of(result: CellResult) -> tuple[str, str]:
    """Further cells of a row, in the order of BESIDE."""
    sqnr = result.figure("emulation", "host", "sqnr")
    difference = result.figure("emulation", "host", "max_difference")
    if sqnr is None and difference is None:
        return "-", "-"
    apart = "" if difference is None else f" {difference:.2g}"  # no number if the difference is infinite
    return (
        "-" if sqnr is None else f"{sqnr:.1f}" + ("*" if result.random else ""),
        "equal" if difference == 0 else f"differ{apart}",
    )


def cells_of(result: CellResult) -> tuple[str, ...]:
    """A row of the table, in the order of COLUMNS."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    size = result.figure("file", "size_bytes")
    speedup = result.figure("latency", "speedup")
    return (
        result.model,
        engine_of(result),
        verdict(result),
        str(result.engine.get("state", "-")),
        number(result.figure("gate", "eager_metrics", "sqnr"), ".1f") + ("*" if result.random else ""),
        headline({metric: result.figure("gate", "eager_metrics", metric) for metric in HEADLINES})[1],
        "-" if speedup is None else f"{speedup:.2f}x",
        "-" if size is None else f"{size / 1e6:.1f}",
        number(result.nodes, "d"),
        f"{result.seconds:.0f}" if result.exit_code is not None or result.seconds else "-",
        str(result.peak_mib or "-"),
    )


def line(result: CellResult, place: int, total: int, cached: bool) -> str:
    """The line that is shown when a cell is finished."""
    model, engine, found, state, sqnr, top1, speedup, *_ = cells_of(result)
    text = f"[{place:>{len(str(total))}}/{total}] {model:<18} {engine:<18} {found:<8}"
    if result.status == "ok" and result.emulated:
        text += f" {emulated_text(result)}, {result.seconds:.0f} s, {result.peak_mib} MiB"
    elif result.status == "ok":
        text += f" {state}, {sqnr} dB, {top1}, {speedup}, {result.seconds:.0f} s, {result.peak_mib} MiB"
    else:
        text += f" {result.reason}"
    return text + (" (earlier run)" if cached else "")


def emulated_text(result: CellResult) -> str:
    """Summary of an emulated cell: `emulated, SQNR 47.5 dB (47.5 on this machine), logits equal to the bit`."""
    sqnr = cells_of(result)[COLUMNS.index("SQNR dB")]
    host, logits = beside_of(result)
    words = "equal to the bit" if logits == "equal" else logits.replace(" ", " by ")
    return f"emulated, SQNR {sqnr} dB ({host} on this machine), logits {words}"


def print_summary(results: Sequence[CellResult]) -> None:
    """Print the table on stdout."""
    from rich.table import Table

    from export_zoo.exporter.run.report import make_console

    table = Table(caption="* random weights: INT8 accuracy means nothing" if _random(results) else None)
    columns = columns_of(results)
    for column in columns:
        left = column in COLUMNS[:4]
        table.add_column(column, justify="left" if left else "right", no_wrap=left)
    for result in results:
        table.add_row(*_row(result, columns))
    make_console().print(table)


def _row(result: CellResult, columns: Sequence[str]) -> tuple[str, ...]:
    return (*cells_of(result), *beside_of(result))[: len(columns)]


def _random(results: Sequence[CellResult]) -> bool:
    return any(result.random for result in results)


def totals(results: Sequence[CellResult]) -> str:
    """Number of cells by verdict: `5 ok, 1 gate failed, 1 excluded`."""
    named = {
        "ok": "ok",
        "GATE": "gate failed",
        "FAILED": "failed",
        "excluded": "excluded",
        "skipped": "skipped",
    }
    counts = {label: sum(verdict(r) == key for r in results) for key, label in named.items()}
    return ", ".join(f"{count} {label}" for label, count in counts.items() if count)


def junit(results: Sequence[CellResult]) -> str:
    """JUnit XML: a test suite for each model, a test case for each engine and CPU."""
    root = ET.Element("testsuites", name="export-zoo matrix")
    for model in dict.fromkeys(result.model for result in results):
        own = [result for result in results if result.model == model]
        suite = ET.SubElement(
            root,
            "testsuite",
            name=model,
            tests=str(len(own)),
            failures=str(sum(r.status == "failed" and r.gate for r in own)),
            errors=str(sum(r.status == "failed" and not r.gate for r in own)),
            skipped=str(sum(r.status in ("excluded", "skipped") for r in own)),
            time=f"{sum(r.seconds for r in own):.1f}",
        )
        for result in own:
            case = ET.SubElement(
                suite,
                "testcase",
                classname=model,
                name=engine_of(result) + (", emulated" if result.emulated else ""),
                time=f"{result.seconds:.1f}",
            )
            if result.status in ("excluded", "skipped"):
                ET.SubElement(case, "skipped", message=_plain(result.reason))
            elif result.status == "failed":
                ET.SubElement(case, "failure" if result.gate else "error", message=_plain(result.reason))
            if result.emulated and result.engine:
                ET.SubElement(case, "system-out").text = _plain(emulated_text(result))
            for warning in result.warnings:
                ET.SubElement(case, "system-out").text = _plain(warning)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _plain(text: str) -> str:
    """The text without characters that XML cannot hold."""
    return "".join(c if c in "\t\n" or ord(c) >= 32 else "�" for c in text if c.isprintable() or c in "\t\n")


def _ran(results: Sequence[CellResult]) -> list[tuple[str, str, str]]:
    """Machines, their instruction sets, and dates, of all results."""
    return sorted({(r.machine, r.instruction_set, r.date[:10]) for r in results if r.machine})


def _versions(results: Sequence[CellResult]) -> list[str]:
    return sorted({f"{k} {v}" for r in results for k, v in r.versions.items() if v != "absent"})


def html(results: Sequence[CellResult], title: str) -> str:
    """A self-contained HTML page: table, reasons, and plots of SQNR and speed by model."""
    models = list(dict.fromkeys(r.model for r in results))
    engines = list(dict.fromkeys(r.engine_name for r in results if r.precision != BASELINE.name))
    columns = columns_of(results)
    plots = []
    for label, path, unit in (
        ("SQNR to eager PyTorch", ("gate", "eager_metrics", "sqnr"), "dB"),
        ("Speed against FP32, same machine", ("latency", "speedup"), "x"),
    ):
        points = [
            (models.index(r.model), engines.index(r.engine_name), value)
            for r in results
            if r.precision != BASELINE.name
            and not r.emulated
            and r.status == "ok"
            and (value := r.figure(*path)) is not None
        ]
        if points:
            top = max(1.0, *(value for *_, value in points))
            plots.append({"label": label, "unit": unit, "points": points, "top": top})
    return render(
        "matrix.html.jinja",
        title=title,
        totals=totals(results),
        columns=columns,
        rows=[(verdict(r), _row(r, columns), r.reason, r.warnings) for r in results],
        models=models,
        engines=engines,
        plots=plots,
        random=_random(results),
        ran=_ran(results),
        versions=_versions(results),
    )


def markdown(results: Sequence[CellResult], title: str, missing: int = 0, about: str = "") -> str:
    """A Markdown page with the contents of `html`, without the plots.

    Args:
        missing: number of cells that have no result.
        about: a sentence below the totals, which says where the results are.
    """
    shown = [f"# {title}", "", totals(results) + (f", {missing} not run yet." if missing else "."), ""]
    shown += [about, ""] if about else []
    for machine, instructions, date in _ran(results):
        shown.append(f"- {machine}, {instructions}, {date}")
    shown += [f"- {', '.join(_versions(results))}", ""]
    columns = columns_of(results)
    shown_columns = (*columns[:4], "input", *columns[4:], "date")
    shown += [f"| {' | '.join(shown_columns)} |", "|" + "---|" * len(shown_columns)]
    for result in results:
        size = "x".join(map(str, result.input_size)) if result.input_size else "-"
        row = _row(result, columns)
        shown.append(f"| {' | '.join((*row[:4], size, *row[4:], result.date[:10] or '-'))} |")
    if _random(results):
        shown += ["", "\\* random weights: INT8 figures say nothing about accuracy."]
    if reasons := [f"- {r.name}: {verdict(r)}: {r.reason}" for r in results if r.reason]:
        shown += ["", "## Cells without a passing result", "", *reasons]
    return "\n".join(shown) + "\n"
