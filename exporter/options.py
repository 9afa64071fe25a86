"""Options of an export, typed, for the command line and the Python API. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from export_zoo.base.errors import UsageError
from export_zoo.engines.precision.registry import BASELINE, PRECISIONS, QUANTIZED
from export_zoo.engines.targets.options import BuildOptions
from export_zoo.exporter.model_sources import short_name, source_of
from export_zoo.exporter.option_values import READERS, Aim, BatchRange, SizeRange, Tolerance

STEPS = ("equalize", "round", "bias", "float")
"""Steps that may improve INT8, tried in this order."""

EFFORTS = ("default", "high")
"""How much is tried to improve INT8."""

METHODS = ("auto", "minmax", "percentile", "entropy", "mse")
"""`auto`, and the names in `calibration.methods`, which is not imported because it loads NumPy."""
KEEP_FLOAT_KINDS = ("@depthwise", "@few-channels")
"""Names in `precision.int8.keep_float`, which is not imported for the same reason."""
TASKS = ("classification", "binary", "multilabel", "regression", "embedding", "segmentation")
"""Names in `parity.tasks`, which is not imported for the same reason."""
MAX_SEED = 2**31 - 1
REQUIREMENTS = ("graph", "verified")

DEFAULT_CALIB_IMAGES = 512
DEFAULT_VERIFY_IMAGES = 128
DEFAULT_AIM_SECONDS: float = 300


def keep_float_option(*, quantized: bool) -> str:
    """The option that names layers of an INT8 engine, or nodes of an FP16 engine, to leave float."""
    return "--keep-float" if quantized else "--keep-float-fp16"


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export: model, engines, and how strictly they are checked. Defaults and reasons: docs/usage.md.

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
    keep_float_fp16: tuple[str, ...] = ()
    aim: Aim | None = None
    aim_seconds: float = DEFAULT_AIM_SECONDS
    costs: Path | None = None
    build: BuildOptions = field(default_factory=BuildOptions)
    out: Path | None = None
    cache: bool = True
    memory_check: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, read in READERS.items():
            given = getattr(self, name)
            if given is not None or self.__dataclass_fields__[name].default is not None:
                object.__setattr__(self, name, read(name, given))
        if not self.precisions:
            raise UsageError("--precision: none given", hint=f"choose from {', '.join(PRECISIONS)}")
        for precision in self.precisions:
            if precision not in PRECISIONS:
                raise UsageError(
                    f"--precision {precision}: unknown", hint=f"choose from {', '.join(PRECISIONS)}"
                )
        if source_of(self.model).own_code and self.preprocess is None:
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
        for pattern in self.keep_float:
            if pattern.startswith("@") and pattern not in KEEP_FLOAT_KINDS:
                raise UsageError(
                    f"--keep-float {pattern}: unknown kind", hint=f"choose from {', '.join(KEEP_FLOAT_KINDS)}"
                )
        if self.aim is not None and set(self.precisions) == {BASELINE.name}:
            raise UsageError(
                f"--aim has no effect on {BASELINE.name}", hint=f"add --precision {QUANTIZED} or fp16"
            )
        if self.aim is not None and self.calib is None:
            raise UsageError("--aim needs images to choose layers on", hint="give --calib DIR")
        if not self.aim_seconds > 0:
            raise UsageError(
                f"--aim-seconds {self.aim_seconds:g}: must be over 0",
                hint=f"the default is {DEFAULT_AIM_SECONDS:g}",
            )
        if self.require not in REQUIREMENTS:
            raise UsageError(
                f"--require {self.require}: unknown", hint=f"choose from {', '.join(REQUIREMENTS)}"
            )
        if self.ranges is not None and not self.uses_ranges:
            raise UsageError(
                f"--ranges has no effect on {', '.join(self.precisions)}", hint=f"add --precision {QUANTIZED}"
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
                hint="leave it out, or give 1 or more; 0 is timm's form without a head",
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
        return short_name(self.model)

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
