"""Memory that cells are expected to take, before any run has measured it."""

from __future__ import annotations

from export_zoo.base.errors import ExportZooError
from export_zoo.exporter.options import ExportOptions


def expected_memory(options: ExportOptions) -> int:
    """Bytes that an export is expected to take. Builds the network without its weights: it takes a second or more."""
    from export_zoo.exporter.models import memory, zoo

    try:
        return zoo.expected_memory(zoo.resolve(options), options) or memory.UNKNOWN
    except ExportZooError:  # its cell tells it
        return memory.UNKNOWN
