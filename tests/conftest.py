"""Fixtures: real networks trained on real digits, real photographs, and the command line in this process."""

from __future__ import annotations

import copy
import functools
import gc
import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from support.options import TUNED_LITTLE
from support.paths import ROOT

sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks")]

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
"""Name of this process among those that share the tests (pytest-xdist), gw0 for example; empty for one alone."""

if WORKER and hasattr(os, "sched_setaffinity"):
    # Threads of two processes on the same cores wait for each other. Before torch is imported, which counts cores.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(WORKER.removeprefix("gw")) % len(cores)]})

# In processes started from here: large pages, and freed memory stays with the process. Otherwise, the kernel takes a
# third of the time of a large network, to hand out empty pages again and again.
os.environ.setdefault(
    "GLIBC_TUNABLES",
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"
    ":glibc.malloc.top_pad=268435456",
)

FIRST = (
    "test_models.py",
    "test_pipeline.py",
    "test_cli.py",
    "test_own_models.py",
    "test_segmentation.py",
    "test_calibrate.py",
    "test_dynamic_size.py",
    "test_emulation.py",
    "test_model_args.py",
    "test_placement.py",
)
"""Files that take longest, which begin first: else one process has nothing to do while the other runs the last."""


SLOW = {
    "test_aim.py",
    "test_bundle.py",
    "test_calibrate.py",
    "test_cli.py",
    "test_diagnosis.py",
    "test_dynamic_size.py",
    "test_emulation.py",
    "test_fully_convolutional.py",
    "test_gpu_visit.py",
    "test_keep_float.py",
    "test_matrix.py",
    "test_model_args.py",
    "test_models.py",
    "test_own_models.py",
    "test_pipeline.py",
    "test_ray.py",
    "test_saturation.py",
    "test_segmentation.py",
    "test_tensorrt.py",
    "test_timm.py",
    "test_transfer.py",
    "test_triton.py",
}
"""Files whose tests export, emulate or start processes."""

SLOW_FIXTURES = {"digits", "digits_bundle"}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Without the slow tests, files that have no other are not even imported: that takes a worker seconds."""
    wanted = config.getoption("markexpr")
    return True if collection_path.name in SLOW and wanted.startswith("not slow") else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name in SLOW or SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    order = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def shared_directory(factory: pytest.TempPathFactory) -> Path:
    """A temporary directory of all processes that share the tests."""
    base = factory.getbasetemp()
    return base.parent if WORKER else base


@pytest.fixture(scope="session", autouse=True)
def _shared_cache(tmp_path_factory: pytest.TempPathFactory):
    """One stage cache for the whole run, never the user's own; no colours, whatever the terminal.

    Processes that share the tests share it, so that one makes what the other needs, too.

    `--target auto` is ONNX Runtime here, whatever is installed: tests of other targets name them.
    """
    from export_zoo.engines.targets import registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "AUTOMATIC", ("onnxruntime",))
        patch.setenv("EXPORT_ZOO_CACHE", str(shared_directory(tmp_path_factory) / "cache"))
        patch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch-home")))
        patch.setenv("NO_COLOR", "1")
        yield


@pytest.fixture(scope="session", autouse=True)
def _short_benchmarks():
    """A tenth of the time of each measurement in this process: no test looks at how exact a latency is."""
    from export_zoo.engines.bundle import bench

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "FULL", bench.FULL._replace(seconds=bench.FULL.seconds / 10, rounds_min=2))
        yield


@pytest.fixture(scope="session", autouse=True)
def _shared_translations(request: pytest.FixtureRequest):
    """PyTorch's table of ONNX translations, made once in this process: each export would make it again, in a second."""
    if not any(item.get_closest_marker("slow") for item in request.session.items):
        yield  # fast tests need not import torch
        return
    from torch.onnx._internal.exporter import _registration

    made = functools.cache(_registration.ONNXRegistry.from_torchlib)

    def copied(_: type, **options: int) -> _registration.ONNXRegistry:
        registry = copy.copy(made(**options))
        registry.functions = {target: [*found] for target, found in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_registration.ONNXRegistry, "from_torchlib", classmethod(copied))
        yield


@pytest.fixture(scope="session", autouse=True)
def _few_collections():
    """Garbage collections before large graphs only: with all that the tests import, each takes a second."""
    from export_zoo.base import graph_io

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_io, "_PILE", 1 << 30)
        gc.freeze()
        yield


