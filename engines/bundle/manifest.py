"""manifest.json: what a bundle holds. The JSON Schema in docs/manifest.schema.json is made from these models.

`recipe` is the same for the same inputs, instruction set and library versions; `artifacts` holds what
differs from run to run (times, engines that are not reproducible).
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from export_zoo.calibration.preprocess import Preprocess
from export_zoo.engines.parity.metrics import METRICS
from export_zoo.engines.precision.registry import PRECISIONS
from export_zoo.engines.targets.base import MAX_BATCH
from export_zoo.engines.targets.plan import Plan
from export_zoo.engines.targets.registry import TARGETS

SCHEMA_VERSION: Literal[1] = 1
WeightsKind = Literal["torchvision", "timm", "factory", "file", "random"]
ZooName = Literal["torchvision", "timm", "python"]
State = Literal["built", "graph verified", "verified"]
STATES: tuple[State, ...] = ("built", "graph verified", "verified")
"""Weakest first. *built*: not run, or outside its tolerance. *graph verified*: the precision graph was run and
compared. *verified*: the engine itself was run and compared."""


class _Model(BaseModel):
    # A later version of this schema may add fields. Those of `preprocess` are not ignored: they would change logits.
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class File(_Model):
    """A file of the bundle; its name holds the beginning of its hash."""

    path: str = Field(description="Relative to the bundle, with forward slashes.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)


class Weights(_Model):
    kind: WeightsKind
    name: str = Field(description="`ResNet50_Weights.IMAGENET1K_V2`, a file's name, or `random`.")
    sha256: str = Field(description="Of the weights file; empty for random weights.")
    random: bool = Field(description="No trained weights at all: figures say nothing about accuracy.")
    initialized: list[str] = Field(description="Parameters that were initialized at random (another head).")
    entry: str = Field(
        default="", description="Of the training checkpoint that was loaded; empty for a bare one."
    )
    skipped: list[str] = Field(default=[], description="Names of the file that were left out.")
    seed: int = Field(description="Seed of everything random.")


class Source(_Model):
    """The network, as it was built."""

    zoo: ZooName = Field(description="`python`: the user's own.")
    name: str
    factory: str = Field(
        default="", description="`FILE.py:FUNCTION` or `package.module:FUNCTION` of the user's own."
    )
    num_classes: int
    transform_input: bool | None = Field(description="googlenet and inception_v3 only; else null.")
    arguments: dict[str, str] = Field(default={}, description="Further ones of the model's function.")
    fully_convolutional: bool = Field(
        default=False,
        description="Linear layers made convolutions, scores averaged over all places (arXiv 1409.1556, 3.2).",
    )
    weights: Weights


class Port(_Model):
    """An input or output of the graph."""

    name: str
    dtype: Literal["float32"]
    shape: list[int | str] = Field(
        description="`batch` is dynamic; so are `height` and `width`, where the recipe has an `input_size`."
    )
    layout: str

    def of_image(self, height: int, width: int) -> tuple[int, ...]:
        """The shape of one image's part, where the input is height x width pixels."""
        named = {"height": height, "width": width}
        return tuple(named[size] if isinstance(size, str) else size for size in self.shape[1:])


class Batch(_Model):
    min: int = Field(ge=1)
    opt: int = Field(ge=1)
    max: int = Field(ge=1, le=MAX_BATCH)

    @model_validator(mode="after")
    def _ordered(self) -> Batch:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"batch {self.min}:{self.opt}:{self.max} is not in order")
        return self


class SizeRange(_Model):
    """Height and width of the input that an engine takes, in pixels: anything from `min` to `max`."""

    min: tuple[int, int]
    opt: tuple[int, int]
    max: tuple[int, int]

    @model_validator(mode="after")
    def _ordered(self) -> SizeRange:
        for low, opt, high in zip(self.min, self.opt, self.max, strict=True):
            if not 1 <= low <= opt <= high:
                raise ValueError(f"sizes {self.min}, {self.opt}, {self.max} are not in order")
        return self

    def holds(self, height: int, width: int) -> bool:
        return all(a <= b <= c for a, b, c in zip(self.min, (height, width), self.max, strict=True))


class Calibration(_Model):
    """Where the activation ranges come from."""

    method: str
    images: int
    synthetic: bool = Field(description="Seeded synthetic images: only overflow of FP16 was looked for.")
    unreadable: list[str]
    ranges: File


