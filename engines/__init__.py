"""Middle floor: graph + ranges -> precision graph -> engine; running it and comparing logits. Never imports torch.

`engines.load(bundle).run(batch)` is all that a Python service needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engines.loading import LoadedEngine, load

__all__ = ["LoadedEngine", "load"]


def __getattr__(name: str) -> object:
    # Lazy, so that the command line answers --help without loading ONNX Runtime.
    if name in __all__:
        import engines.loading

        return getattr(engines.loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