@pytest.fixture(autouse=True)
def _few_images_beside_opt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer images at batch sizes other than OPT, which cost more than half of a gate's time.

    Where weights are trained, a gate that allows one image in ten another class needs more images than that.
    """
    gate = sys.modules.get("export_zoo.engines.verification.gate")
    if gate is not None and not {"digits", "digits_bundle"} & set(request.fixturenames):
        monkeypatch.setattr(gate, "SUBSET", gate.SUBSET // 4)


@pytest.fixture(autouse=True)
def _brief_diagnoses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failed gates look at some layers only."""
    mend = sys.modules.get("export_zoo.engines.diagnosis.mend")
    if mend is not None:
        monkeypatch.setattr(mend, "SECONDS", 2.0)


BEFORE_FAULTS = ("export", "simplify", "reference", "calibrate")
"""Stages that a fault in a later one leaves as they are."""


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stage cache of this test's own, with what the shared one has up to the ranges.

    For tests that put a fault into a later stage: their results must not reach other tests.
    """
    shared, own = Path(os.environ["EXPORT_ZOO_CACHE"]), tmp_path / "own-cache"
    for stage in BEFORE_FAULTS:
        if (shared / stage).is_dir():
            shutil.copytree(shared / stage, own / stage, copy_function=os.link)
    monkeypatch.setenv("EXPORT_ZOO_CACHE", str(own))
    return own


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 photographs as JPEG files in one folder."""
    from photos import write

    folder = tmp_path_factory.mktemp("photos")
    write(folder, 80)
    return folder


@dataclass(frozen=True)
class Digits:
    """Networks trained on digits (`weights`, by model name) and the digits that they did not see."""

    images: Path
    weights: dict[str, Path]

    def arguments(self, model: str = "resnet18") -> list[str]:
        """Command line arguments that load the network: weights, classes and sizes."""
        given = f"--weights {self.weights[model]} --num-classes 10 --input-size 32 --resize-size 32"
        return [model, *given.split()]

    def tuned_once(self) -> list[str | Path]:
        """Arguments of images for tests of whole tuning: with the same images, one of them makes it for all.

        224 images to verify on, so that half a point of accuracy can be seen.
        """
        return ["--calib", self.images, "--verify-images", "224"]


@pytest.fixture(scope="session")
def digits(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Digits:
    """resnet18, mobilenet_v2 and squeezenet1_1 trained on scikit-learn's digits: a minute in all.

    Kept in pytest's cache directory for the next run, under the hash of what trains them.
    """
    import digits as recipe
    import torch
    from safetensors.torch import load_file, save_file

    source = (ROOT / "examples" / "digits.py").read_bytes() + torch.__version__.encode()
    kept = pytestconfig.cache.mkdir(f"digits-{hashlib.sha256(source).hexdigest()[:16]}")
    images = tmp_path_factory.mktemp("digits") / "images"
    recipe.write_images(images)
    weights = {
        model: kept / f"{model}.safetensors" for model in ("resnet18", "mobilenet_v2", "squeezenet1_1")
    }
    # Each process begins with another network, and waits for one that another process trains.
    models = [*weights] if WORKER != "gw1" else [*reversed(weights)]
    for model in models:
        path = weights[model]
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                network, _ = recipe.train(model)
                save_file(network.state_dict(), path.with_suffix(".new"))
                path.with_suffix(".new").replace(path)
    assert all(load_file(path) for path in weights.values())
    return Digits(images, weights)


@dataclass(frozen=True)
class CliResult:
    code: int
    out: str
    err: str
    json: dict[str, Any]


@pytest.fixture
def cli(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Run the command line in this process: `cli("resnet18", "--weights", "none")`; always with --json."""
    from export_zoo.exporter.cli.app import main

    def run(*arguments: str | Path) -> CliResult:
        path = tmp_path / "result.json"
        path.unlink(missing_ok=True)
        capsys.readouterr()
        code = main([*map(str, arguments), "--json", str(path)])
        captured = capsys.readouterr()
        document = json.loads(path.read_text()) if path.exists() else {}
        return CliResult(code, captured.out, captured.err, document)

    return run


@pytest.fixture(scope="session")
def digits_bundle(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verified FP32 + INT8 bundle of the digits resnet18. Copy it before changing it."""
    from export_zoo.exporter.cli.app import main

    shared = shared_directory(tmp_path_factory)
    out = shared / "bundle" / "digits.bundle"
    arguments = [*digits.arguments(), "--precision", "fp32", "--precision", "int8", "--calib", digits.images]
    arguments += TUNED_LITTLE
    with FileLock(shared / "bundle.lock"):
        if not out.exists():
            assert main([*map(str, arguments), "--out", str(out), "--quiet"]) == 0
    return out
