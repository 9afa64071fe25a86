"""Options of engine builders."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path

from export_zoo.base.errors import UsageError

MAX_WORKSPACE_MB = 1 << 20

CURRENT = "current"
"""Stands for the compute capability of this machine's GPU, whatever TensorRT-RTX calls it."""


@dataclass(frozen=True)
class BuildOptions:
    """How TensorRT builds an engine. By default, each option is off or has TensorRT's default.

    `workspace_mb` limits the scratch memory that layers may use on the device, in MiB. `hardware_compatible` (GPUs from
    Ampere on) and `version_compatible` are for `tensorrt` only. `compute_capabilities` ("8.9", or "current" for this
    machine's GPU) is for `tensorrt-rtx` only. `tensorrt-rtx` can build for GPUs that this machine does not have, but it
    needs a GPU to refit or strip weights. `timing_cache` is a file of an earlier bundle, for `tensorrt` only. Kernels
    in it are not timed again, so that the same kernels are chosen.
    """

    workspace_mb: int | None = field(default=None, metadata={"flag": "--workspace"})
    hardware_compatible: bool = field(default=False, metadata={"flag": "--hardware-compatible"})
    version_compatible: bool = field(default=False, metadata={"flag": "--version-compatible"})
    refittable: bool = field(default=False, metadata={"flag": "--refittable"})
    strip_weights: bool = field(default=False, metadata={"flag": "--strip-weights"})
    compute_capabilities: tuple[str, ...] = field(default=(), metadata={"flag": "--compute-capability"})
    timing_cache: Path | None = field(default=None, metadata={"flag": "--timing-cache"})

    def __post_init__(self) -> None:
        if self.workspace_mb is not None and not 1 <= self.workspace_mb <= MAX_WORKSPACE_MB:
            raise UsageError(
                f"--workspace {self.workspace_mb}: must be 1 to {MAX_WORKSPACE_MB} (MiB)", hint="leave it out"
            )
        for text in self.compute_capabilities:
            if text != CURRENT and not re.fullmatch(r"[1-9][0-9]?\.[0-9]", text):
                raise UsageError(
                    f"--compute-capability {text!r}: not MAJOR.MINOR",
                    hint="give for example 8.9, or `current` for the GPU of this machine",
                )
        if self.timing_cache is not None and not self.timing_cache.is_file():
            raise UsageError(
                f"--timing-cache {self.timing_cache}: no such file",
                hint="give the `.timing` file of an earlier bundle that has a tensorrt engine, or leave it out",
            )

    def given(self) -> dict[str, str]:
        """Flags of the options that were given, by field."""
        return {f.name: f.metadata["flag"] for f in fields(self) if getattr(self, f.name) != f.default}

    def only(self, names: Collection[str]) -> BuildOptions:
        """These options, with all others at their default."""
        return BuildOptions(**{name: getattr(self, name) for name in names})
