"""The ranges file: what calibration found, with its provenance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from calibration.errors import BadInputError
from calibration.preprocess import Preprocess


class TensorRange(BaseModel):
    """Range of one activation tensor over all calibration images, in the tensor's own units."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    min: float
    max: float
    module: str = ""

    @model_validator(mode="after")
    def _ordered(self) -> TensorRange:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class Ranges(BaseModel):
    """Activation ranges of one graph, tied to the graph and the images that they come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    method: Literal["minmax"]
    graph_sha256: str
    preprocess: Preprocess
    image_sha256: list[str] = Field(description="Hashes of the images that were used, sorted.")
    unreadable: list[str] = Field(description="Names of images that could not be decoded.")
    instruction_set: str
    versions: dict[str, str]
    tensors: dict[str, TensorRange]

    def write(self, path: Path) -> None:
        """Write as JSON with one tensor a line; floats are exact (shortest round-trip)."""
        document = self.model_dump()
        tensors = document.pop("tensors")
        head = json.dumps(document, indent=1, sort_keys=True)
        lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(tensors[k])}" for k in sorted(tensors))
        path.write_text(head[:-2] + ',\n "tensors": {\n' + lines + "\n }\n}\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Ranges:
        """Raises BadInputError when the file is not a ranges file."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (ValidationError, OSError, UnicodeDecodeError) as error:
            raise BadInputError(
                f"{path}: not a ranges file: {error}", hint="run the calibration again"
            ) from error
