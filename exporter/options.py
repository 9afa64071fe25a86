"""Options of an export, typed, for the command line and the Python API. Imports nothing heavy."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from export_zoo.base.errors import UsageError
from export_zoo.engines.precision.registry import BASELINE, PRECISIONS
from export_zoo.engines.targets.base import MAX_BATCH
from export_zoo.engines.targets.options import BuildOptions
from export_zoo.engines.targets.registry import TARGETS

STEPS = ("equalize", "round", "bias", "float")
"""Steps that may improve INT8, tried in this order."""

EFFORTS = ("default", "high")
"""How much is tried to improve INT8."""

METHODS = ("auto", "minmax", "percentile", "entropy", "mse")
"""`auto`, and the names in `calibration.methods`, which is not imported because it loads NumPy."""
TASKS = ("classification", "binary", "multilabel", "regression", "embedding", "segmentation")
"""Names in `parity.tasks`, which is not imported for the same reason."""
MAX_SEED = 2**31 - 1
MAX_SIDE = 8192
REQUIREMENTS = ("graph", "verified")

DEFAULT_CALIB_IMAGES = 512
DEFAULT_VERIFY_IMAGES = 128
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


@dataclass(frozen=True)
class ExportOptions:
    """What to export, to what, and how strictly to check it. Defaults and reasons: docs/usage.md.

    Sizes are in pixels, counts in images. `input_size` is (height, width).

    Raises:
        UsageError: a value is out of range, or options exclude each other.
    """

    model: str
    precisions: tuple[str, ...] = (BASELINE.name,)
    targets: tuple[str, ...] = ("auto",)
    calib: Path | None = None
    calib_images: int = DEFAULT_CALIB_IMAGES
    ranges: Path | None = None
    verify: Path | None = None
    verify_images: int = DEFAULT_VERIFY_IMAGES
    weights: str = "DEFAULT"
    transforms: str | None = None
    preprocess: Path | None = None
    num_classes: int | None = None
    task: str | None = None
    init_missing: tuple[str, ...] = ()
    model_args: tuple[tuple[str, str], ...] = ()
    weights_key: str | None = None
    renames: tuple[tuple[str, str], ...] = ()
    skip_weights: tuple[str, ...] = ()
    allow_pickle: bool = False
    transform_input: bool | None = None
    fully_convolutional: bool = False
    input_size: tuple[int, int] | None = None
    dynamic_size: SizeRange | None = None
    resize_size: int | None = None
    batch: BatchRange = field(default_factory=BatchRange)
    tolerances: tuple[Tolerance, ...] = ()
    require: Literal["graph", "verified"] = "graph"
    strict: bool = False
    """Whether `auto` fails, too, if a target refuses the network."""
    method: str = "auto"
    steps: tuple[str, ...] = STEPS
    effort: str = EFFORTS[0]
    keep_float: tuple[str, ...] = ()
    build: BuildOptions = field(default_factory=BuildOptions)
    out: Path | None = None
    cache: bool = True
    memory_check: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("calib", "ranges", "verify", "preprocess", "out"):
            if isinstance(given := getattr(self, name), str):  # Python's users write strings
                object.__setattr__(self, name, Path(given))
        if not self.precisions:
            raise UsageError("--precision: none given", hint=f"choose from {', '.join(PRECISIONS)}")
        for precision in self.precisions:
            if precision not in PRECISIONS:
                raise UsageError(
                    f"--precision {precision}: unknown", hint=f"choose from {', '.join(PRECISIONS)}"
                )
        if ":" in self.model and self.preprocess is None:
            raise UsageError(
                f"{self.model}: user models need --preprocess FILE: their preprocessing cannot be inferred",
                hint='for example {"resize_size": 256, "crop_height": 224, "crop_width": 224, "interpolation": '
                '"bilinear", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}',
            )
        if self.preprocess is not None and self.transforms is not None:
            raise UsageError("--preprocess and --transforms exclude each other", hint="leave one out")
        if self.weights == "none" and self.init_missing:
            raise UsageError("--init-missing cannot be used with --weights none", hint="leave one out")
        if self.weights == "none" and (
            self.weights_key or self.renames or self.skip_weights or self.allow_pickle
        ):
            raise UsageError(
                "--weights-key, --rename, --skip-weights and --allow-pickle cannot be used with --weights none",
                hint="leave them out",
            )
        if self.dynamic_size is not None and self.input_size is not None:
            raise UsageError(
                "--dynamic-size and --input-size exclude each other",
                hint="leave out --input-size: OPT of --dynamic-size takes its place",
            )
        if self.method not in METHODS:
            raise UsageError(f"--method {self.method}: unknown", hint=f"choose from {', '.join(METHODS)}")
        for step in self.steps:
            if step not in STEPS:
                given = ",".join(self.steps)
                raise UsageError(
                    f"--steps {given}: unknown step {step!r}",
                    hint=f"choose from {', '.join(STEPS)}, none",
                )
        if self.effort not in EFFORTS:
            raise UsageError(f"--effort {self.effort}: unknown", hint=f"choose from {', '.join(EFFORTS)}")
        if self.require not in REQUIREMENTS:
            raise UsageError(
                f"--require {self.require}: unknown", hint=f"choose from {', '.join(REQUIREMENTS)}"
            )
        if self.ranges is not None and not self.uses_ranges:
            raise UsageError(
                f"--ranges has no effect on {', '.join(self.precisions)}", hint="add --precision int8"
            )
        if self.quantizes and self.calib is None and self.ranges is None:
            raise UsageError(
                f"--precision {self.quantizes[0]} needs --calib DIR, or --ranges FILE",
                hint="pass a folder of 300 to 1,000 images like those the network will see",
            )
        for option, value in (
            ("--calib-images", self.calib_images),
            ("--verify-images", self.verify_images),
            ("--resize-size", self.resize_size),
        ):
            if value is not None and value < 1:
                raise UsageError(f"{option} {value}: must be at least 1", hint="leave it out for the default")
        if not 0 <= self.seed <= MAX_SEED:
            raise UsageError(f"--seed {self.seed}: must be 0 to {MAX_SEED}", hint="leave it out for 0")
        if self.num_classes is not None and self.num_classes < 0:
            raise UsageError(
                f"--num-classes {self.num_classes}: must be at least 0",
                hint="0 is timm's form without a head",
            )
        if self.task is not None and self.task not in TASKS:
            raise UsageError(f"--task {self.task}: unknown", hint=f"choose from {', '.join(TASKS)}")
        if self.verify_images < 32:
            raise UsageError(
                f"--verify-images {self.verify_images}: at least 32 are needed for a comparison",
                hint="leave it out for the default",
            )
        if self.calib_images < 16:
            raise UsageError(
                f"--calib-images {self.calib_images}: at least 16 are needed for a range",
                hint="use 300 to 1,000 images",
            )

    @property
    def out_dir(self) -> Path:
        """Directory of the bundle: `out`, or `<model>.bundle` in the current directory."""
        return self.out if self.out is not None else Path(f"{self.short_name}.bundle")

    @property
    def short_name(self) -> str:
        """The model's name without the parts that a file name cannot hold: `vit` for `nets/vit.py:vit`."""
        return self.model.removeprefix("timm/").rpartition(":")[2]

    @property
    def crop_size(self) -> tuple[int, int] | None:
        """Input size that images are cropped to: OPT if the size is dynamic, None for the weights' own size."""
        return self.dynamic_size.opt if self.dynamic_size is not None else self.input_size

    @property
    def uses_ranges(self) -> bool:
        """Whether a requested precision depends on activation ranges."""
        return any(PRECISIONS[name].uses_ranges for name in self.precisions)

    @property
    def quantizes(self) -> tuple[str, ...]:
        """Requested precisions that have Q/DQ pairs: they need images, histograms and tuning."""
        return tuple(name for name in self.precisions if PRECISIONS[name].quantized)

    def unique_precisions(self) -> tuple[str, ...]:
        """Requested precisions, each once, the most exact first."""
        return tuple(p for p in PRECISIONS if p in self.precisions)
