"""Errors a user can cause, and the exit code each one ends the program with.

They live on the lowest floor because every floor raises them. Each message names the file or the option
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
    """The exporter produced a graph that is not what was asked for (a baked batch, say)."""

    kind = "export"


class UsageError(ExportZooError):
    """Options that are wrong, or that exclude each other."""

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
    """An engine did not reach the state that `--require` asks for."""

    exit_code = 6
    kind = "state"


class EnvironmentFailureError(ExportZooError):
    """The network or the disk failed."""

    exit_code = 7
    kind = "environment"


def first_of(error: ValidationError) -> str:
    """A fault that pydantic found in a file, in a line: the key and what is wrong with it.

    An unknown key comes first, for one that is mistyped is missing, too.
    """
    faults = error.errors()
    first = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    return f"{'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg']}"


INTERRUPTED = 130
