"""The ranges file: activation ranges and histograms with their provenance.

Any method can choose ranges from it, and shards can be merged.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from export_zoo.base.errors import BadInputError, first_of
from export_zoo.calibration.histogram import Histogram
from export_zoo.calibration.preprocess import Preprocess


def encode_magnitudes(magnitudes: npt.NDArray[np.float32]) -> str:
    """`TensorRange.channels` of largest magnitudes, float32 [C]."""
    return base64.b64encode(magnitudes.astype("<f4").tobytes()).decode()


class TensorRange(BaseModel):
    """Range of one activation tensor over all calibration images, in the tensor's own units."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    min: float
    max: float
    module: str = ""
    widest: str = Field(
        "", description="SHA-256 of the image with the largest magnitude; empty if not known."
    )
    others: float = Field(0.0, description="Largest magnitude on all other images.")
    histogram: str = Field("", description="See `calibration.histogram`; empty where none was collected.")
    channels: str = Field(
        "",
        description="Largest magnitude of each channel of [N, C, H, W] or [N, C]: base64 of float32; empty for other "
        "tensors.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> TensorRange:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        if self.histogram:
            Histogram.decode(self.histogram)
        if len(base64.b64decode(self.channels, validate=True)) % 4:
            raise ValueError("channels: not float32")
        return self

    def magnitudes(self) -> npt.NDArray[np.float32]:
        """Largest magnitude of each channel, float32 [C]; empty where they are not known."""
        return np.frombuffer(base64.b64decode(self.channels), "<f4").astype(np.float32)

    def merged(self, other: TensorRange) -> TensorRange:
        """The range over both sets of images."""
        first, second = sorted((self, other), key=lambda t: (max(-t.min, t.max), t.widest), reverse=True)
        histogram = ""
        if self.histogram and other.histogram:
            histogram = Histogram.decode(self.histogram).merged(Histogram.decode(other.histogram)).encode()
        mine, others = self.magnitudes(), other.magnitudes()
        return TensorRange(
            min=min(self.min, other.min),
            max=max(self.max, other.max),
            module=self.module,
            widest=first.widest,
            others=max(first.others, -second.min, second.max),
            histogram=histogram,
            channels=encode_magnitudes(np.maximum(mine, others)) if mine.shape == others.shape else "",
        )


class Ranges(BaseModel):
    """Activation ranges of one graph, tied to the graph and the images that they come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    graph_sha256: str
    preprocess: Preprocess
    image_sha256: list[str] = Field(description="Hashes of the images that were used, sorted; at least one.")
    unreadable: list[str] = Field(description="Names of images that could not be decoded.")
    instruction_set: str
    versions: dict[str, str]
    tensors: dict[str, TensorRange]

    def write(self, path: Path) -> None:
        """Write as JSON with one tensor per line; floats are exact (shortest round-trip)."""
        document = self.model_dump()
        tensors = document.pop("tensors")
        head = json.dumps(document, indent=1, sort_keys=True)
        lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(tensors[k])}" for k in sorted(tensors))
        path.write_text(head[:-2] + ',\n "tensors": {\n' + lines + "\n }\n}\n", encoding="utf-8")

    def digest(self) -> str:
        """Hex SHA-256 of all fields."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def merged(self, other: Ranges) -> Ranges:
        """Ranges over both sets of images: the same bits as one calibration on all of them.

        Raises:
            BadInputError: the graph, preprocessing, instruction set, library versions or tensors differ, or some
                images are in both sets.
        """
        for what in ("graph_sha256", "preprocess", "instruction_set", "versions"):
            have, want = getattr(self, what), getattr(other, what)
            same = have.figures() == want.figures() if isinstance(have, Preprocess) else have == want
            if not same:
                raise BadInputError(
                    f"ranges cannot be merged: {what} differs",
                    hint="calibrate all shards with the same graph, preprocessing, machine and library versions",
                )
        if self.tensors.keys() != other.tensors.keys():
            raise BadInputError(
                "ranges cannot be merged: the tensor sets differ",
                hint="calibrate all shards with the same options",
            )
        if shared := set(self.image_sha256) & set(other.image_sha256):
            raise BadInputError(
                f"ranges cannot be merged: {len(shared)} images are in both, and would count twice",
                hint="divide the images among the shards",
            )
        return self.model_copy(
            update={
                "image_sha256": sorted(self.image_sha256 + other.image_sha256),
                "unreadable": sorted(self.unreadable + other.unreadable),
                "tensors": {name: found.merged(other.tensors[name]) for name, found in self.tensors.items()},
            }
        )

    @classmethod
    def read(cls, path: Path) -> Ranges:
        """Read a ranges file; raises BadInputError if the file is not one."""
        again = "run `export-zoo calibrate` again"
        try:
            found = cls.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise BadInputError(f"{path}: the ranges cannot be read: {error.strerror}", hint=again) from error
        except UnicodeDecodeError as error:
            raise BadInputError(f"{path}: not a ranges file: it is not UTF-8 text", hint=again) from error
        except ValidationError as error:
            raise BadInputError(f"{path}: not a ranges file: {first_of(error)}", hint=again) from error
        if not found.image_sha256 or len(set(found.image_sha256)) < len(found.image_sha256):
            raise BadInputError(
                f"{path}: lists no images, or one of them twice; it may have been edited by hand", hint=again
            )
        return found
