"""What a run exports: the one description of a network that all sources resolve to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from export_zoo.calibration.preprocess import Preprocess
from export_zoo.engines.bundle.manifest import WeightsKind, ZooName
from export_zoo.exporter.models.weights.state_dicts import Reading
from export_zoo.exporter.models.weights.weights_files import ChosenWeights
from export_zoo.exporter.options import ExportOptions, SizeRange


@dataclass(frozen=True)
class Output:
    """An output of the network. `shape` is that of one image: [classes] or [classes, height, width]."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelSpec:
    """Everything that decides what a model computes: the cache key of all that follows."""

    zoo: ZooName
    name: str
    weights_kind: WeightsKind
    weights_name: str
    weights_sha256: str
    weights_path: Path | None
    init_missing: tuple[str, ...]
    model_args: tuple[tuple[str, str], ...]
    """Of the model's function, as they were written."""
    reading: Reading
    seed: int
    preprocess: Preprocess
    labels: tuple[str, ...]
    outputs: tuple[Output, ...]
    transform_input: bool | None = None
    fully_convolutional: bool = False
    sizes: SizeRange | None = None
    """Of --dynamic-size; its OPT is what `preprocess` crops to."""
    factory: str = ""
    """The user's own: `FILE.py:FUNCTION` or `package.module:FUNCTION`."""
    factory_path: str = ""
    """The same file or module, wherever it lies."""
    num_classes_given: int | None = None
    """Of --num-classes, for a function that need not take it."""
    notes: tuple[str, ...] = ()
    """To be warned of."""
    version: str = ""
    """Of the library that the model's code comes from, or what else tells one code from another."""

    @classmethod
    def of(
        cls,
        options: ExportOptions,
        *,
        zoo: ZooName,
        name: str,
        weights: ChosenWeights,
        preprocess: Preprocess,
        labels: tuple[str, ...],
        outputs: tuple[Output, ...],
        **more: Any,
    ) -> ModelSpec:
        """What a source found, and what the options say."""
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
        """Of the first output."""
        return self.outputs[0].shape[0]

    @property
    def dense(self) -> bool:
        """Logits for each pixel: segmentation."""
        return len(self.outputs[0].shape) > 1

    def key(self) -> dict[str, Any]:
        """Hashable identity: where files lie does not count, nor do the labels."""
        left_out = ("weights_path", "labels", "preprocess", "factory_path", "notes")
        fields = {k: v for k, v in asdict(self).items() if k not in left_out}
        return {**fields, "preprocess": self.preprocess.figures()}
