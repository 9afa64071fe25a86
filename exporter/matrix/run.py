"""Run the cells of a matrix, each in its own process, and store their results in one folder."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeGuard

from export_zoo.base.errors import EnvironmentFailureError
from export_zoo.exporter.matrix import BUNDLES, RESULTS
from export_zoo.exporter.matrix.cell import Limits, inputs_on_cpu
from export_zoo.exporter.matrix.inputs import fingerprints
from export_zoo.exporter.matrix.machine import Machine
from export_zoo.exporter.matrix.place import Place
from export_zoo.exporter.matrix.plan import HOST, Cell, by_bundle
from export_zoo.exporter.matrix.results import CellResult, store, stored
from export_zoo.exporter.matrix.storage import Storage
from export_zoo.exporter.publish import failed_place
from export_zoo.exporter.run.at_once import run_at_once


def _is_current(
    result: CellResult | None, cell: Cell, inputs: dict[str, str] | None, place: Place
) -> TypeGuard[CellResult]:
    """Whether an earlier result is ok and has the same command line, versions and inputs."""
    return (
        result is not None
        and result.status == "ok"
        and result.command == tuple(cell.command())
        and result.versions in place.versions(cell)
        and result.inputs == inputs
    )


def left_out(cell: Cell, reason: str = "") -> CellResult:
    """The result of a cell that is not run: excluded with the file's reason, else skipped with `reason`."""
    return CellResult(
        cell.model,
        cell.target,
        cell.precision,
        tuple(cell.command()),
        "excluded" if cell.excluded else "skipped",
        cell.excluded or cell.skipped or reason,
        cpu=cell.cpu,
    )


def make_folders(out: Path) -> None:
    """Make the folders of --out. Raises EnvironmentFailureError if they cannot be made."""
    try:
        (out / RESULTS).mkdir(parents=True, exist_ok=True)
        (out / BUNDLES).mkdir(exist_ok=True)
    except OSError as error:
        raise EnvironmentFailureError(
            f"{out}: cannot be created: {error.strerror}", hint="give another --out"
        ) from error


def run(
    cells: Sequence[Cell],
    out: Path,
    *,
    seconds: float,
    memory: float | None = None,
    place: Place | None = None,
    expected: Callable[[Cell], int] = lambda cell: 0,
    again: bool = False,
    keep_bundles: bool = True,
    storage: Storage | None = None,
    done: Callable[[CellResult, bool], None] = lambda result, cached: None,
) -> list[CellResult]:
    """Run the cells, and return their results in the same order. A failing cell does not stop the others.

    Results lie in `out`/results, bundles in `out`/bundles. A cell is not run again if it has a result that is ok and
    has the same command line, versions and files. A cell of an emulated CPU follows the cell that exports its bundle.

    Args:
        seconds, memory: limits of a cell, see `Limits`.
        place: where cells run; by default on this machine, one after the other.
        expected: bytes of memory that a cell is expected to take; only asked if no earlier run measured it.
        again: run all cells again.
        keep_bundles: False to delete each bundle when its results are recorded.
        storage: results and bundles are copied there, too; results that are there count as those of an earlier run.
        done: called after each cell; the flag is True if the result of an earlier run was used.

    Raises:
        EnvironmentFailureError: `out` or the storage cannot be written to.
    """
    results, bundles = out / RESULTS, out / BUNDLES
    make_folders(out)
    if storage is not None:
        storage.fetch_results(results)
    measured = stored(results)
    known = {} if again else measured
    place, telling = place or Machine(1), threading.Lock()

    def run_one(cell: Cell, exported: CellResult | None, bundle: Path) -> CellResult:
        def bytes_expected() -> int:
            earlier = measured.get(cell.name)
            return earlier.peak_mib << 20 if earlier is not None and earlier.peak_mib else expected(cell)

        return place.run(cell, exported, bundle, Limits(seconds, memory), bytes_expected)

    def run_group(own: list[Cell]) -> list[CellResult]:
        bundle, exported, ran = bundles / own[0].bundle, None, False
        found = []
        for cell in own:
            earlier, cached, path = known.get(cell.name), False, results / f"{cell.name}.json"
            if exported is None:
                why_not = cell.excluded
                inputs = fingerprints(cell)
            else:
                failed = "" if exported.status == "ok" else f"not run on {cell.cpu}: the export failed"
                why_not = cell.excluded or cell.skipped or failed
                inputs = inputs_on_cpu(cell, exported)
            if why_not:
                if not cell.excluded:
                    path.unlink(missing_ok=True)
                result = left_out(cell, why_not)
            elif _is_current(earlier, cell, inputs, place) and (
                exported is not None
                or bundle.exists()
                or (storage is not None and storage.has(bundle.name))
                or not (keep_bundles or _lacks_emulation(own, earlier, known, place))
            ):
                result, cached = earlier, True
            else:
                # Deleted first: a run that is stopped would leave an old result beside a new bundle.
                path.unlink(missing_ok=True)
                if exported is not None and not bundle.exists() and storage is not None:
                    storage.fetch_bundle(bundle)
                result = run_one(cell, exported, bundle)
                store(results, result)
                ran = True
            exported = exported or result
            found.append(result)
            with telling:
                done(result, cached)
        files = [path for cell in own if (path := results / f"{cell.name}.json").exists()]
        if storage is not None and (ran or storage.lacks(files)):
            storage.put(bundle, files)
        if ran and not keep_bundles:
            for path in (bundle, failed_place(bundle)):
                shutil.rmtree(path, ignore_errors=True)
        return found

    groups = by_bundle(cells)
    tasks = [partial(run_group, own) for own in groups]
    found = dict(run_at_once(tasks, place.at_once, place.stop))
    return [result for index in range(len(groups)) for result in found[index]]


def _lacks_emulation(
    own: Sequence[Cell], exported: CellResult, known: Mapping[str, CellResult], place: Place
) -> bool:
    """Whether an emulated CPU has yet to run the bundle of an earlier export."""
    return any(
        not _is_current(known.get(cell.name), cell, inputs_on_cpu(cell, exported), place)
        for cell in own
        if cell.cpu != HOST and not cell.excluded and not cell.skipped
    )
