"""Output of a run: a line per stage, progress bars, warnings, and the table at the end."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console

    from export_zoo.engines.bundle.manifest import Aim, Engine, Refused


class _Lossy:
    """stderr whose write errors (closed, full) are ignored: a failed progress message must not end a run."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def make_console(*, stderr: bool = False) -> Console:
    """A console that writes plain text under NO_COLOR (no-color.org): no bold either."""
    from rich.console import Console

    system: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
    file = cast("IO[str]", _Lossy(sys.stderr)) if stderr else None
    console = Console(file=file, color_system=system, highlight=False, soft_wrap=stderr)
    if not console.is_terminal:
        console.width = max(console.width, 160)  # a pipe has no width: do not cut columns
    return console


def show_log() -> None:
    """Print on stderr what libraries (TensorRT's builder) log through export-zoo's logger."""
    log = logging.getLogger("export_zoo")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.INFO)


def _origin(filename: str) -> str:
    """The library that a file belongs to, or the file's name."""
    library = filename.rpartition("site-packages/")[2].split("/")[0] if "site-packages/" in filename else ""
    return {"PIL": "Pillow", "torch": "PyTorch"}.get(library, library) or Path(filename).name


RANDOM = "random weights: accuracy figures mean nothing"


class Advance(Protocol):
    """Counts finished items. Sets their total if it was not known at the beginning."""

    def __call__(self, done: int, total: int | None = None) -> None: ...


def _nothing(done: int, total: int | None = None) -> None:
    del done, total


@dataclass
class Stage:
    """One finished or running stage."""

    name: str
    detail: str = ""
    seconds: float = 0.0
    cached: bool = False


@dataclass
class Reporter:
    """Records stages and warnings, and shows nothing: the Python API's default."""

    stages: list[Stage] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Time a stage; the caller fills in `detail` and `cached`. It is shown when it ends without an exception."""
        stage = Stage(name)
        begin = time.perf_counter()
        yield stage
        stage.seconds = time.perf_counter() - begin
        self.stages.append(stage)
        self.show_stage(stage)

    def warn(self, text: str) -> None:
        """Record and show a warning; a repeated one is ignored."""
        text = text.encode("utf-8", "backslashreplace").decode()
        if text not in self.warnings:
            self.warnings.append(text)
            self.show_warning(text)

    @contextlib.contextmanager
    def library_warnings(self) -> Iterator[None]:
        """Report what libraries and the user's network warn of, each text once, with its origin.

        Announcements of changes in later versions are left out: they are for the authors of code.
        """

        def show(message: Warning | str, category: type[Warning], filename: str, *_: object) -> None:
            later = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
            if not issubclass(category, (*later, ImportWarning, ResourceWarning)):
                self.warn(f"{_origin(filename)}: {' '.join(str(message).split())}")

        with warnings.catch_warnings():
            if any(action == "error" for action, *_ in warnings.filters):
                warnings.simplefilter("default")  # PYTHONWARNINGS=error is not meant to end an export
            warnings.showwarning = show  # type: ignore[assignment]
            yield

    @contextlib.contextmanager
    def bar(self, label: str, total: int | None) -> Iterator[Advance]:
        """A progress bar of `total` items (None: not known yet). Yields the function that advances it."""
        del label, total
        yield _nothing

    def show_stage(self, stage: Stage) -> None: ...

    def show_warning(self, text: str) -> None: ...

    def as_dict(self) -> dict[str, Any]:
        return {"stages": [asdict(stage) for stage in self.stages], "warnings": self.warnings}


class ConsoleReporter(Reporter):
    """Shows progress on stderr. Colours and bars only on a terminal, and never with NO_COLOR."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__()
        self.quiet = quiet
        self.console = make_console(stderr=True)

    def show_stage(self, stage: Stage) -> None:
        if self.quiet:
            return
        from rich.text import Text

        took = "cached" if stage.cached else f"{stage.seconds:.1f} s"
        self.console.print(
            Text.assemble((f"{stage.name:<10}", "bold"), (f" {took:>8}", "dim"), f"  {stage.detail}")
        )

    def show_warning(self, text: str) -> None:
        from rich.text import Text

        self.console.print(Text.assemble(("warning: ", "yellow"), text))

    @contextlib.contextmanager
    def bar(self, label: str, total: int | None) -> Iterator[Advance]:
        if self.quiet or not self.console.is_terminal or self.console.color_system is None:
            yield _nothing
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(f"{label:<10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(label, total=total)

            def advance(done: int, total: int | None = None) -> None:
                progress.update(task, advance=done, total=total)

            yield advance


def _number(value: float | int | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def print_table(engines: Sequence[Engine], refused: Sequence[Refused] = (), *, random: bool) -> None:
    """Print the engines of a bundle, and those that could not be built, on stdout."""
    from rich.table import Table

    from export_zoo.engines.parity.tasks import headline

    console = make_console()
    table = Table(title=RANDOM if random else None, title_style="yellow")
    title = headline(engines[0].gate.eager_metrics)[0].replace("agreement", "agr.")
    for column in ("engine", "size", "state", "SQNR dB", title, "accuracy", "batch", "ms", "vs FP32"):
        table.add_column(column, justify="left" if column in ("engine", "state") else "right")
    for engine in engines:
        metrics, latency = engine.gate.eager_metrics, engine.latency
        accuracy = "-"
        if (found := metrics.get("accuracy")) is not None:
            accuracy = f"{100 * found:.1f} % ({0.0 - 100 * (metrics['accuracy_drop'] or 0.0):+.1f})"
        table.add_row(
            engine.name,
            f"{engine.size_bytes / 1e6:.1f} MB",
            engine.state if not engine.gate.failures else "FAILED",
            _number(metrics["sqnr"], ".1f"),
            headline(metrics)[1],
            accuracy,
            str(latency.batch) if latency else "-",
            f"{latency.median_ms:.1f}" if latency else "-",
            f"{latency.speedup:.2f}x" if latency else "-",
        )
    for engine_left_out in refused:
        table.add_row(engine_left_out.name, "-", "refused", *["-"] * 6)
    console.print(table)
    for engine in engines:
        if engine.aim is not None and len(engine.aim.curve) > 1:
            console.print(f"{engine.name}, {engine.aim.metric} on the select images: {_curve(engine.aim)}")


def _curve(aim: Aim) -> str:
    """Accuracy over speed: `24.9 (6.1 ms), 27.5 with 9 layers in float (6.9 ms), FP32 9.8 ms`."""
    texts = []
    for step in aim.curve:
        ms = aim.ms_with(step)
        layers = f" with {step.layers} layers in float" if step.layers else ""
        texts.append(f"{step.value:.4g}{layers}" + ("" if ms is None else f" ({ms:.2f} ms)"))
    return ", ".join(texts) + ("" if aim.fp32_ms is None else f"; FP32 {aim.fp32_ms:.2f} ms")
