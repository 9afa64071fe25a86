"""The preprocessing of a run, from a file or from the model zoo, at the sizes that the options set."""

from __future__ import annotations

import json
import math
from pathlib import Path

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from export_zoo.base import yaml_text
from export_zoo.base.errors import BadInputError, first_of
from export_zoo.calibration.preprocess import Preprocess
from export_zoo.exporter.options import ExportOptions


class PreprocessFile(Preprocess):
    """Content of a `--preprocess` file, as JSON or YAML."""

    source: str = Field(default="", description="Where the parameters come from. Default: the file's name.")
    labels: list[str] = Field(default=[], description="Class names by index, one for each class.")

    @field_validator("mean", "std")
    @classmethod
    def _usable(cls, values: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        mean = info.field_name == "mean"
        if not all(math.isfinite(value) and (-1 <= value <= 1 if mean else value > 0) for value in values):
            raise ValueError(
                "must be on the 0..1 scale, where `scale` counts as 1" if mean else "must be greater than 0"
            )
        return values


def read_preprocess(path: Path) -> tuple[Preprocess, tuple[str, ...]]:
    """Read the preprocessing and the class names of a `--preprocess` file.

    Raises:
        BadInputError: the file is not valid; the message names the key.
    """
    hint = "see docs/usage.md, `--preprocess`"
    try:
        document = yaml_text.load(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise BadInputError(f"--preprocess {path}: not a mapping of keys to values", hint=hint)
        found = PreprocessFile.model_validate(document)
    except OSError as error:
        raise BadInputError(f"--preprocess {path}: cannot be read: {error.strerror}", hint=hint) from error
    except ValidationError as error:
        raise BadInputError(f"--preprocess {path}: {first_of(error)}", hint=hint) from error
    except (yaml_text.YAMLError, UnicodeDecodeError) as error:
        raise BadInputError(
            f"--preprocess {path}: neither JSON nor YAML: {' '.join(str(error).split())}", hint=hint
        ) from error
    source = found.source or path.name
    fields = found.model_dump(exclude={"labels"})
    return Preprocess.model_validate({**fields, "source": source}), tuple(found.labels)


def resized(preprocess: Preprocess, options: ExportOptions) -> Preprocess:
    """Apply --input-size (or OPT of --dynamic-size) and --resize-size.

    Without --resize-size, the resize keeps its proportion to the crop.
    """
    changed = preprocess
    if options.crop_size is not None:
        changed = changed.at_size(*options.crop_size)
    if options.resize_size is not None:
        changed = changed.model_copy(update={"resize_size": options.resize_size})
    if options.crop_size is None and options.resize_size is None:
        return preprocess
    return changed.model_copy(update={"source": f"{preprocess.source}, sizes from options"})


def main() -> None:
    """Print the schema: `python -m export_zoo.exporter.models.preprocessing > docs/preprocess.schema.json`."""
    schema = PreprocessFile.model_json_schema()
    print(json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2))


if __name__ == "__main__":
    main()