class Recipe(_Model):
    """Identical for identical inputs, instruction set and versions."""

    source: Source
    input: Port
    output: Port = Field(description="The logits: [batch, classes], or [batch, classes, height, width].")
    further_outputs: list[Port] = Field(
        default=[], description="Of networks with several, auxiliary ones say."
    )
    batch: Batch
    input_size: SizeRange | None = Field(
        default=None,
        description="Sizes that the input may have; null: the one in `input`. `opt` is `preprocess`'s.",
    )
    preprocess: Preprocess
    labels: list[str] = Field(description="Class names by index; empty where they are not known.")
    graph: File = Field(description="The simplified FP32 graph.")
    external_data: list[File] = Field(description="Weights files that the graph refers to (over 2 GiB).")
    simplified: str = Field(description="What simplifying did, or why it was skipped.")
    calibration: Calibration | None
    reduce_range: bool = Field(
        default=False, description="Weights have 7 bits: an option of earlier versions."
    )
    keep_float: list[str] = Field(description="Patterns of the layers that INT8 leaves unquantized.")
    instruction_set: str
    versions: dict[str, str]

    @property
    def outputs(self) -> list[Port]:
        """All, in the graph's order."""
        return [self.output, *self.further_outputs]

    @model_validator(mode="after")
    def _sized(self) -> Recipe:
        crop = (self.preprocess.crop_height, self.preprocess.crop_width)
        wanted: list[int | str] = ["height", "width"] if self.input_size is not None else [*crop]
        if len({port.name for port in self.outputs}) < len(self.outputs):
            raise ValueError("two outputs have the same name")
        if self.input.shape[2:] != wanted or (self.input_size is not None and self.input_size.opt != crop):
            raise ValueError("sizes of input, input_size and preprocess do not belong together")
        return self


MetricValues = dict[str, float | int | None]


class FurtherMetrics(_Model):
    """Figures of an output beside the first, as those of `Gate`."""

    metrics: MetricValues
    eager_metrics: MetricValues


class Gate(_Model):
    """What an engine was compared with, and the figures."""

    ran: Literal["engine", "precision graph"] = Field(description="What was run to be compared.")
    reference: Literal["eager", "unfused precision graph"]
    tolerances: dict[str, float]
    batches: list[int] = Field(description="Batch sizes that were run and compared.")
    sizes: list[tuple[int, int]] = Field(
        default=[], description="Further heights and widths, where dynamic; each at batches opt and max."
    )
    metrics: MetricValues = Field(
        description="The first output of all images at batch opt, against the reference."
    )
    eager_metrics: MetricValues = Field(description="The same, against eager PyTorch.")
    further: dict[str, FurtherMetrics] = Field(default={}, description="Further outputs by name.")
    failures: list[str]

    @field_validator("tolerances")
    @classmethod
    def _known(cls, tolerances: dict[str, float]) -> dict[str, float]:
        if unknown := tolerances.keys() - METRICS:
            raise ValueError(f"unknown metric {', '.join(sorted(unknown))}")
        return tolerances


def state_after(gate: Gate) -> State:
    """What an engine may be called after its gate."""
    if gate.failures:
        return "built"
    return "verified" if gate.ran == "engine" else "graph verified"


class Latency(_Model):
    """Latency of one engine, measured in turn with the FP32 engine of the same run."""

    batch: int
    median_ms: float = Field(description="Median milliseconds of one run of the whole batch.")
    fp32_median_ms: float
    speedup: float = Field(description="Median of the rounds' ratios FP32 / this engine; over 1 is faster.")
    rounds: int
    machine: str


StepName = Literal["equalize", "relu6", "round", "bias", "method", "float"]


class TuningStep(_Model):
    """One choice, by the SQNR of its candidates on the select images."""

    name: StepName
    chosen: str
    sqnr: dict[str, float] = Field(
        description="Of each candidate, in dB to the FP32 graph's logits, on the tuning's `images`."
    )
    best: str | None = Field(default=None, description="Of the candidates beside the default.")
    gain: float | None = Field(
        default=None, description="Of the best over the default, in dB, on the step's `images`."
    )
    standard_error: float | None = Field(default=None, description="Of the gain, over images, in dB.")
    images: int | None = Field(
        default=None, description="That the best was compared on: more where it was close."
    )
    names: list[str] = Field(
        default_factory=list,
        description="`method`: tensors whose range is `mse`'s; `float`: layers (globs over nodes) left unquantized.",
    )


class Tuning(_Model):
    """How INT8 was made better, on images that neither calibrate nor verify."""

    images: int
    steps: list[TuningStep]


