"""Top floor: zoo model -> graph, the pipeline that runs the stages, bundles and the command line.

`from exporter import ExportOptions, export_zoo` is the Python API; it imports PyTorch only when it runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from exporter.options import ExportOptions
    from exporter.pipeline import ExportResult, export_zoo

__all__ = ["ExportOptions", "ExportResult", "__version__", "export_zoo"]


def __getattr__(name: str) -> object:
    if name == "ExportOptions":
        from exporter.options import ExportOptions

        return ExportOptions
    if name in ("ExportResult", "export_zoo"):
        import exporter.pipeline

        return getattr(exporter.pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
