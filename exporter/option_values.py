"""Values of options, and how they are read: from the texts of the command line, and from what Python's users write."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export_zoo.base.errors import UsageError
from export_zoo.engines.precision.registry import PRECISIONS
from export_zoo.engines.targets.base import MAX_BATCH
from export_zoo.engines.targets.registry import TARGETS

MAX_SIDE = 8192
DEFAULT_BATCH = "1:8:32"

TOLERANCE_METRICS = (
    "sqnr",
    "cosine",
    "top1",
    "top5",
    "agreement",
    "correlation",
    "similarity",
    "nearest",
    "accuracy",
    "max_abs",
    "max_rel",
    "relative_error",
    "misplaced",
    "accuracy_drop",
)


_SHARES = ("cosine", "top1", "top5", "agreement", "correlation", "similarity", "nearest", "accuracy")
_NOT_NEGATIVE = ("max_abs", "max_rel", "relative_error", "misplaced")


@dataclass(frozen=True)
class BatchRange:
    """Batch sizes an engine must accept: `min` <= `opt` <= `max`. The engine is tuned for `opt`."""

    min: int = 1
    opt: int = 8
    max: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise UsageError(
                f"--batch {self.min}:{self.opt}:{self.max}: must be 1 <= MIN <= OPT <= MAX",
                hint="for example --batch 1:8:32",
            )
        if self.max > MAX_BATCH:
            raise UsageError(
                f"--batch {self.min}:{self.opt}:{self.max}: MAX must be at most {MAX_BATCH}",
                hint="give the largest MAX that you will use: it is run and compared, too",
            )

    @classmethod
    def parse(cls, text: str) -> BatchRange:
        """Parse `MIN:OPT:MAX`, or one number for a fixed batch size."""
        match = re.fullmatch(r"(\d+)(?::(\d+):(\d+))?", text)
        if match is None:
            raise UsageError(f"--batch {text!r}: not MIN:OPT:MAX", hint="for example --batch 1:8:32")
        low = int(match[1])
        return cls(low, int(match[2] or low), int(match[3] or low))


@dataclass(frozen=True)
class SizeRange:
    """Input sizes (height, width) an engine must accept, in pixels: `min` <= `opt` <= `max` in both."""

    min: tuple[int, int]
    opt: tuple[int, int]
    max: tuple[int, int]

    def __post_init__(self) -> None:
        for low, opt, high in zip(self.min, self.opt, self.max, strict=True):
            if not 1 <= low <= opt <= high:
                raise UsageError(
                    f"--dynamic-size {self}: must be MIN <= OPT <= MAX, in height and in width",
                    hint="for example --dynamic-size 128:224:320",
                )
        if self.min == self.max:
            raise UsageError(f"--dynamic-size {self}: MIN and MAX are the same size", hint="use --input-size")
        if max(self.max) > MAX_SIDE:
            raise UsageError(
                f"--dynamic-size {self}: MAX must be at most {MAX_SIDE}",
                hint="give the largest MAX that you will use: it is run and compared, too",
            )

    def __str__(self) -> str:
        return ":".join(f"{height}x{width}" for height, width in (self.min, self.opt, self.max))

    @classmethod
    def parse(cls, text: str) -> SizeRange:
        """Parse `MIN:OPT:MAX`, each `N` or `HxW`."""
        parts = text.split(":")
        if len(parts) != 3:
            raise UsageError(
                f"--dynamic-size {text!r}: not MIN:OPT:MAX",
                hint="for example --dynamic-size 128:224:320 or --dynamic-size 128x160:224x280:448x560",
            )
        low, opt, high = (parse_size(part, option="--dynamic-size") for part in parts)
        return cls(low, opt, high)


@dataclass(frozen=True)
class Tolerance:
    """A limit from the command line. `selector` is a target, a precision or an engine's name; None: all engines."""

    metric: str
    value: float
    selector: str | None = None

    @classmethod
    def parse(cls, text: str) -> Tolerance:
        """Parse `[TARGET:]METRIC=VALUE`."""
        match = re.fullmatch(r"(?:([\w-]+):)?(\w+)=([^=]+)", text)
        if match is None:
            raise UsageError(
                f"--tolerance {text!r}: not [TARGET:]METRIC=VALUE",
                hint="for example --tolerance sqnr=20 or --tolerance onnxruntime-int8:top1=0.95",
            )
        selector, metric, number = match.groups()
        if metric not in TOLERANCE_METRICS:
            raise UsageError(
                f"--tolerance {text!r}: unknown metric {metric!r}",
                hint=f"choose from {', '.join(TOLERANCE_METRICS)}",
            )
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if not math.isfinite(value):
            raise UsageError(
                f"--tolerance {text!r}: {number!r} is not a finite number", hint="for example sqnr=20"
            )
        if (metric in _SHARES and value > 1) or (metric in _NOT_NEGATIVE and value < 0):
            raise UsageError(f"--tolerance {text!r}: no engine can satisfy this", hint="see docs/parity.md")
        known = {*TARGETS, *PRECISIONS, *(f"{t}-{p}" for t in TARGETS for p in PRECISIONS)}
        if selector is not None and selector not in known:
            raise UsageError(
                f"--tolerance {text!r}: no target, precision or engine {selector!r}",
                hint=f"choose from {', '.join([*TARGETS, *PRECISIONS])}, or TARGET-PRECISION: onnxruntime-int8",
            )
        return cls(metric, value, selector)

    @property
    def specificity(self) -> int:
        """0 for all engines, 1 for those of a target or precision, 2 for one engine."""
        if self.selector is None:
            return 0
        return 1 if self.selector in (*TARGETS, *PRECISIONS) else 2

    def applies_to(self, target: str, precision: str) -> bool:
        return self.selector in (None, target, precision, f"{target}-{precision}")


