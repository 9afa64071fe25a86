"""End of a command: turns errors into exit codes, messages and the JSON document, for all commands."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from export_zoo.base.errors import INTERRUPTED, EnvironmentFailureError, ExportZooError, UsageError
from export_zoo.base.files import replacing
from export_zoo.base.package import __version__
from export_zoo.exporter.run.report import ConsoleReporter, make_console

JSON_SCHEMA_VERSION = 1


class Outcome:
    """Contents of the JSON document."""

    def __init__(self) -> None:
        self.document: dict[str, Any] = {}
        self.reporter: ConsoleReporter | None = None


_current = Outcome()
_interrupted = False
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that end a run. SIGHUP is sent when the terminal closes."""

_INTERRUPTED = {
    "kind": "interrupted",
    "message": "interrupted",
    "hint": "run it again: the cache has the finished stages of an export, unless --no-cache was given",
}


def current() -> Outcome:
    """The outcome of the running command."""
    return _current


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Context for output before the exit code is known: a closed pipe (`| head`) does not change the exit code."""
    try:
        yield
    except (BrokenPipeError, SystemExit):  # Rich exits on a closed pipe
        _silence()


def _silence() -> None:
    """Send stdout to /dev/null. Otherwise, the flush at the end of the program fails, too."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _json_path(arguments: Sequence[str]) -> Path | None:
    """Value of the last --json, found even if the command line does not parse."""
    found = None
    for index, argument in enumerate(arguments):
        if argument.startswith("--json="):
            found = Path(argument.removeprefix("--json="))
        elif argument == "--json" and index + 1 < len(arguments):
            found = Path(arguments[index + 1])
    return found


def _write_json(path: Path, code: int, error: dict[str, str] | None) -> int:
    """Write the document atomically. Returns `code`; if it is 0 and writing fails, the exit code of that failure."""
    reporter = (
        _current.reporter.as_dict() if _current.reporter is not None else {"stages": [], "warnings": []}
    )
    document = {
        "schema_version": JSON_SCHEMA_VERSION,
        "tool": f"export-zoo {__version__}",
        "exit_code": code,
        "error": error,
        **reporter,
        **_current.document,
    }
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")  # a pipe or a device is written to, not replaced
        else:
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
    except OSError as failure:
        complain(
            f"--json {path}: cannot be written: {failure.strerror}", "give a path in a writable directory"
        )
        return code or EnvironmentFailureError.exit_code
    return code


def complain(message: str, hint: str) -> None:
    from rich.text import Text

    console = make_console(stderr=True)
    console.print(Text.assemble(("error: ", "bold red"), message))
    if hint:
        console.print(Text.assemble(("  next: ", "bold"), hint))


def execute(app: click.Command, given: Sequence[str]) -> int:
    """Run a command line and return its exit code."""
    global _current
    _current = Outcome()
    code, error = 0, None
    json_path = _json_path(given)
    if json_path is not None and (not json_path.name or json_path.is_dir()):
        complain(f"--json {str(json_path)!r}: is not a file", "give the name of a file to write")
        return UsageError.exit_code
    if json_path is not None and (bundle := _bundle_around(json_path)) is not None:
        complain(f"--json {json_path}: lies inside the bundle {bundle}", "write it somewhere else")
        return UsageError.exit_code
    if json_path is not None and not os.access(json_path.absolute().parent, os.W_OK | os.X_OK):
        # Checked now, not after the work is done.
        complain(f"--json {json_path}: cannot be written", "give a path in a writable directory")
        return EnvironmentFailureError.exit_code
    try:
        result = app.main(list(given), prog_name="export-zoo", standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except ExportZooError as failure:
        code = failure.exit_code
        error = {"kind": failure.kind, "message": failure.message, "hint": failure.hint}
    except click.exceptions.NoArgsIsHelpError as failure:
        click.echo(failure.ctx.get_help() if failure.ctx else "")
        return UsageError.exit_code
    except click.ClickException as failure:
        code = UsageError.exit_code
        context = failure.ctx if isinstance(failure, click.UsageError) else None
        hint = f"`{context.command_path if context else 'export-zoo'} --help` shows the options"
        error = {"kind": UsageError.kind, "message": failure.format_message(), "hint": hint}
    except (KeyboardInterrupt, click.Abort):
        code, error = INTERRUPTED, dict(_INTERRUPTED)
    except MemoryError as failure:
        code, error = EnvironmentFailureError.exit_code, _out_of_memory(failure)
    except (BrokenPipeError, SystemExit):
        # With results in the document, the work is done. A command that may still fail prints inside `printing`.
        code = 0 if _current.document else 1
        _silence()
    except OSError as failure:
        code = EnvironmentFailureError.exit_code
        where = f"{failure.filename}: " if failure.filename else ""
        error = {
            "kind": EnvironmentFailureError.kind,
            "message": f"{where}{failure.strerror or failure}",
            "hint": "check free space and permissions; EXPORT_ZOO_CACHE moves the cache",
        }
    except Exception as failure:
        if _interrupted:  # while a library was being loaded: it raised an error of its own instead
            return _end(INTERRUPTED, dict(_INTERRUPTED), json_path)
        if isinstance(failure, ImportError) and "failed to map segment" in str(failure):
            return _end(EnvironmentFailureError.exit_code, _out_of_memory(failure), json_path)
        if isinstance(failure, ModuleNotFoundError) and not str(failure.name).startswith("export_zoo"):
            return _end(EnvironmentFailureError.exit_code, _not_installed(failure), json_path)
        code = 1
        if "-v" in given or "--verbose" in given:
            traceback.print_exc()
        error = {
            "kind": "unexpected",
            "message": f"{type(failure).__name__}: {failure}",
            "hint": "this is a defect: please report it, with the output of -v",
        }
    return _end(code, error, json_path)


def _out_of_memory(failure: Exception) -> dict[str, str]:
    return {
        "kind": EnvironmentFailureError.kind,
        "message": f"out of memory: {failure}".removesuffix(": "),
        "hint": "try a smaller --batch or --input-size, or a machine with more memory",
    }


def _not_installed(failure: ModuleNotFoundError) -> dict[str, str]:
    return {
        "kind": EnvironmentFailureError.kind,
        "message": f"the package of the module {failure.name} is not installed",
        "hint": "install export-zoo: export-zoo-runtime loads and verifies bundles, and does not export",
    }


def _end(code: int, error: dict[str, str] | None, json_path: Path | None) -> int:
    """Print the error and write the JSON document. Returns the exit code."""
    if error is not None:
        complain(error["message"], error["hint"])
    if json_path is not None:
        try:
            code = _write_json(json_path, code, error)
        except KeyboardInterrupt:  # a pipe that nobody reads
            complain(f"--json {json_path}: interrupted", "")
            return INTERRUPTED
    return code


def on_signal(*_: object) -> None:
    """Handler of SIGNALS: the first ends the run cleanly, more are ignored."""
    global _interrupted
    _interrupted = True
    ignore_signals()
    raise KeyboardInterrupt


def ignore_signals() -> None:
    """Ignore SIGNALS: the exit code is final."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _bundle_around(path: Path) -> Path | None:
    """The bundle that a file would lie in: its directory or the one above. None if neither is a bundle."""
    for directory in list(path.absolute().parents)[:2]:
        try:
            document = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(document, dict) and {"schema_version", "recipe", "artifacts"} <= document.keys():
            return directory
    return None
