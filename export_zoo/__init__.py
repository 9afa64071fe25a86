"""Export zoo models to engines whose logits were compared with eager PyTorch.

    result = export_zoo.export(export_zoo.ExportOptions(model="resnet50", precisions=("int8",), calib=Path("imgs")))
    engine = export_zoo.load(result.bundle)

`load` and `verify` need no PyTorch. Everything is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from export_zoo.base.package import __version__

if TYPE_CHECKING:
    from export_zoo.base.errors import ExportZooError
    from export_zoo.engines.bundle.loading import LoadedEngine, load
    from export_zoo.engines.verification.verify import verify
    from export_zoo.exporter.calibrate import calibrate
    from export_zoo.exporter.options import BatchRange, ExportOptions, SizeRange
    from export_zoo.exporter.pipeline import ExportResult, export

__all__ = [
    "BatchRange",
    "ExportOptions",
    "ExportResult",
    "ExportZooError",
    "LoadedEngine",
    "SizeRange",
    "__version__",
    "calibrate",
    "export",
    "load",
    "verify",
]

_MODULES = {
    "BatchRange": "export_zoo.exporter.options",
    "ExportOptions": "export_zoo.exporter.options",
    "ExportResult": "export_zoo.exporter.pipeline",
    "ExportZooError": "export_zoo.base.errors",
    "LoadedEngine": "export_zoo.engines.bundle.loading",
    "SizeRange": "export_zoo.exporter.options",
    "calibrate": "export_zoo.exporter.calibrate",
    "export": "export_zoo.exporter.pipeline",
    "load": "export_zoo.engines.bundle.loading",
    "verify": "export_zoo.engines.verification.verify",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
