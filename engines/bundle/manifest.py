"""Models of manifest.json, which describes a bundle. docs/manifest.schema.json is generated from them.

`recipe` is the same for the same inputs, instruction set and library versions. `artifacts` holds what differs from run
to run: times, and engines that are not reproducible.
"""

from __future__ import annotations

import json
from glob import escape
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from export_zoo.calibration.preprocess import Preprocess
from export_zoo.engines.parity.limits import Limit
from export_zoo.engines.parity.tasks import TASKS, Head, classes_of
from export_zoo.engines.precision.int8.names import APPROXIMATE, OFF
from export_zoo.engines.precision.registry import PRECISIONS
from export_zoo.engines.targets.base import MAX_BATCH
from export_zoo.engines.targets.float_for_speed import FloatForSpeed
from export_zoo.engines.targets.plan import Plan
from export_zoo.engines.targets.registry import TARGETS

SCHEMA_VERSION: Literal[1] = 1
State = Literal["built", "graph verified", "verified"]
STATES: tuple[State, ...] = ("built", "graph verified", "verified")
"""States of an engine, weakest first.

*built*: the engine was not run, or is outside its tolerance. *graph verified*: the precision graph was run and
compared. *verified*: the engine itself was run and compared.
"""


class _Model(BaseModel):
    # A later version of this schema may add fields: unknown fields are ignored. `preprocess` forbids unknown fields,
    # because they would change the logits.
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class File(_Model):
    """A file of the bundle. Its name contains the beginning of its hash."""

    path: str = Field(description="Path relative to the bundle, with forward slashes.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)


class Weights(_Model):
    kind: str = Field(
        description="`random`, `file` (given with `--weights`), `factory` (the user's own function loads them), or the "
        "source of the network, for example `torchvision`."
    )
    name: str = Field(description="`ResNet50_Weights.IMAGENET1K_V2`, a file's name, or `random`.")
    sha256: str = Field(description="SHA-256 of the weights file; empty for random weights.")
    random: bool = Field(
        description="Whether there are no trained weights. Then the metrics say nothing about accuracy."
    )
    initialized: list[str] = Field(
        description="Names of parameters that were initialized at random, for example those of a new head."
    )
    entry: str = Field(
        default="",
        description="Entry of the training checkpoint that was loaded; empty for a bare state dict.",
    )
    skipped: list[str] = Field(default=[], description="Names in the weights file that were left out.")
    seed: int = Field(description="Seed of all random numbers.")


class Source(_Model):
    """The network that was exported, and how it was built."""

    zoo: str = Field(
        description="Source of the network: `torchvision`, `timm`, or `python` for the user's own code."
    )
    name: str
    factory: str = Field(
        default="",
        description="Function that makes the user's own network: `FILE.py:FUNCTION` or `package.module:FUNCTION`.",
    )
    num_classes: int = Field(description="Number of classes, quantities or features of the first output.")
    transform_input: bool | None = Field(
        description="Value of the model's `transform_input`, for googlenet and inception_v3 only; otherwise null."
    )
    arguments: dict[str, str] = Field(default={}, description="Further arguments of the model's function.")
    fully_convolutional: bool = Field(
        default=False,
        description="Whether Linear layers became convolutions. Scores are averaged over all positions "
        "(arXiv 1409.1556, 3.2).",
    )
    weights: Weights


class Port(_Model):
    """An input or output of the graph."""

    name: str
    dtype: Literal["float32"]
    shape: list[int | str] = Field(
        description="`batch` is dynamic. `height` and `width` are dynamic too, if the recipe has an `input_size`."
    )
    layout: str

    def of_image(self, height: int, width: int) -> tuple[int, ...]:
        """The shape for one image, without the batch, if the input is height x width pixels."""
        named = {"height": height, "width": width}
        return tuple(named[size] if isinstance(size, str) else size for size in self.shape[1:])


class OutputPort(Port):
    """An output: [batch], [batch, classes], [batch, tokens, classes] or [batch, classes, height, width]."""

    task: str = Field(
        default="",
        description="Meaning of the values. Empty in bundles of earlier versions: segmentation if the output has a "
        "height and a width, otherwise classification.",
        json_schema_extra={"enum": [*TASKS, ""]},
    )
    scores: str = Field(
        default="logits",
        description="`logits`, `probabilities` if the network ends with softmax or sigmoid, or `values`. For binary "
        "and multilabel, logits over 0 and probabilities over 0.5 are a yes.",
        json_schema_extra={"enum": ["logits", "probabilities", "values"]},
    )

    @property
    def head(self) -> Head:
        """Meaning of the values, as metrics need it."""
        dense = len(self.shape) == 4
        task = self.task or ("segmentation" if dense else "classification")
        return Head(task, self.scores, classes_of(self.of_image(1, 1)))


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
    """Range of input heights and widths that an engine accepts, in pixels: any size from `min` to `max`."""

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
    """Origin of the activation ranges."""

    method: str
    images: int
    synthetic: bool = Field(
        description="Whether the images are seeded synthetic images. Then they serve only to find FP16 overflow."
    )
    unreadable: list[str]
    ranges: File


class Recipe(_Model):
    """The part of the manifest that is identical for identical inputs, instruction set and library versions."""

    source: Source
    input: Port
    output: OutputPort = Field(
        description="The first output, which `infer` returns: logits of a classification, for example."
    )
    further_outputs: list[OutputPort] = Field(
        default=[], description="Outputs after the first, for example auxiliary outputs."
    )
    batch: Batch
    input_size: SizeRange | None = Field(
        default=None,
        description="Range of input sizes; `opt` is the size of `preprocess`. Null: only the size of `input`.",
    )
    preprocess: Preprocess
    labels: list[str] = Field(description="Class names by index; empty if they are not known.")
    graph: File = Field(description="The simplified FP32 graph.")
    external_data: list[File] = Field(description="Files with the graph's weights, if they exceed 2 GiB.")
    simplified: str = Field(description="Result of simplifying the graph, or the reason why it was skipped.")
    calibration: Calibration | None
    reduce_range: bool = Field(
        default=False, description="Whether weights have 7 bits, an option of earlier versions."
    )
    keep_float: list[str] = Field(description="Patterns of the layers that INT8 leaves unquantized.")
    keep_float_fp16: list[str] = Field(
        default=[], description="Patterns of the nodes that FP16 leaves float32."
    )
    instruction_set: str
    versions: dict[str, str]

    @property
    def outputs(self) -> list[OutputPort]:
        """All outputs, in the graph's order."""
        return [self.output, *self.further_outputs]

    @property
    def heads(self) -> dict[str, Head]:
        """Meaning of each output, by name."""
        return {port.name: port.head for port in self.outputs}

    @model_validator(mode="after")
    def _sized(self) -> Recipe:
        crop = (self.preprocess.crop_height, self.preprocess.crop_width)
        if self.input.shape[1:2] != [self.preprocess.channels]:
            raise ValueError("the channels of input and preprocess do not match")
        wanted: list[int | str] = ["height", "width"] if self.input_size is not None else [*crop]
        if len({port.name for port in self.outputs}) < len(self.outputs):
            raise ValueError("two outputs have the same name")
        if self.input.shape[2:] != wanted or (self.input_size is not None and self.input_size.opt != crop):
            raise ValueError("the sizes of input, input_size and preprocess do not match")
        return self


MetricValues = dict[str, float | int | None]


class FurtherMetrics(_Model):
    """Metrics of an output after the first, as in `Gate`."""

    metrics: MetricValues
    eager_metrics: MetricValues


class Gate(_Model):
    """Comparison of an engine with its reference, and the resulting metrics."""

    ran: Literal["engine", "precision graph"] = Field(description="What was run and compared.")
    reference: Literal["eager", "unfused precision graph"]
    tolerances: dict[str, float]
    batches: list[int] = Field(description="Batch sizes that were run and compared.")
    sizes: list[tuple[int, int]] = Field(
        default=[],
        description="Further heights and widths, if dynamic. Each was compared at batches opt and max.",
    )
    metrics: MetricValues = Field(
        description="Metrics of the first output against the reference, for all images at batch opt."
    )
    eager_metrics: MetricValues = Field(description="The same metrics, against eager PyTorch.")
    further: dict[str, FurtherMetrics] = Field(default={}, description="Metrics of further outputs, by name.")
    patterns: dict[str, float] = Field(
        default={},
        description="SQNR of the first output on each test pattern, in dB: the error there against the signal of the "
        "held-out images. -200 if it is not finite. Patterns for which eager's outputs are not finite are missing.",
    )
    failures: list[str]


def state_after(gate: Gate) -> State:
    """The strongest state that an engine may have after its gate."""
    if gate.failures:
        return "built"
    return "verified" if gate.ran == "engine" else "graph verified"


class Latency(_Model):
    """Latency of one engine, measured alternately with the FP32 engine of the same run."""

    batch: int
    median_ms: float = Field(description="Median latency of one run of the whole batch, in milliseconds.")
    fp32_median_ms: float
    speedup: float = Field(
        description="Median over rounds of the latency ratio FP32 / this engine. Over 1 is faster than FP32."
    )
    rounds: int
    machine: str


StepName = Literal["equalize", "relu6", "round", "bias", "method", "float"]


class TuningStep(_Model):
    """One choice among candidates, by their SQNR on the select images."""

    name: StepName
    chosen: str
    sqnr: dict[str, float] = Field(
        description="SQNR of each candidate against the FP32 graph's logits, in dB, on the tuning's `images`."
    )
    best: str | None = Field(default=None, description="Best candidate other than the default.")
    gain: float | None = Field(
        default=None,
        description="Gain of the best candidate over the default, in dB, on the step's `images`.",
    )
    standard_error: float | None = Field(
        default=None, description="Standard error of the gain over images, in dB."
    )
    images: int | None = Field(
        default=None,
        description="Number of images that the best candidate was compared on. It is larger if the result was close.",
    )
    names: list[str] = Field(
        default_factory=list,
        description="For `method`: tensors with the range of `mse`. For `float`: layers left unquantized, as globs "
        "over nodes.",
    )


class Tuning(_Model):
    """Tuning of INT8, on images that are used neither to calibrate nor to verify."""

    images: int
    steps: list[TuningStep]

    @property
    def equalized(self) -> str:
        """Name of the equalization that was chosen, see `int8.equalize.equalize_as`; `names.OFF` for none."""
        found = OFF
        for step in self.steps:
            if step.name == "equalize":
                found = step.chosen
            elif step.name == "relu6" and step.chosen != OFF:
                found = APPROXIMATE
        return found


class AimStep(_Model):
    """A number of layers in float that was tried on the way to an aim."""

    layers: int
    added_ms: float | None = Field(description="See `Aim.added_ms`.")
    value: float = Field(description="The metric on the select images.")


class Aim(_Model):
    """An accuracy that was asked for by `--aim`, and the layers that were left float for it."""

    metric: str
    value: float
    layers: list[str] = Field(description="Names of nodes that are float for it.")
    modules: list[str] = Field(description="Their modules, for `--keep-float` of INT8.")
    reached: bool = Field(description="Whether it was reached on the select images.")
    select: float = Field(
        description="The metric on the select images with these layers in float; an SQNR less a margin."
    )
    images: int = Field(description="Number of select images.")
    ms: float | None = Field(
        default=None,
        description="Time of the engine without these layers in float, in ms for one image on one thread; null if the "
        "target cannot tell.",
    )
    fp32_ms: float | None = Field(default=None, description="Time of the FP32 graph, measured alike.")
    added_ms: float | None = Field(
        description="Time that the engine takes longer with these layers in float."
    )
    added_bytes: int = Field(description="Growth of the engine's graph.")
    tried: list[AimStep] = Field(description="What was tried, by number of layers.")

    def ms_with(self, step: Aim | AimStep) -> float | None:
        """Time of the engine with the layers of a step in float, in milliseconds; None if it is not known."""
        return None if self.ms is None or step.added_ms is None else self.ms + step.added_ms

    @property
    def slower_than_fp32(self) -> bool:
        """Whether the engine with these layers in float was slower than FP32."""
        ms = self.ms_with(self)
        return ms is not None and self.fp32_ms is not None and ms > self.fp32_ms

    @property
    def curve(self) -> list[AimStep]:
        """Accuracy over speed: what was tried, from the cheapest on, without what costs more than a better one."""
        up = Limit(self.metric, self.value).at_least
        found: list[AimStep] = []
        for step in sorted(self.tried, key=lambda step: (step.added_ms or 0.0, step.layers)):
            if not found or (step.value > found[-1].value if up else step.value < found[-1].value):
                found.append(step)
        return found


class Engine(_Model):
    name: str = Field(description="`<target>-<precision>`.")
    target: str = Field(json_schema_extra={"enum": list(TARGETS)})
    precision: str = Field(json_schema_extra={"enum": list(PRECISIONS)})
    file: File
    external_data: list[File] = Field(description="Files with the engine's weights, if they exceed 2 GiB.")
    graph: File | None = Field(
        description="The precision graph that TensorRT compiled; null for ONNX Runtime."
    )
    plan: Plan | None = Field(description="For TensorRT only; otherwise null.")
    timing_cache: File | None = Field(
        description="Kernel timings that the engine was built with, for `--timing-cache`. For `tensorrt` only."
    )
    graph_external_data: list[File] = Field(
        description="Files with the weights of `graph`, if they exceed 2 GiB."
    )
    tuning: Tuning | None = Field(description="For INT8 only, if any choice was tried; otherwise null.")
    state: State
    built_by: dict[str, str] = Field(description="Library versions that built it.")
    instruction_set: str = Field(description="Instruction set of the machine that verified the engine.")
    gate: Gate
    latency: Latency | None
    float_for_speed: FloatForSpeed | None = Field(
        default=None,
        description="For INT8 of ONNX Runtime only; otherwise, and in bundles of earlier versions, null.",
    )
    aim: Aim | None = Field(default=None, description="For INT8 and FP16 with `--aim`; otherwise null.")
    saturating_cpu_session: dict[str, str] | None = Field(
        default=None,
        description="Session configuration of ONNX Runtime that the engine needs on CPUs where sums of uint8 x int8 "
        "products saturate (x86-64 without VNNI). Empty if the engine cannot saturate. Null for TensorRT, and for "
        "bundles of earlier versions, whose INT8 engines need `session.x64quantprecision` = `1` on such CPUs.",
    )

    @field_validator("saturating_cpu_session")
    @classmethod
    def _of_sessions(cls, entries: dict[str, str] | None) -> dict[str, str] | None:
        for key in entries or {}:
            # Some entries name files that ONNX Runtime writes: a manifest must not choose those.
            if not key.startswith("session.") or "file" in key or "path" in key:
                raise ValueError(f"{key!r} is a session configuration that a manifest may not set")
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
                f"{self.name}: a compiled engine needs a plan and a precision graph; others must have neither"
            )
        if compiled and self.file.path.endswith(".onnx"):
            raise ValueError(f"{self.name}: {self.file.path} is not an engine of {self.target}")
        reached = state_after(self.gate)
        if STATES.index(self.state) > STATES.index(reached):
            raise ValueError(f"{self.name} is called {self.state}, its gate makes it {reached}")
        return self

    def session_where_saturating(self) -> dict[str, str]:
        """Session configuration that ONNX Runtime needs on CPUs where sums of INT8 saturate.

        Older bundles do not contain it; it is derived from the precision there.
        """
        if self.saturating_cpu_session is not None:
            return self.saturating_cpu_session
        return {"session.x64quantprecision": "1"} if PRECISIONS[self.precision].integer_sums else {}

    def kept_float(self, recipe: Recipe) -> list[str]:
        """Patterns of the layers that INT8 leaves unquantized: asked for, chosen by tuning, faster, or for an aim."""
        steps = self.tuning.steps if self.tuning is not None else []
        chosen = [name for step in steps if step.name == "float" for name in step.names]
        fast = [escape(name) for name in self.float_for_speed.layers] if self.float_for_speed else []
        aimed = [escape(name) for name in self.aim.layers] if self.aim is not None else []
        return [*recipe.keep_float, *fast, *chosen, *aimed]

    def precision_graph(self) -> tuple[File, list[File]]:
        """The ONNX file that the engine is, or was built from, and the files with its weights, if they exceed 2 GiB."""
        return (self.graph, self.graph_external_data) if self.graph else (self.file, self.external_data)

    @property
    def without_weights(self) -> bool:
        """Whether the engine's file has no weights. Then the weights come from its graph."""
        return self.plan is not None and self.plan.strip_weights

    @property
    def size_bytes(self) -> int:
        """Size of the engine with its weights, in bytes."""
        return self.file.size_bytes + sum(file.size_bytes for file in self.external_data)


