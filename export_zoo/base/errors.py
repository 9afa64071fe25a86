"""Errors a user can cause, and the exit code each one ends the program with.

They are in the lowest layer because every layer raises them. Each message names the file or the option
at fault; `hint` is the next step to take.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from pydantic import ValidationError


class ExportZooError(Exception):
    """Base of all errors we raise on purpose. Anything else that escapes is a bug (exit code 1)."""

    exit_code: ClassVar[int] = 1
    kind: ClassVar[str] = "unexpected"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ExportDefectError(ExportZooError):
    """The exporter produced a graph that is not what was asked for (for example, with a fixed batch size)."""

    kind = "export"


class UsageError(ExportZooError):
    """Invalid options, or options that exclude each other."""

    exit_code = 2
    kind = "usage"


class ParityError(ExportZooError):
    """An engine's logits are outside the tolerance, or nothing could be compared."""

    exit_code = 3
    kind = "parity"


class TargetUnavailableError(ExportZooError):
    """A requested target cannot be built on this machine."""

    exit_code = 4
    kind = "target"


class BadInputError(ExportZooError):
    """A model, weights file, image folder or bundle that cannot be used."""

    exit_code = 5
    kind = "input"


class StateNotReachedError(ExportZooError):
    """An engine did not reach the state that `--require` asks for, or a target refused to build it."""

    exit_code = 6
    kind = "state"


class TargetRefusalError(StateNotReachedError):
    """A target's parser or builder refuses the network's graph."""

    kind = "refused"


class EnvironmentFailureError(ExportZooError):
    """The network or the disk failed."""

    exit_code = 7
    kind = "environment"


class BuilderCrashError(EnvironmentFailureError):
    """A target's builder crashed or was killed."""


def first_of(error: ValidationError) -> str:
    """One-line description of a fault that pydantic found in a file: the key and what is wrong with it.

    An unknown key is reported first: if a key is mistyped, pydantic also reports the correct key as missing.
    """
    faults = error.errors()
    first = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    return f"{'.'.join(map(str, first['loc'])) or 'the whole file'}: {first['msg']}"


INTERRUPTED = 130