class Engine(_Model):
    name: str = Field(description="`<target>-<precision>`.")
    target: str = Field(json_schema_extra={"enum": list(TARGETS)})
    precision: str = Field(json_schema_extra={"enum": list(PRECISIONS)})
    file: File
    external_data: list[File] = Field(description="Weights files that the engine refers to (over 2 GiB).")
    graph: File | None = Field(description="The precision graph that TensorRT compiled; else null.")
    plan: Plan | None = Field(description="TensorRT only; else null.")
    timing_cache: File | None = Field(
        description="`tensorrt` only: the kernel timings that it was built with, for `--timing-cache`."
    )
    graph_external_data: list[File] = Field(description="Weights files of that graph (over 2 GiB).")
    tuning: Tuning | None = Field(description="INT8 only, where anything was tried; else null.")
    state: State
    built_by: dict[str, str] = Field(description="Library versions that built it.")
    instruction_set: str = Field(description="Of the machine that it was verified on.")
    gate: Gate
    latency: Latency | None
    saturating_cpu_session: dict[str, str] | None = Field(
        default=None,
        description="ONNX Runtime: session configuration that the engine needs on CPUs where sums of uint8 x int8 "
        "products saturate (x86-64 without VNNI); empty where it cannot saturate. Null: TensorRT, and bundles of "
        "earlier versions, whose INT8 engines need `session.x64quantprecision` = `1` there.",
    )

    @field_validator("saturating_cpu_session")
    @classmethod
    def _of_sessions(cls, entries: dict[str, str] | None) -> dict[str, str] | None:
        for key in entries or {}:
            # Some entries name files that ONNX Runtime writes: a manifest must not choose those.
            if not key.startswith("session.") or "file" in key or "path" in key:
                raise ValueError(f"{key!r} is no configuration of a session that a manifest may give")
        return entries

    @model_validator(mode="after")
    def _true(self) -> Engine:
        if self.name != f"{self.target}-{self.precision}":
            raise ValueError(f"engine {self.name} is not {self.target}-{self.precision}")
        if _is_unknown({"target": self.target, "precision": self.precision}):
            raise ValueError(f"{self.name}: unknown target or precision")
        compiled = TARGETS[self.target].compiled
        if compiled != (self.plan is not None) or compiled != (self.graph is not None):
            raise ValueError(
                f"{self.name}: a plan and the graph it was compiled from are TensorRT's, and only its"
            )
        if compiled and self.file.path.endswith(".onnx"):
            raise ValueError(f"{self.name}: {self.file.path} is not an engine of {self.target}")
        reached = state_after(self.gate)
        if STATES.index(self.state) > STATES.index(reached):
            raise ValueError(f"{self.name} is called {self.state}, its gate makes it {reached}")
        return self

    def session_where_saturating(self) -> dict[str, str]:
        """Session configuration that ONNX Runtime needs where sums of INT8 saturate. Older bundles do not say it."""
        if self.saturating_cpu_session is not None:
            return self.saturating_cpu_session
        return {"session.x64quantprecision": "1"} if PRECISIONS[self.precision].integer_sums else {}

    @property
    def without_weights(self) -> bool:
        """Its file has no weights: they come from its graph."""
        return self.plan is not None and self.plan.strip_weights

    @property
    def size_bytes(self) -> int:
        """Of the engine with its weights."""
        return self.file.size_bytes + sum(file.size_bytes for file in self.external_data)


class _HeldOutImages(_Model):
    inputs: File = Field(description="NumPy .npy, uint8 [N, H, W, 3], RGB after resize and crop.")
    logits: File = Field(
        description="NumPy .npy, float32 [N, classes], eager PyTorch FP32. Dense ones [N, classes, h, w]: at most "
        "64 rows and columns, spread evenly."
    )
    further: list[File] = Field(default=[], description="The same of each further output.")
    count: int

    def files(self) -> list[File]:
        return [self.inputs, self.logits, *self.further]


class HeldOutSize(_HeldOutImages):
    """The first held-out inputs at another size, made by the same preprocessing: the resize in proportion."""

    height: int
    width: int


class HeldOut(_HeldOutImages):
    """Inputs and eager logits that were never calibrated on: the reference on machines without PyTorch."""

    synthetic: bool = Field(description="Seeded synthetic images, because no folder was given.")
    labels: list[int] | None
    image_sha256: list[str] = Field(description="Hashes of the image files, in order; empty if synthetic.")
    sizes: list[HeldOutSize] = Field(default=[], description="Where height and width are dynamic.")


class Artifacts(_Model):
    created: str = Field(description="UTC, ISO 8601.")
    engines: list[Engine] = Field(min_length=1)
    held_out: HeldOut

    @model_validator(mode="after")
    def _each_once(self) -> Artifacts:
        names = [engine.name for engine in self.engines]
        if len(set(names)) < len(names):
            raise ValueError(f"an engine is there twice: {', '.join(sorted(names))}")
        return self


class NoKnownEngineError(ValueError):
    """All engines of a bundle are of targets or precisions that this version does not know."""


