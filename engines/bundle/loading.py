"""Loads an engine of a bundle and runs it. Needs neither PyTorch nor the zoo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from export_zoo.base.cuda import device_capability
from export_zoo.base.errors import BadInputError, ParityError, TargetUnavailableError
from export_zoo.base.machine import session_threads
from export_zoo.calibration.decode import UnreadableImageError, register_heif
from export_zoo.calibration.preprocess import normalize, read_pixels
from export_zoo.engines.bundle import local_latencies
from export_zoo.engines.bundle import manifest as m
from export_zoo.engines.bundle.bench import BRIEF, run_in_turn
from export_zoo.engines.bundle.opening import why_not_run
from export_zoo.engines.bundle.reader import attestations, check_weights, checked, named, read_manifest
from export_zoo.engines.bundle.selection import Speeds, fastest_first, not_verified, speeds, standing
from export_zoo.engines.precision.registry import PRECISIONS
from export_zoo.engines.targets.base import Opening
from export_zoo.engines.targets.registry import TARGETS

Float32Array = npt.NDArray[np.float32]


class LoadedEngine:
    """One engine of a bundle, ready to run. Safe to share between threads."""

    def __init__(
        self,
        bundle: Path,
        manifest: m.Manifest,
        engine: m.Engine,
        *,
        state: m.State,
        why: str,
        threads: int,
        streams: int,
        runtime_cache: Path | str | None,
    ) -> None:
        path, graph = checked(bundle, engine.file), None
        externals = list(engine.external_data)
        if engine.graph is not None and engine.without_weights:
            graph = checked(bundle, engine.graph)
            externals += engine.graph_external_data
        for external in externals:
            checked(bundle, external)
        if graph is not None or engine.graph is None:
            check_weights(bundle, *engine.precision_graph())
        self.manifest = manifest
        self.name = engine.name
        self.state = state
        self.why = why
        self.labels = manifest.recipe.labels
        self._backend = TARGETS[engine.target].open(
            Opening(
                path,
                PRECISIONS[engine.precision],
                plan=engine.plan,
                graph=graph,
                threads=threads,
                streams=streams,
                runtime_cache=Path(runtime_cache) if runtime_cache is not None else None,
                saturating_session=engine.session_where_saturating(),
            )
        )
        names = [port.name for port in manifest.recipe.outputs]
        if self._backend.output_names != names:
            raise BadInputError(
                f"{path}: its outputs are {', '.join(self._backend.output_names)}, the manifest's {', '.join(names)}",
                hint="export the bundle again",
            )

    def preprocess(
        self, images: Sequence[Path | str | bytes], *, size: tuple[int, int] | None = None
    ) -> Float32Array:
        """Make the input batch, float32 [N, 3, H, W], from image files (paths, or their bytes).

        Args:
            size: height and width, if other than the bundle's own; they must be dynamic. The resize is scaled in
                proportion.

        Raises:
            BadInputError: an image cannot be decoded (the message names it), or the engine does not accept `size`.
        """
        preprocess = self.manifest.recipe.preprocess
        if isinstance(images, (str, bytes, Path)):
            raise BadInputError(f"{images!r:.80}: one image, not a list of them", hint="pass [image]")
        if size is not None:
            if len(found := tuple(size) if isinstance(size, Sequence) else ()) != 2 or not all(
                isinstance(side, int) for side in found
            ):
                raise BadInputError(
                    f"size {size!r}: not (height, width) in pixels", hint="for example (224, 320)"
                )
            self._check_size(*size)
            preprocess = preprocess.at_size(*size)
        register_heif()
        pixels = []
        for index, image in enumerate(images):
            if not isinstance(image, (bytes, str, Path)):
                raise BadInputError(
                    f"image {index} is a {type(image).__name__}, not a path or the bytes of a file",
                    hint="pass paths, or the bytes of JPEG or PNG files",
                )
            name = f"image {index}" if isinstance(image, bytes) else str(image)
            try:
                data = image if isinstance(image, bytes) else Path(image).read_bytes()
                pixels.append(read_pixels(data, preprocess)[0])
            except (UnreadableImageError, OSError) as error:
                raise BadInputError(f"{name}: {error}", hint="pass a JPEG or PNG image") from error
        if not pixels:
            raise BadInputError("no images given", hint="pass at least one")
        return normalize(np.stack(pixels), preprocess)

    @property
    def task(self) -> str:
        """Meaning of the first output: classification, binary, multilabel, regression, embedding or segmentation."""
        return self.manifest.recipe.output.head.task

    def run(self, batch: Float32Array) -> Float32Array:
        """Run a batch, float32 [N, 3, H, W], and return the first output, float32.

        What it means is `task`: logits of a classification, [N, classes], for example. Other shapes are [N],
        [N, tokens, classes] and [N, classes, H, W].

        Raises:
            BadInputError: the batch has a wrong dtype or shape, or N, H or W is outside the verified range.
        """
        return self.run_all(batch)[self.manifest.recipe.output.name]

    def run_all(self, batch: Float32Array) -> dict[str, Float32Array]:
        """Run a batch and return all outputs by name, in order. Arguments and errors are those of `run`."""
        batch = np.asarray(batch)
        allowed = self.manifest.recipe.batch
        if batch.ndim > 0 and not allowed.min <= batch.shape[0] <= allowed.max:
            raise BadInputError(
                f"batch {batch.shape[0]} is outside this bundle's range {allowed.min} to {allowed.max}",
                hint="split the batch, or export with a wider --batch MIN:OPT:MAX",
            )
        if batch.ndim == 4 and self.manifest.recipe.input_size is not None:
            self._check_size(*batch.shape[2:])
        names = [port.name for port in self.manifest.recipe.outputs]
        return dict(zip(names, self._backend.run_all(batch), strict=True))

    def _check_size(self, height: int, width: int) -> None:
        p, allowed = self.manifest.recipe.preprocess, self.manifest.recipe.input_size
        if allowed is None:
            if (height, width) != (p.crop_height, p.crop_width):
                raise BadInputError(
                    f"size {height}x{width}: this bundle takes {p.crop_height}x{p.crop_width} only",
                    hint="leave `size` out, or export with --dynamic-size MIN:OPT:MAX",
                )
        elif not allowed.holds(height, width):
            low, high = (f"{size[0]}x{size[1]}" for size in (allowed.min, allowed.max))
            raise BadInputError(
                f"size {height}x{width} is outside this bundle's range {low} to {high}",
                hint="resize the images, or export with a wider --dynamic-size MIN:OPT:MAX",
            )


class _Opening(TypedDict):
    threads: int
    streams: int
    runtime_cache: Path | str | None


def load(
    bundle: Path | str,
    *,
    engine: str | None = None,
    threads: int = 0,
    streams: int = 1,
    allow_failed: bool = False,
    runtime_cache: Path | str | None = None,
    measure: bool = True,
) -> LoadedEngine:
    """Load the best engine of a bundle, or the one named, after checking its hashes.

    The best engine is the fastest *verified* one that runs on this machine. Its speed is the one measured on a machine
    like this one (same instruction set; for a GPU, same compute capability): by `verify`, whose attestation is in the
    bundle, or at export. If no such machine timed the engines, they are timed here in a few runs, and the result is
    kept in the user's cache directory. An attestation overrules the manifest's states, too.

    Args:
        bundle: the directory that `export-zoo export` wrote.
        engine: name of an engine, for example `onnxruntime-int8`.
        threads: number of threads of each stream of ONNX Runtime and OpenVINO; 0 means the cores that this process may
            use, by affinity and the quota of its container, shared by the streams.
        streams: batches that ONNX Runtime and OpenVINO compute at the same time, for callers in as many threads. One
            stream with all threads answers one request soonest, a stream of one thread for each core the most.
        allow_failed: whether to load from a bundle whose parity gate failed, for inspection.
        runtime_cache: file in which TensorRT-RTX keeps the kernels that it compiles for this GPU. The file is created
            if it does not exist. Without it, each process compiles the kernels again.
        measure: whether engines that no machine like this one timed are timed here. Otherwise, the speeds at export
            decide.

    Raises:
        BadInputError: `bundle` is not a bundle or is damaged, or it has no such engine.
        ParityError: the bundle failed its parity gate.
        TargetUnavailableError: no engine of the bundle can run here.
        UsageError: `threads` is negative, `streams` is below 1, or there are more than 1024 threads in all.
    """
    root = Path(bundle)
    manifest = read_manifest(root)
    if manifest.status != "ok" and not allow_failed:
        raise ParityError(
            f"{root}: this bundle failed its parity gate, or an engine did not reach the state asked for",
            hint="export again, or pass allow_failed=True to load it for inspection",
        )
    opening: _Opening = {"threads": threads, "streams": streams, "runtime_cache": runtime_cache}
    engines = {e.name: e for e in manifest.artifacts.engines}
    attested = attestations(root)
    standings = {name: standing(e, attested) for name, e in engines.items()}
    states = {name: found.state for name, found in standings.items()}
    unreadable = "".join(f"; {name} cannot be read, and is not used" for name in attested.unreadable)
    if engine is not None:
        best, found = named(root, manifest, engine), standings[engine]
        why = f"asked for{f'; {found.state} ({found.source})' if found.source else ''}{unreadable}"
        if reason := why_not_run(best):
            raise TargetUnavailableError(
                f"{root}: {engine} cannot run here: {reason}",
                hint="load another engine of the bundle, or export again on this machine",
            )
        return LoadedEngine(root, manifest, best, state=states[best.name], why=why, **opening)
    reasons = {
        name: why_not_run(e)
        or ("" if states[name] == "verified" or allow_failed else not_verified(standings[name]))
        for name, e in engines.items()
    }
    reasons |= dict.fromkeys(manifest.unknown_engines, "this version does not know it")
    runnable = [e for name, e in engines.items() if not reasons[name]]
    if not runnable:
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise TargetUnavailableError(
            f"{root}: no verified engine that runs here: {listed}",
            hint="export again on this machine, or run `export-zoo verify` where an engine runs",
        )
    opener = _Opener(root, manifest, states, opening)
    measured = speeds(runnable, attested)
    if measure and len(runnable) > 1 and not measured.like_here:
        gpu = device_capability() if any(TARGETS[e.target].device == "gpu" for e in runnable) else None
        each = threads if streams == 1 else session_threads(threads, streams)
        measured = _measured_here(opener, runnable, local_latencies.file_for(root, gpu, each))
    best_here = next(filter(None, map(opener.open, fastest_first(runnable, measured))), None)
    if best_here is None:
        raise next(iter(opener.left_out.values()))
    reasons |= {name: error.message for name, error in opener.left_out.items()}
    fastest = ["fastest verified engine that may be loaded here", measured.told(best_here.name)]
    best_here.why = ", ".join(filter(None, fastest)) + _left_out(reasons) + unreadable
    return best_here


def _left_out(reasons: Mapping[str, str]) -> str:
    """Names of engines that were left out, each reason once."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if reason:
            names.setdefault(reason, []).append(name)
    return "".join(
        f"; {' and '.join(of)} {'was' if len(of) == 1 else 'were'} left out: {reason}"
        for reason, of in names.items()
    )


