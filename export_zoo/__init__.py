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
    from export_zoo.engines.targets.options import BuildOptions
    from export_zoo.engines.verification.verify import verify
    from export_zoo.exporter.calibrate import calibrate
    from export_zoo.exporter.option_values import BatchRange, SizeRange, Tolerance
    from export_zoo.exporter.options import ExportOptions
    from export_zoo.exporter.pipeline import ExportResult, export

__all__ = [
    "BatchRange",
    "BuildOptions",
    "ExportOptions",
    "ExportResult",
    "ExportZooError",
    "LoadedEngine",
    "SizeRange",
    "Tolerance",
    "__version__",
    "calibrate",
    "export",
    "load",
    "verify",
]

_MODULES = {
    "BatchRange": "export_zoo.exporter.option_values",
    "BuildOptions": "export_zoo.engines.targets.options",
    "ExportOptions": "export_zoo.exporter.options",
    "ExportResult": "export_zoo.exporter.pipeline",
    "ExportZooError": "export_zoo.base.errors",
    "LoadedEngine": "export_zoo.engines.bundle.loading",
    "SizeRange": "export_zoo.exporter.option_values",
    "Tolerance": "export_zoo.exporter.option_values",
    "calibrate": "export_zoo.exporter.calibrate",
    "export": "export_zoo.exporter.pipeline",
    "load": "export_zoo.engines.bundle.loading",
    "verify": "export_zoo.engines.verification.verify",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("export_zoo"):
            raise
        message = f"export_zoo.{name} needs {error.name}: install export-zoo, not only export-zoo-runtime"
        raise ModuleNotFoundError(message, name=error.name) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
