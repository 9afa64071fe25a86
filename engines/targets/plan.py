"""A compiled engine: its properties, and the files that a target wrote."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field


class Plan(BaseModel):
    """Properties of a compiled TensorRT engine."""

    # A later version of the manifest's schema may add fields.
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    version: str = Field(description="Version of the TensorRT (RTX) that built the engine.")
    compute_capabilities: list[str] = Field(
        description="Compute capabilities that it was built for, for example `8.9`."
    )
    hardware_compatible: bool
    version_compatible: bool
    refittable: bool
    strip_weights: bool
    workspace_mb: int | None


@dataclass(frozen=True)
class Compiled:
    """The result of compiling an engine. File names are relative to the folder that was given to `Target.build`."""

    file: str
    """Name of the engine's file."""
    plan: Plan
    warnings: dict[str, int]
    """Warnings of the builder, with their number."""
    timing_cache: str | None = None
    """Name of the file with the kernel timings that the builder used."""