def _is_unknown(engine: object) -> bool:
    """Whether JSON describes an engine of a target or precision that this version does not know."""
    if not isinstance(engine, dict):
        return False
    target, precision = engine.get("target"), engine.get("precision")
    known = target in TARGETS and precision in PRECISIONS
    return isinstance(target, str) and isinstance(precision, str) and not known


class Manifest(_Model):
    schema_version: Literal[1]
    tool: str = Field(description="`export-zoo <version>`.")
    status: Literal["ok", "failed"] = Field(
        description="`failed`: a gate did not hold, or a state was not reached; do not serve."
    )
    warnings: list[str]
    recipe: Recipe
    artifacts: Artifacts
    _unknown: tuple[str, ...] = PrivateAttr(default=())

    @classmethod
    def of(cls, document: dict[str, Any]) -> Manifest:
        """Of JSON, without the engines of targets and precisions that this version does not know.

        Raises:
            ValidationError: it is no manifest.
            NoKnownEngineError: nothing is left.
        """
        artifacts = document.get("artifacts")
        engines = artifacts.get("engines") if isinstance(artifacts, dict) else None
        unknown = [entry for entry in engines if _is_unknown(entry)] if isinstance(engines, list) else []
        if unknown:
            known = [entry for entry in engines or [] if not _is_unknown(entry)]
            if not known:
                names = ", ".join(str(entry.get("name")) for entry in unknown)
                raise NoKnownEngineError(f"this version knows none of its engines: {names}")
            document = {**document, "artifacts": {**(artifacts or {}), "engines": known}}
        found = cls.model_validate(document)
        found._unknown = tuple(str(entry.get("name")) for entry in unknown)
        return found

    @property
    def unknown_engines(self) -> tuple[str, ...]:
        """Names of engines that a later version made, and that this one leaves out."""
        return self._unknown

    @model_validator(mode="after")
    def _outputs_held_out(self) -> Manifest:
        held = self.artifacts.held_out
        counts = {len(held.further), *(len(part.further) for part in held.sizes)}
        if counts != {len(self.recipe.further_outputs)}:
            raise ValueError("held-out logits are not those of the outputs")
        return self

    @model_validator(mode="after")
    def _compared_at_all_sizes(self) -> Manifest:
        sizes = self.recipe.input_size
        held = {(part.height, part.width) for part in self.artifacts.held_out.sizes}
        wanted = {sizes.min, sizes.max} - {sizes.opt} if sizes is not None else set()
        if not wanted <= held:
            raise ValueError("held-out images of the smallest or the largest size are missing")
        if held and (sizes is None or not all(sizes.holds(*size) for size in held)):
            raise ValueError("held-out images of sizes outside the range")
        return self

    def files(self) -> list[File]:
        """Every file of the bundle, each once."""
        recipe, artifacts = self.recipe, self.artifacts
        files = [recipe.graph, *recipe.external_data]
        for engine in artifacts.engines:
            files += [engine.file, *engine.external_data, *engine.graph_external_data]
            files += [file for file in (engine.graph, engine.timing_cache) if file is not None]
        files += artifacts.held_out.files()
        for part in artifacts.held_out.sizes:
            files += part.files()
        if recipe.calibration is not None:
            files.append(recipe.calibration.ranges)
        return list({file.path: file for file in files}.values())


class HostFigures(_Model):
    """An engine on the machine that emulated another CPU, with the same images."""

    sqnr: float | None = Field(description="In dB, to eager PyTorch.")
    max_difference: float = Field(description="Largest between logits of both; 0: equal to the bit.")


class Emulation(_Model):
    """That an attestation is of a CPU that was emulated by qemu-user."""

    cpu: str = Field(description="As of `--cpu`.")
    saturates: bool = Field(
        description="Whether ONNX Runtime's sums of uint8 x int8 products saturate there."
    )
    host: dict[str, HostFigures] = Field(description="By engine.")


class Attestation(_Model):
    """What `verify` found on some machine; written beside the manifest, in attestations/."""

    schema_version: Literal[1]
    manifest_sha256: str
    created: str
    machine: str
    instruction_set: str
    compute_capability: str | None = Field(description="Of the first CUDA device; null without one.")
    versions: dict[str, str]
    status: Literal["ok", "failed"]
    warnings: list[str]
    engines: dict[str, Gate]
    states: dict[str, State] = Field(description="By engine; empty for an emulated CPU.")
    emulation: Emulation | None = Field(default=None, description="Null: this machine's own CPU.")


def json_schema() -> dict[str, Any]:
    """The manifest's JSON Schema (draft 2020-12)."""
    schema = Manifest.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def main() -> None:
    """Print the schema: `python -m export_zoo.engines.bundle.manifest > docs/manifest.schema.json`."""
    print(json.dumps(json_schema(), indent=2))


if __name__ == "__main__":
    main()
