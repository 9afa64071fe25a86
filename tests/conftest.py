"""Fixtures: real networks trained on real digits, real photographs, and the command line in this process."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks")]


@pytest.fixture(scope="session", autouse=True)
def _shared_cache(tmp_path_factory: pytest.TempPathFactory):
    """One stage cache for the whole run, never the user's own; no colours, whatever the terminal.

    `--target auto` is ONNX Runtime here, whatever is installed: tests of other targets name them.
    """
    from engines import target

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "AUTOMATIC", ("onnxruntime",))
        patch.setenv("EXPORT_ZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch-home")))
        patch.setenv("NO_COLOR", "1")
        yield


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
    for model, path in weights.items():
        if not path.exists():
            network, _ = recipe.train(model)
            save_file(network.state_dict(), path.with_suffix(f".{os.getpid()}"))
            path.with_suffix(f".{os.getpid()}").replace(path)
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
    from exporter.cli import main

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
    from exporter.cli import main

    out = tmp_path_factory.mktemp("bundle") / "digits.bundle"
    arguments = [*digits.arguments(), "--precision", "fp32", "--precision", "int8", "--calib", digits.images]
    assert main([*map(str, arguments), "--out", str(out), "--quiet"]) == 0
    return out
