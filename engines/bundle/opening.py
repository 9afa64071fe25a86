"""How an engine of a bundle is opened."""

from __future__ import annotations

from pathlib import Path

from export_zoo.engines.bundle.manifest import Engine
from export_zoo.engines.precision.registry import PRECISIONS
from export_zoo.engines.targets.base import Opening
from export_zoo.engines.targets.registry import TARGETS


def why_not_run(engine: Engine) -> str:
    """Why an engine cannot run on this machine, judged by its description alone; empty if it can."""
    return TARGETS[engine.target].why_not_run(PRECISIONS[engine.precision], engine.plan)


def opening_of(bundle: Path, engine: Engine, *, threads: int = 0) -> Opening:
    """The file and the options for opening an engine. Checks nothing.

    Args:
        threads: number of threads; 0 for all cores.
    """
    return Opening(
        bundle / engine.file.path,
        PRECISIONS[engine.precision],
        engine.plan,
        bundle / (engine.graph or engine.file).path,
        threads=threads,
        saturating_session=engine.session_where_saturating(),
    )
