"""Layers that INT8 leaves float because that is faster: what a target says and a manifest records."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class FloatForSpeed(BaseModel):
    """Layers that INT8 leaves float because that is faster."""

    # A later version of the manifest's schema may add fields.
    model_config = ConfigDict(frozen=True, extra="ignore")

    layers: tuple[str, ...] = Field(description="Names of nodes.")
    costs_sha256: str = Field(description="SHA-256 of the cost file that says so, for `--costs`.")