class _HeldOutImages(_Model):
    inputs: File = Field(
        description="NumPy .npy, uint8 [N, H, W, C] after resize and crop; float32 "
        "if the preprocessing has mode `bands` or a scale other than 255."
    )
    logits: File = Field(
        description="NumPy .npy, float32 [N, classes], eager PyTorch FP32. Dense logits are [N, classes, h, w], with "
        "at most 64 rows and columns, or [N, tokens, classes], with at most 64 tokens, spread evenly."
    )
    further: list[File] = Field(default=[], description="Files like `logits`, one for each further output.")
    count: int

    def files(self) -> list[File]:
        return [self.inputs, self.logits, *self.further]


class HeldOutSize(_HeldOutImages):
    """The first held-out inputs at another size. The preprocessing is the same; the resize is scaled in proportion."""

    height: int
    width: int


class HeldOutPatterns(_HeldOutImages):
    """Test patterns: even and extreme images, which are unlike the images that were calibrated on."""

    names: list[str]

    @model_validator(mode="after")
    def _named(self) -> HeldOutPatterns:
        if len(self.names) != self.count:
            raise ValueError(f"{self.count} test patterns, {len(self.names)} names")
        return self


class HeldOut(_HeldOutImages):
    """Inputs that were never used to calibrate, and their eager logits: the reference on machines without PyTorch."""

    synthetic: bool = Field(
        description="Whether the images are seeded synthetic images, because no folder was given."
    )
    labels: list[int] | None
    image_sha256: list[str] = Field(description="SHA-256 of the image files, in order; empty if synthetic.")
    sizes: list[HeldOutSize] = Field(
        default=[], description="Held-out images at further sizes, if height and width are dynamic."
    )
    patterns: HeldOutPatterns | None = Field(
        default=None, description="Test patterns; null in bundles of earlier versions."
    )

    def parts(self) -> list[_HeldOutImages]:
        """These images, those of further sizes and the test patterns."""
        return [self, *self.sizes, *([self.patterns] if self.patterns is not None else [])]


