"""The main job: runs the stages in order, through the cache, and publishes the bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration import graph_io, images
from calibration.collect import collect_minmax
from calibration.errors import BadInputError, ParityError, StateNotReachedError
from calibration.graph_io import sha256_of
from calibration.images import ImageFolder, ImageStream, Splits
from calibration.machine import cpu_model, instruction_set, library_versions
from calibration.preprocess import normalize
from calibration.ranges import Ranges
from engines import bench, manifest, target
from engines.bundle import HeldOut, judge_engine
from engines.gate import MIN_LABELLED, images_compared
from engines.half import to_half
from engines.manifest import Engine
from engines.onnxruntime_engine import OnnxRuntimeEngine
from engines.parity import DEFAULT_TOLERANCES, check_reference
from engines.precision import quantize
from exporter import __version__, publish
from exporter.labels import folder_labels
from exporter.options import ExportOptions
from exporter.report import Reporter
from exporter.stage_cache import StageCache, StageResult, code_digest, default_root

if TYPE_CHECKING:
    from torch import nn

    from exporter.zoo import ModelSpec

CALIBRATION_BATCH = 8
MAX_HELD_OUT = 512
SYNTHETIC_IMAGES = 64


@dataclass(frozen=True)
class ExportResult:
    """A published bundle."""

    bundle: Path
    manifest: manifest.Manifest

    @property
    def engines(self) -> Sequence[Engine]:
        return self.manifest.artifacts.engines


class GateFailedError(ParityError):
    """Engines outside their tolerance; `result` is the bundle kept under `OUT.failed/`."""

    def __init__(self, message: str, *, hint: str, result: ExportResult) -> None:
        super().__init__(message, hint=hint)
        self.result = result


class _LazyModel:
    """The eager model, built once and only when a stage is not cached."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec

    @cached_property
    def built(self) -> tuple[nn.Module, list[str]]:
        from exporter import zoo

        return zoo.build(self._spec)


@dataclass(frozen=True)
class _Images:
    """What the images stage hands on."""

    splits: Splits
    root: Path | None
    synthetic: bool
    labels: list[int] | None
    categories: tuple[str, ...]