class _Opener:
    """Opens engines of a bundle, each at most once."""

    def __init__(
        self, root: Path, manifest: m.Manifest, states: Mapping[str, m.State], opening: _Opening
    ) -> None:
        self.root, self.manifest, self._states, self._opening = root, manifest, states, opening
        self._opened: dict[str, LoadedEngine] = {}
        self.left_out: dict[str, TargetUnavailableError] = {}
        """Engines that this machine cannot run, in the order in which they were tried."""

    def open(self, engine: m.Engine) -> LoadedEngine | None:
        """Open an engine; None if this machine cannot run it. Raises what `LoadedEngine` raises otherwise."""
        name = engine.name
        if name not in self._opened and name not in self.left_out:
            try:
                self._opened[name] = LoadedEngine(
                    self.root, self.manifest, engine, state=self._states[name], why="", **self._opening
                )
            except TargetUnavailableError as error:
                self.left_out[name] = error
        return self._opened.get(name)


def _measured_here(opener: _Opener, engines: Sequence[m.Engine], kept: Path | None) -> Speeds:
    """Speeds on this machine, from the file of an earlier load or, for engines that are not in it, from a few runs."""
    median_ms = local_latencies.read(kept)
    # An engine that could not be opened before may have become usable, for example because a library was installed.
    if any(opener.open(engine) for engine in engines if engine.name not in median_ms):
        opened = {engine.name: found for engine in engines if (found := opener.open(engine))}
        times = run_in_turn(opened, _noise(opener.manifest.recipe), BRIEF)
        median_ms = {name: float(np.median(seconds)) * 1e3 for name, seconds in times.items()}
        local_latencies.write(kept, median_ms)
    images = 1e3 * opener.manifest.recipe.batch.opt
    per_second = {e.name: images / median_ms[e.name] for e in engines if e.name in median_ms}
    return Speeds(per_second, "here", like_here=True, unit=" images per second")


def _noise(recipe: m.Recipe) -> Float32Array:
    """A batch of the optimal size and of normal values, as normalized images have them, float32 [N, 3, H, W]."""
    shape = (
        recipe.batch.opt,
        recipe.preprocess.channels,
        recipe.preprocess.crop_height,
        recipe.preprocess.crop_width,
    )
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
