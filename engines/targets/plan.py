"""Facts of a compiled engine."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Plan(BaseModel):
    """What a TensorRT engine runs with."""

    # A later version of the manifest's schema may add fields.
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    version: str = Field(description="Of the TensorRT (RTX) that built it.")
    compute_capabilities: list[str] = Field(description="GPUs that it was built for, `8.9` say.")
    hardware_compatible: bool
    version_compatible: bool
    refittable: bool
    strip_weights: bool
    workspace_mb: int | None