class _Run:
    """One run of the pipeline: the state that its stages share."""

    def __init__(self, options: ExportOptions, reporter: Reporter, cache: StageCache) -> None:
        self.options = options
        self.reporter = reporter
        self.cache = cache
        self.versions = library_versions(
            "torch",
            "torchvision",
            "onnx",
            "onnxscript",
            "onnx_ir",
            "onnxsim",
            "onnxruntime",
            "numpy",
            "pillow",
        )

    def key(self, *libraries: str, **parts: Any) -> dict[str, Any]:
        """A stage's key: its parts, and the versions of the libraries that do the work."""
        return {"code": code_digest(), "libraries": {n: self.versions[n] for n in libraries}, **parts}

    # -- stages ---------------------------------------------------------------------------------------------

    def resolve(self) -> tuple[ModelSpec, _LazyModel]:
        with self.reporter.stage("weights") as stage:
            from exporter import zoo

            spec = zoo.resolve(self.options)
            p = spec.preprocess
            stage.detail = (
                f"{spec.name}, {spec.weights_name}, input {p.crop_height}x{p.crop_width}, "
                f"resize {p.resize_size} {p.interpolation}, {spec.num_classes} classes"
            )
            if spec.transform_input is not None:
                stage.detail += f", transform_input={spec.transform_input}"
        if spec.weights_kind == "random":
            self.reporter.warn(
                "random weights (--weights none): engines are compared, but nothing is said about accuracy"
            )
        return spec, _LazyModel(spec)

    def scan(self, folder: Path, option: str) -> ImageFolder:
        with self.reporter.stage("images") as stage, self.reporter.bar("images", 0) as progress:
            found = images.scan(folder, option=option, progress=progress)
            stage.detail = f"{option} {folder}: {len(found.images)} images"
            for count, what in ((len(found.duplicates), "duplicates"), (len(found.ignored), "other files")):
                if count:
                    stage.detail += f", {count} {what} left out"
        self._report_unreadable(folder, [(u.name, u.reason) for u in found.unreadable])
        return found

    def _report_unreadable(self, folder: Path | None, unreadable: Sequence[tuple[str, str]]) -> None:
        for name, reason in unreadable:
            self.reporter.warn(f"{folder}: {name} cannot be read and is left out: {reason}")

    def images(self, spec: ModelSpec) -> _Images:
        """Scan the folders and divide them into disjoint splits; synthetic images where there are none."""
        options = self.options
        if options.calib is None and options.verify is None:
            self.reporter.warn(
                f"no --calib or --verify: parity is checked on {SYNTHETIC_IMAGES} seeded synthetic images"
            )
            return _Images({"calibrate": (), "select": (), "verify": ()}, None, True, None, spec.labels)
        calib = self.scan(options.calib, "--calib") if options.calib is not None else None
        check = self.scan(options.verify, "--verify") if options.verify is not None else None
        splits: Splits = {"calibrate": (), "select": (), "verify": ()}
        if calib is not None:
            splits = images.split(
                calib,
                calibrate=options.calib_images,
                verify=options.verify_images,
                seed=options.seed,
                with_verify=check is None,
            )
        source = calib
        if check is not None:
            source = check
            if calib is not None and (both := images.overlap(calib.images, check.images)):
                raise BadInputError(
                    f"--verify {check.root}: {len(both)} of its images are in --calib too, {both[0][1]} for one",
                    hint="verify on images that were not calibrated on; with --calib alone they are divided for you",
                )
            if len(check.images) < images.MIN_VERIFY:
                raise BadInputError(
                    f"--verify {check.root}: {len(check.images)} different images, at least "
                    f"{images.MIN_VERIFY} are needed",
                    hint="add images",
                )
            splits["verify"] = tuple(images.shuffled(check.images, options.seed)[: options.verify_images])
        assert source is not None
        found = folder_labels(source.images, spec.labels, spec.num_classes)
        labels = found.of(splits["verify"])
        with self.reporter.stage("splits") as stage:
            stage.detail = ", ".join(f"{name} {len(files)}" for name, files in splits.items() if files)
            stage.detail += f"; labels: {found.explanation}"
        categories = spec.labels
        if not categories and len(found.by_folder) == spec.num_classes:
            categories = tuple(sorted(found.by_folder, key=lambda name: found.by_folder[name]))
        return _Images(splits, source.root, False, labels, categories)

    def export(self, spec: ModelSpec, model: _LazyModel) -> StageResult:
        def make(directory: Path) -> dict[str, Any]:
            from exporter import graph

            module, initialized = model.built
            p = spec.preprocess
            path = directory / "model.onnx"
            graph.export(module, p.crop_height, p.crop_width, path)
            pixels = images.synthetic_images(max(graph.CHECK_BATCHES), p.crop_height, p.crop_width, spec.seed)
            error = graph.check_batches(path, module, normalize(pixels, p))
            return {"initialized": initialized, "error": error, "opset": graph.OPSET}

        with self.reporter.stage("export") as stage:
            result = self.cache.run(
                "export",
                self.key("torch", "torchvision", "onnx", "onnxscript", "onnx_ir", spec=spec.key()),
                make,
            )
            stage.cached = result.cached
            stage.detail = (
                f"ONNX opset {result.data['opset']}, dynamic batch; eager's logits within "
                f"{result.data['error']:.0e} at batches 1 and 3"
            )
        if result.data["initialized"]:
            self.reporter.warn(
                f"initialized at random: {', '.join(result.data['initialized'])}: say nothing about accuracy"
            )
        return result

    def simplify(self, spec: ModelSpec, exported: StageResult) -> StageResult:
        def make(directory: Path) -> dict[str, str]:
            from exporter import simplify

            p = spec.preprocess
            pixels = images.synthetic_images(3, p.crop_height, p.crop_width, spec.seed + 1)
            done = simplify.simplify(exported.directory / "model.onnx", directory, normalize(pixels, p))
            return {"summary": done.summary, "warning": done.warning}

        with self.reporter.stage("simplify") as stage:
            key = self.key("onnx", "onnx_ir", "onnxsim", "onnxruntime", graph=exported.key)
            result = self.cache.run("simplify", key, make)
            stage.cached, stage.detail = result.cached, result.data["summary"]
        if result.data["warning"]:
            self.reporter.warn(result.data["warning"])
        return result

    def reference(self, spec: ModelSpec, model: _LazyModel, chosen: _Images) -> tuple[StageResult, HeldOut]:
        """Decode the verify set and run eager PyTorch on it."""
        p = spec.preprocess
        files = chosen.splits["verify"]
        identity = ["synthetic", SYNTHETIC_IMAGES] if chosen.synthetic else [i.sha256 for i in files]

        def make(directory: Path) -> dict[str, Any]:
            from exporter.reference import eager_logits

            stream = None
            if chosen.synthetic:
                # Other seeds than those that random weights are made usable with.
                pixels = images.synthetic_images(SYNTHETIC_IMAGES, p.crop_height, p.crop_width, spec.seed + 2)
            else:
                assert chosen.root is not None
                stream = ImageStream(files, p, CALIBRATION_BATCH, chosen.root)
                pixels = np.concatenate([*stream])
            with self.reporter.bar("reference", len(pixels)) as progress:
                logits = eager_logits(model.built[0], pixels, p, progress)
            check_reference(logits)
            np.save(directory / "inputs.npy", pixels)
            np.save(directory / "logits.npy", logits)
            return {
                "sha256": [i.sha256 for i in stream.images] if stream else [],
                "unreadable": [(u.name, u.reason) for u in stream.unreadable] if stream else [],
            }

        with self.reporter.stage("reference") as stage:
            key = self.key(
                "torch",
                "torchvision",
                "numpy",
                "pillow",
                spec=spec.key(),
                images=identity,
                isa=instruction_set(),
            )
            result = self.cache.run("reference", key, make)
            pixels = np.load(result.directory / "inputs.npy")
            logits = np.load(result.directory / "logits.npy")
            kind = "synthetic images" if chosen.synthetic else "images"
            stage.cached, stage.detail = result.cached, f"eager PyTorch FP32 on {len(pixels)} {kind}"
        self._report_unreadable(chosen.root, result.data["unreadable"])
        labels = None
        if chosen.labels is not None:
            by_hash = dict(zip((i.sha256 for i in files), chosen.labels, strict=True))
            labels = [by_hash[sha256] for sha256 in result.data["sha256"]]
        return result, HeldOut(pixels, logits, labels)

    def calibrate(self, graph: Path, spec: ModelSpec, chosen: _Images) -> tuple[StageResult, Ranges]:
        files = chosen.splits["calibrate"]
        root = self.options.calib
        assert root is not None

        def make(directory: Path) -> dict[str, Any]:
            stream = ImageStream(files, spec.preprocess, CALIBRATION_BATCH, root)
            with self.reporter.bar("calibrate", len(files)) as progress:
                ranges = collect_minmax(graph, stream, progress=progress)
            ranges.write(directory / "ranges.json")
            return {"unreadable": [(u.name, u.reason) for u in stream.unreadable]}

        with self.reporter.stage("calibrate") as stage:
            key = self.key(
                "onnxruntime",
                "numpy",
                "pillow",
                graph=sha256_of(graph),
                preprocess=spec.preprocess.model_dump(),
                images=sorted(i.sha256 for i in files),
                method=self.options.method,
                isa=instruction_set(),
            )
            result = self.cache.run("calibrate", key, make)
            ranges = Ranges.read(result.directory / "ranges.json")
            stage.cached = result.cached
            stage.detail = (
                f"{self.options.method}: {len(ranges.tensors)} tensors over {len(ranges.image_sha256)} images"
            )
        self._report_unreadable(root, result.data["unreadable"])
        return result, ranges

    def build(self, graph: Path, precision: str, ranges: Ranges | None) -> Path:
        """The engine file of one precision: for ONNX Runtime the precision graph is the engine."""
        name = f"onnxruntime-{precision}"
        with self.reporter.stage("build") as stage:
            if precision == "fp32":
                stage.detail = f"{name}: the simplified graph itself"
                return graph

            def make(directory: Path) -> dict[str, Any]:
                out = directory / "engine.onnx"
                if precision == "fp16":
                    to_half(graph, out)
                else:
                    assert ranges is not None
                    quantize(graph, ranges, out, reduce_range=self.options.reduce_range)
                return {}

            key = self.key(
                "onnx_ir",
                "numpy",
                graph=sha256_of(graph),
                precision=precision,
                ranges=ranges.model_dump() if ranges is not None and precision == "int8" else None,
                reduce_range=self.options.reduce_range,
            )
            result = self.cache.run("precision", key, make)
            stage.cached, stage.detail = result.cached, name
            return result.directory / "engine.onnx"

    def tolerances(
        self, target_name: str, precision: str, *, random: bool, labelled: int
    ) -> dict[str, float]:
        """Defaults, overridden by --tolerance."""
        against_unfused = random and precision != "fp32"
        chosen = {} if against_unfused else dict(DEFAULT_TOLERANCES[precision])
        if labelled < MIN_LABELLED:
            chosen.pop("accuracy_drop", None)
        for tolerance in self.options.tolerances:
            if tolerance.applies_to(target_name, precision):
                chosen[tolerance.metric] = tolerance.value
        return chosen

    def verify(
        self,
        files: Mapping[str, Path],
        recipe: manifest.Recipe,
        held: HeldOut,
        reference: StageResult,
        fp32: Path,
    ) -> dict[str, tuple[manifest.Gate, bench.Latency | None]]:
        """Run every engine through the gate, and time them in turn."""
        random = recipe.source.weights.random
        results: dict[str, tuple[manifest.Gate, bench.Latency | None]] = {}
        latencies = self._latencies(files, recipe, held, fp32)
        for precision, path in files.items():
            name = f"onnxruntime-{precision}"
            labelled = len(held.labels) if held.labels is not None else 0
            tolerances = self.tolerances("onnxruntime", precision, random=random, labelled=labelled)
            unfused = random and precision != "fp32"

            def make(
                _: Path,
                path: Path = path,
                precision: str = precision,
                tolerances: dict[str, float] = tolerances,
                unfused: bool = unfused,
            ) -> dict[str, Any]:
                total = images_compared(len(held.pixels), recipe.batch)
                with self.reporter.bar("verify", total) as progress:
                    gate = judge_engine(
                        path,
                        precision=precision,
                        unfused=unfused,
                        recipe=recipe,
                        held=held,
                        tolerances=tolerances,
                        progress=progress,
                    )
                return gate.model_dump(mode="json")

            with self.reporter.stage("verify") as stage:
                key = self.key(
                    "onnxruntime",
                    "numpy",
                    engine=sha256_of(path),
                    reference=reference.key,
                    labels=held.labels,
                    batch=recipe.batch.model_dump(),
                    tolerances=tolerances,
                    unfused=unfused,
                    isa=instruction_set(),
                )
                result = self.cache.run("verify", key, make)
                gate = manifest.Gate.model_validate(result.data)
                stage.cached = result.cached
                sqnr, top1 = gate.eager_metrics["sqnr"], gate.eager_metrics["top1"]
                stage.detail = (
                    f"{name}: {'FAILED' if gate.failures else 'ok'}, SQNR {sqnr:.1f} dB, top-1 agreement "
                    f"{100 * (top1 or 0):.1f} % on {gate.metrics['images']} images, batches "
                    f"{', '.join(map(str, gate.batches))}"
                )
                if unfused:
                    stage.detail += f"; gated against its unfused graph, {gate.metrics['sqnr']:.1f} dB"
            results[precision] = (gate, latencies.get(precision))
        return results

    def _latencies(
        self, files: Mapping[str, Path], recipe: manifest.Recipe, held: HeldOut, fp32: Path
    ) -> dict[str, bench.Latency]:
        timed = {"fp32": fp32, **files}

        def make(_: Path) -> dict[str, Any]:
            engines = {p: OnnxRuntimeEngine(path, half=p == "fp16") for p, path in timed.items()}
            index = np.arange(recipe.batch.opt) % len(held.pixels)
            batch = normalize(held.pixels[index], recipe.preprocess)
            found = bench.measure(engines, batch, baseline="fp32", machine=cpu_model())
            return {name: latency.model_dump(mode="json") for name, latency in found.items()}

        with self.reporter.stage("bench") as stage:
            key = self.key(
                "onnxruntime",
                engines={p: sha256_of(path) for p, path in timed.items()},
                batch=recipe.batch.opt,
                machine=cpu_model(),
            )
            result = self.cache.run("bench", key, make)
            stage.cached = result.cached
            stage.detail = f"{len(timed)} engine(s) in turn at batch {recipe.batch.opt}"
        latencies = {name: bench.Latency.model_validate(data) for name, data in result.data.items()}
        for name, latency in latencies.items():
            if name in files and name != "fp32" and latency.speedup < 1.0:
                self.reporter.warn(
                    f"onnxruntime-{name} is slower than FP32 here ({latency.speedup:.2f}x at batch {latency.batch})"
                )
        return latencies

    # -- all of it ------------------------------------------------------------------------------------------

    def run(self) -> ExportResult:
        options = self.options
        publish.check_destination(options.out_dir)
        chosen_targets = target.choose(options.targets)
        assert [t.name for t in chosen_targets] == ["onnxruntime"]
        spec, model = self.resolve()
        chosen = self.images(spec)
        exported = self.export(spec, model)
        simplified = self.simplify(spec, exported)
        graph = simplified.directory / "graph.onnx"
        reference, held = self.reference(spec, model, chosen)
        calibrated: StageResult | None = None
        ranges: Ranges | None = None
        if "int8" in options.precisions:
            calibrated, ranges = self.calibrate(graph, spec, chosen)
            shared = set(ranges.image_sha256) & set(reference.data["sha256"])
            if shared:
                raise ParityError(
                    f"{len(shared)} verify images were calibrated on: the comparison would prove nothing",
                    hint="this is a defect of the splits; please report it",
                )
        files = {precision: self.build(graph, precision, ranges) for precision in options.unique_precisions()}
        sources: dict[str, Path] = {}

        def add(path: Path, stem: str) -> manifest.File:
            file = publish.describe(path, stem)
            sources[file.path] = path
            return file

        external = {p.name: p for path in [graph, *files.values()] for p in graph_io.external_files(path)}
        recipe = self._recipe(spec, chosen, exported, simplified, ranges, calibrated, graph, external, add)
        verified = self.verify(files, recipe, held, reference, graph)
        engines = [
            manifest.Engine(
                name=f"onnxruntime-{precision}",
                target="onnxruntime",
                precision=precision,  # type: ignore[arg-type]
                file=add(path, spec.name if precision == "fp32" else f"{spec.name}-onnxruntime-{precision}"),
                state="built" if verified[precision][0].failures else "verified",
                built_by=library_versions("onnxruntime", "onnx_ir", "numpy"),
                instruction_set=instruction_set(),
                gate=verified[precision][0],
                latency=verified[precision][1],
            )
            for precision, path in files.items()
        ]
        failed = [f"{e.name}: {text}" for e in engines for text in e.gate.failures]
        result = manifest.Manifest(
            schema_version=1,
            tool=f"export-zoo {__version__}",
            status="failed" if failed else "ok",
            warnings=self.reporter.warnings,
            recipe=recipe,
            artifacts=manifest.Artifacts(
                created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                engines=engines,
                held_out=manifest.HeldOut(
                    inputs=add(self._held_out(reference, "inputs.npy"), "inputs"),
                    logits=add(self._held_out(reference, "logits.npy"), "logits"),
                    count=min(len(held.pixels), MAX_HELD_OUT),
                    synthetic=chosen.synthetic,
                    labels=held.labels[:MAX_HELD_OUT] if held.labels is not None else None,
                    image_sha256=reference.data["sha256"][:MAX_HELD_OUT],
                ),
            ),
        )
        return self._finish(result, failed, sources)

    def _held_out(self, reference: StageResult, name: str) -> Path:
        """The reference's file, cut to the first images where there are very many."""
        path = reference.directory / name
        array = np.load(path, mmap_mode="r")
        if len(array) <= MAX_HELD_OUT:
            return path
        cut = reference.directory / f"held-out-{name}"
        np.save(cut, array[:MAX_HELD_OUT])
        return cut

    def _recipe(
        self,
        spec: ModelSpec,
        chosen: _Images,
        exported: StageResult,
        simplified: StageResult,
        ranges: Ranges | None,
        calibrated: StageResult | None,
        graph: Path,
        external: Mapping[str, Path],
        add: Any,
    ) -> manifest.Recipe:
        p, batch = spec.preprocess, self.options.batch
        calibration = None
        if ranges is not None and calibrated is not None:
            calibration = manifest.Calibration(
                method=ranges.method,
                images=len(ranges.image_sha256),
                unreadable=ranges.unreadable,
                ranges=add(calibrated.directory / "ranges.json", "ranges"),
            )
        return manifest.Recipe(
            source=manifest.Source(
                zoo="torchvision",
                name=spec.name,
                num_classes=spec.num_classes,
                transform_input=spec.transform_input,
                weights=manifest.Weights(
                    kind=spec.weights_kind,  # type: ignore[arg-type]
                    name=spec.weights_name,
                    sha256=spec.weights_sha256,
                    random=spec.weights_kind == "random",
                    initialized=exported.data["initialized"],
                    seed=spec.seed,
                ),
            ),
            input=manifest.Port(
                name="input",
                dtype="float32",
                shape=["batch", 3, p.crop_height, p.crop_width],
                layout="NCHW",
            ),
            output=manifest.Port(
                name="logits", dtype="float32", shape=["batch", spec.num_classes], layout="NC"
            ),
            batch=manifest.Batch(min=batch.min, opt=batch.opt, max=batch.max),
            preprocess=p,
            labels=list(chosen.categories),
            graph=add(graph, spec.name),
            external_data=[add(path, "") for path in external.values()],
            simplified=simplified.data["summary"],
            calibration=calibration,
            reduce_range=self.options.reduce_range,
            instruction_set=instruction_set(),
            versions=self.versions,
        )

    def _finish(
        self, result: manifest.Manifest, failed: Sequence[str], sources: dict[str, Path]
    ) -> ExportResult:
        out = self.options.out_dir
        place = out.with_name(out.name + ".failed") if failed else out
        with self.reporter.stage("bundle") as stage:
            publish.publish(place, result, sources)
            stage.detail = str(place)
        if failed:
            raise GateFailedError(
                f"parity gate failed: {'; '.join(failed)}",
                hint=f"everything is kept in {place}; look at it with `export-zoo inspect {place}`, then try more "
                "--calib images, another --precision, or a --tolerance you can live with",
                result=ExportResult(place, result),
            )
        if self.options.require == "verified":
            short = [e.name for e in result.artifacts.engines if e.state != "verified"]
            if short:
                raise StateNotReachedError(
                    f"--require verified: {', '.join(short)} did not get there",
                    hint="run it where they can run",
                )
        return ExportResult(out, result)


def export_zoo(options: ExportOptions, *, reporter: Reporter | None = None) -> ExportResult:
    """Run the main job: zoo model to verified bundle.

    Args:
        options: what to do; see `ExportOptions`.
        reporter: told about stages, progress and warnings; silent by default.

    Raises:
        ExportZooError: see `calibration.errors` for its kinds and exit codes.
    """
    root = default_root() if options.cache else None
    with StageCache(root) as cache:
        return _Run(options, reporter or Reporter(), cache).run()
