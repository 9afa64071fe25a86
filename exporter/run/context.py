"""Context of one run, shared by its stages: options, the reporter, the cache and the library versions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export_zoo.base.machine import library_versions
from export_zoo.exporter.options import ExportOptions
from export_zoo.exporter.run.cache import StageCache, code_digest
from export_zoo.exporter.run.report import Reporter

LIBRARIES = (
    "torch torchvision onnx onnxscript onnx_ir onnxsim onnxruntime numpy pillow pydantic safetensors".split()
)

IMAGE_BATCH = 8
"""Images decoded and run at a time if no option sets a batch size. It bounds memory and does not affect results."""


@dataclass(frozen=True)
class Context:
    """Context of one run, passed to every stage."""

    options: ExportOptions
    reporter: Reporter
    cache: StageCache
    versions: dict[str, str] = field(default_factory=lambda: library_versions(*LIBRARIES))

    def key(self, *libraries: str, **parts: Any) -> dict[str, Any]:
        """A stage's cache key: its parts, our code, and the versions of the libraries that do the work."""
        return {"code": code_digest(), "libraries": {n: self.versions[n] for n in libraries}, **parts}

    def warn_unreadable(self, folder: Path | None, unreadable: Sequence[Sequence[str]]) -> None:
        """Warn about each image that was left out, given as (name, reason)."""
        for name, reason in unreadable:
            self.reporter.warn(f"{folder}: {name} cannot be read and is left out: {reason}")