AIMS = (
    "sqnr",
    "cosine",
    "top1",
    "top5",
    "agreement",
    "correlation",
    "similarity",
    "nearest",
    "accuracy_drop",
)
"""Metrics that `--aim` takes."""

OF_IMAGES = ("top1", "top5", "agreement", "nearest", "accuracy_drop")
"""Those that are shares of images."""


@dataclass(frozen=True)
class Aim:
    """An accuracy that INT8 and FP16 must reach, by leaving layers float."""

    metric: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Aim:
        """Parse `METRIC=VALUE`. Raises UsageError."""
        metric, equals, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if not equals:
            raise UsageError(f"--aim {text!r}: is not METRIC=VALUE", hint="for example sqnr=25")
        if metric not in AIMS:
            raise UsageError(
                f"--aim {text!r}: unknown metric {metric!r}", hint=f"choose from {', '.join(AIMS)}"
            )
        if not math.isfinite(value):
            raise UsageError(f"--aim {text!r}: {number!r} is not a finite number", hint="for example sqnr=25")
        shares = metric not in ("sqnr", "accuracy_drop")
        if (shares and not 0 < value <= 1) or (metric == "accuracy_drop" and not 0 <= value < 1):
            raise UsageError(f"--aim {text!r}: not between 0 and 1", hint="for example top1=0.98")
        if value == (0 if metric == "accuracy_drop" else 1) and metric in OF_IMAGES:
            raise UsageError(
                f"--aim {text!r}: no number of images can show it", hint="for example top1=0.98, or sqnr=30"
            )
        return cls(metric, value)

    @property
    def images(self) -> int:
        """Number of images below which the aim cannot be told from a perfect engine.

        If one of d differs on average, n images show none with a probability of exp(-n d): 5 % at n = 3 / d (Hanley and
        Lippman-Hand 1983, "If nothing goes wrong, is everything all right?").
        """
        if self.metric not in OF_IMAGES:
            return 1
        rate = self.value if self.metric == "accuracy_drop" else 1 - self.value
        return math.ceil(3 / rate - 1e-9)

    def __str__(self) -> str:
        return f"{self.metric}={self.value:g}"