class Refused(_Model):
    """An engine that was asked for and could not be built."""

    name: str = Field(description="`<target>-<precision>`.")
    reason: str


class Artifacts(_Model):
    created: str = Field(description="Time of creation, UTC, ISO 8601.")
    engines: list[Engine] = Field(min_length=1)
    refused: list[Refused] = Field(
        default=[], description="Engines that were asked for and that their target refused to build."
    )
    held_out: HeldOut

    @model_validator(mode="after")
    def _each_once(self) -> Artifacts:
        names = [engine.name for engine in self.engines]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"an engine is there twice: {', '.join(twice)}")
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
        description="`failed` if a gate failed or a required state was not reached. Do not serve a failed bundle."
    )
    warnings: list[str]
    recipe: Recipe
    artifacts: Artifacts
    _unknown: tuple[str, ...] = PrivateAttr(default=())

    @classmethod
    def of(cls, document: dict[str, Any]) -> Manifest:
        """Make a manifest from JSON, without the engines whose target or precision this version does not know.

        Raises:
            ValidationError: `document` is not a valid manifest.
            NoKnownEngineError: this version knows none of the engines.
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
        """Names of engines that a later version made and that this version leaves out."""
        return self._unknown

    @model_validator(mode="after")
    def _outputs_held_out(self) -> Manifest:
        held = self.artifacts.held_out
        counts = {len(part.further) for part in held.parts()}
        if counts != {len(self.recipe.further_outputs)}:
            raise ValueError("the held-out logits do not match the outputs")
        return self

    @model_validator(mode="after")
    def _compared_at_all_sizes(self) -> Manifest:
        sizes = self.recipe.input_size
        held = {(part.height, part.width) for part in self.artifacts.held_out.sizes}
        wanted = {sizes.min, sizes.max} - {sizes.opt} if sizes is not None else set()
        if not wanted <= held:
            raise ValueError("held-out images of the smallest or the largest size are missing")
        if held and (sizes is None or not all(sizes.holds(*size) for size in held)):
            raise ValueError("held-out images have sizes outside the range")
        return self

    def files(self) -> list[File]:
        """All files of the bundle, each once."""
        recipe, artifacts = self.recipe, self.artifacts
        files = [recipe.graph, *recipe.external_data]
        for engine in artifacts.engines:
            files += [engine.file, *engine.external_data, *engine.graph_external_data]
            files += [file for file in (engine.graph, engine.timing_cache) if file is not None]
        for part in artifacts.held_out.parts():
            files += part.files()
        if recipe.calibration is not None:
            files.append(recipe.calibration.ranges)
        return list({file.path: file for file in files}.values())


class HostFigures(_Model):
    """Results of an engine, on the same images, on the machine that emulated another CPU."""

    sqnr: float | None = Field(description="SQNR against eager PyTorch, in dB.")
    max_difference: float = Field(
        description="Largest difference between the logits of both CPUs; 0 means equal to the bit."
    )


class Emulation(_Model):
    """The CPU that qemu-user emulated for an attestation."""

    cpu: str = Field(description="Name of the CPU, as in `--cpu`.")
    saturates: bool = Field(
        description="Whether ONNX Runtime's sums of uint8 x int8 products saturate on this CPU."
    )
    host: dict[str, HostFigures] = Field(description="Results on the emulating machine, by engine.")


class Attestation(_Model):
    """Results of `verify` on one machine, written to the bundle's attestations/ folder."""

    schema_version: Literal[1]
    manifest_sha256: str
    created: str
    machine: str
    instruction_set: str
    compute_capability: str | None = Field(
        description="Compute capability of the first CUDA device; null without one."
    )
    versions: dict[str, str]
    status: Literal["ok", "failed"]
    warnings: list[str]
    engines: dict[str, Gate]
    states: dict[str, State] = Field(description="State of each engine; empty for an emulated CPU.")
    latencies: dict[str, Latency] = Field(
        default={}, description="Latency of each engine that ran; empty for an emulated CPU."
    )
    emulation: Emulation | None = Field(
        default=None, description="Null if `verify` ran on the machine's own CPU."
    )


def json_schema() -> dict[str, Any]:
    """The manifest's JSON Schema (draft 2020-12)."""
    schema = Manifest.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def main() -> None:
    """Print the schema: `python -m export_zoo.engines.bundle.manifest > docs/manifest.schema.json`."""
    print(json.dumps(json_schema(), indent=2))


if __name__ == "__main__":
    main()
