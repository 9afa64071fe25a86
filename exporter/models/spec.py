"""Description of the network that a run exports. All model sources resolve to it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from export_zoo.base.errors import UsageError
from export_zoo.calibration.preprocess import Preprocess
from export_zoo.engines.parity.tasks import Head, classes_of, why_not
from export_zoo.exporter.models.weights.state_dicts import Reading
from export_zoo.exporter.models.weights.weights_files import ChosenWeights
from export_zoo.exporter.option_values import SizeRange
from export_zoo.exporter.options import ExportOptions


@dataclass(frozen=True)
class Output:
    """An output of the network.

    `shape` is that of one image: [], [classes], [tokens, classes] or [classes, height, width].
    """

    name: str
    shape: tuple[int, ...]
    task: str = "classification"
    """Meaning of the values; see `parity.tasks`."""
    scores: str = "logits"
    probabilities: bool = False
    """Whether all values were in [0, 1] when the network was probed."""

    @property
    def head(self) -> Head:
        return Head(self.task, self.scores, classes_of(self.shape))

    def with_task(self, task: str) -> Output:
        """The output with the task that the user gave.

        Raises:
            UsageError: the output cannot have that task.
        """
        if reason := why_not(task, self.shape):
            raise UsageError(
                f"--task {task}: output {self.name!r} is {['N', *self.shape]}".replace("'N'", "N")
                + f": {reason}",
                hint="choose another task, or leave it out",
            )
        values = task in ("regression", "embedding")
        scores = "values" if values else "probabilities" if self.probabilities else "logits"
        return replace(self, task=task, scores=scores)


@dataclass(frozen=True)
class ModelSpec:
    """Everything that determines what a model computes. The cache keys of all later stages depend on it."""

    zoo: str
    name: str
    weights_kind: str
    weights_name: str
    weights_sha256: str
    weights_path: Path | None
    init_missing: tuple[str, ...]
    model_args: tuple[tuple[str, str], ...]
    """Arguments of the model's function, as written on the command line."""
    reading: Reading
    seed: int
    preprocess: Preprocess
    labels: tuple[str, ...]
    outputs: tuple[Output, ...]
    transform_input: bool | None = None
    fully_convolutional: bool = False
    sizes: SizeRange | None = None
    """Size range of --dynamic-size. `preprocess` crops to its OPT."""
    factory: str = ""
    """The user's factory: `FILE.py:FUNCTION` or `package.module:FUNCTION`."""
    factory_path: str = ""
    """The same file or module, with the path as given."""
    num_classes_given: int | None = None
    """Value of --num-classes, if given. A function need not take it."""
    notes: tuple[str, ...] = ()
    """Warnings to print."""
    version: str = ""
    """Version of the library that the model's code comes from, or another string that identifies the code."""

    @classmethod
    def of(
        cls,
        options: ExportOptions,
        *,
        zoo: str,
        name: str,
        weights: ChosenWeights,
        preprocess: Preprocess,
        labels: tuple[str, ...],
        outputs: tuple[Output, ...],
        **more: Any,
    ) -> ModelSpec:
        """A spec of what a source found and what the options say.

        Raises:
            UsageError: the first output cannot have the task of --task.
        """
        if options.task is not None:
            outputs = (outputs[0].with_task(options.task), *outputs[1:])
        return cls(
            zoo=zoo,
            name=name,
            weights_kind=weights.kind,
            weights_name=weights.name,
            weights_sha256=weights.sha256,
            weights_path=weights.path,
            init_missing=options.init_missing,
            model_args=options.model_args,
            reading=Reading.of(options),
            seed=options.seed,
            preprocess=preprocess,
            labels=labels,
            outputs=outputs,
            fully_convolutional=options.fully_convolutional,
            sizes=options.dynamic_size,
            num_classes_given=options.num_classes,
            **more,
        )

    @property
    def num_classes(self) -> int:
        """Number of classes, quantities or features of the first output."""
        return self.outputs[0].head.classes

    @property
    def head(self) -> Head:
        """Meaning of the first output."""
        return self.outputs[0].head

    @property
    def dense(self) -> bool:
        """Whether the first output has values per pixel or token."""
        return len(self.outputs[0].shape) > 1

    def key(self) -> dict[str, Any]:
        """Identity to hash for cache keys, without file locations, labels, notes and the meaning of outputs."""
        left_out = ("weights_path", "labels", "preprocess", "factory_path", "notes")
        fields = {k: v for k, v in asdict(self).items() if k not in left_out}
        fields["outputs"] = [(output.name, output.shape) for output in self.outputs]
        return {**fields, "preprocess": self.preprocess.figures()}