def parse_size(text: str, option: str = "--input-size") -> tuple[int, int]:
    """Parse `N` or `HxW`, in pixels, into (height, width)."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None or int(match[1]) < 1 or int(match[2] or 1) < 1:
        raise UsageError(
            f"{option} {text!r}: not N or HxW", hint="for example 224 or 224x320 (height, width)"
        )
    return int(match[1]), int(match[2] or match[1])


def parse_model_args(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Parse `KEY=VALUE` texts. If a key is repeated, its last value counts."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(
                f"--model-arg {text!r}: not KEY=VALUE", hint="for example --model-arg zero_init_residual=true"
            )
        found[key] = value
    return tuple(sorted(found.items()))


def parse_renames(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Parse `OLD=NEW` texts. NEW may be empty."""
    found = []
    for text in texts:
        old, equals, new = text.partition("=")
        if not equals or not old:
            raise UsageError(
                f"--rename {text!r}: not OLD=NEW", hint="for example --rename backbone.= (removes it)"
            )
        found.append((old, new))
    return tuple(found)


def parse_steps(text: str) -> tuple[str, ...]:
    """Parse step names separated by commas, or `none`."""
    return () if text == "none" else tuple(dict.fromkeys(part.strip() for part in text.split(",")))


# Readers of `ExportOptions`: Python's users give a text instead of a path, or one text instead of a tuple.


def _path(name: str, given: Any) -> Path:
    if not isinstance(given, str | Path):
        raise _wrong(name, given, "a path")
    return Path(given)


def _text(name: str, given: Any) -> str:
    if not isinstance(given, str | Path):
        raise _wrong(name, given, "a text")
    return str(given)


def _number(name: str, given: Any) -> int:
    if isinstance(given, bool) or not isinstance(given, int):
        raise _wrong(name, given, "a whole number")
    return given


def _texts(name: str, given: Any) -> tuple[str, ...]:
    """One text alone is a tuple of one."""
    found = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Sequence) else (None,)
    if not all(isinstance(text, str) for text in found):
        raise _wrong(name, given, "texts")
    return found


def _parsed(kind: type, parse: Callable[[str], Any]) -> Callable[[str, Any], Any]:
    """A reader that parses what the command line takes as text."""

    def read(name: str, given: Any) -> Any:
        if isinstance(given, kind):
            return given
        if isinstance(given, bool) or not isinstance(given, str | int):
            raise _wrong(name, given, f"{kind.__name__}, or the text that the command line takes")
        return parse(str(given))

    return read


def _size(name: str, given: Any) -> tuple[int, int]:
    if isinstance(given, Sequence) and not isinstance(given, str):
        height, width = given if len(given) == 2 else (None, None)
        return _number(name, height), _number(name, width)
    found: tuple[int, int] = _parsed(tuple, parse_size)(name, given)
    return found


def _pairs(parse: Callable[[Sequence[str]], Any]) -> Callable[[str, Any], Any]:
    """A reader of pairs that may be a mapping."""

    def read(name: str, given: Any) -> Any:
        del name
        return (
            parse([f"{key}={value}" for key, value in given.items()]) if isinstance(given, Mapping) else given
        )

    return read


def _tolerances(name: str, given: Any) -> tuple[Tolerance, ...]:
    single = isinstance(given, str | Tolerance)
    read = _parsed(Tolerance, Tolerance.parse)
    return tuple(read(name, one) for one in ((given,) if single else given))


def _seconds(name: str, given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise _wrong(name, given, "a number of seconds")
    return float(given)


def _wrong(name: str, given: Any, wanted: str) -> UsageError:
    return UsageError(f"{name}={given!r}: must be {wanted}", hint="see ExportOptions for its type")


READERS: Mapping[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("calib", "ranges", "verify", "preprocess", "costs", "out"), _path),
    **dict.fromkeys(("model", "weights", "method", "effort"), _text),
    **dict.fromkeys(("calib_images", "verify_images", "num_classes", "resize_size", "seed"), _number),
    **dict.fromkeys(
        ("precisions", "targets", "init_missing", "skip_weights", "keep_float", "keep_float_fp16"), _texts
    ),
    "steps": lambda name, given: parse_steps(given) if isinstance(given, str) else _texts(name, given),
    "input_size": _size,
    "model_args": _pairs(parse_model_args),
    "renames": _pairs(parse_renames),
    "dynamic_size": _parsed(SizeRange, SizeRange.parse),
    "batch": _parsed(BatchRange, BatchRange.parse),
    "tolerances": _tolerances,
    "aim": lambda name, given: None if given is None else _parsed(Aim, Aim.parse)(name, given),
    "aim_seconds": _seconds,
}
"""Readers of fields of `ExportOptions`, by name."""
