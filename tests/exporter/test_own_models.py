"""The user's own networks: `FILE.py:FUNCTION` and `package.module:FUNCTION`, preprocessed as a file says."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import own_networks
import pytest
import torch
from own_networks import Pixels, TwoHeads, padded
from safetensors.torch import save_file
from support.options import PREPROCESS_FILE, UNTUNED
from support.paths import ROOT

import export_zoo
from export_zoo.base.errors import BadInputError, UsageError
from export_zoo.calibration.preprocess import normalize
from export_zoo.calibration.synthetic import TEST_PATTERNS
from export_zoo.engines.bundle.reader import held_out, read_manifest
from export_zoo.engines.parity.outputs import as_rows, sampled, sampled_shape
from export_zoo.engines.targets import registry
from export_zoo.exporter.graph import to_onnx
from export_zoo.exporter.models import zoo
from export_zoo.exporter.models.preprocessing import PreprocessFile, main, read_preprocess
from export_zoo.exporter.options import ExportOptions

NETWORKS = ROOT / "tests" / "own_networks.py"
SMALL = ["--weights", "none", "--verify-images", "32", "--batch", "1:2:3"]


@pytest.fixture
def preprocess(tmp_path: Path) -> Path:
    path = tmp_path / "preprocess.json"
    path.write_text(json.dumps(PREPROCESS_FILE))
    return path


def resolved(function: str, preprocess: Path, **given):
    return zoo.resolve(ExportOptions(f"{NETWORKS}:{function}", preprocess=preprocess, **given))


INT8 = ["--precision", "fp32", "--precision", "fp16", "--precision", "int8"]


@pytest.mark.parametrize(
    "network", ["padded zeros", "padded reflect", "padded replicate", "padded circular", "vision_transformer"]
)
def test_networks_end_verified_and_compiled(cli, photos, preprocess, tmp_path, network):
    """Padding modes, pooling, groups and dilation; attention as torchvision's vit_b_32 has it."""
    name, _, mode = network.partition(" ")
    done = cli(
        *(f"{NETWORKS}:{name}", *SMALL, *INT8, "--calib", photos, "--preprocess", preprocess),
        *(("--model-arg", f"mode={mode}") if mode else ()),
        *("--target", "onnxruntime", "--target", "tensorrt-rtx", "--out", tmp_path / "b.bundle"),
    )
    assert done.code == 0, done.json["error"]
    states = {engine["name"]: engine["state"] for engine in done.json["engines"]}
    assert set(states.values()) == {"verified", "graph verified"}
    assert len(states) == 6


def test_layers_registered_in_any_way_are_known_by_their_names(cli, photos, preprocess, tmp_path):
    done = cli(
        *(f"{NETWORKS}:Registered", *SMALL, *INT8, "--calib", photos, "--preprocess", preprocess),
        *("--model-arg", "depth=2", "--keep-float", "blocks.1", "--out", tmp_path / "b.bundle"),
    )
    assert done.code == 0, done.json["error"]
    manifest = read_manifest(tmp_path / "b.bundle")
    assert manifest.recipe.source.arguments == {"depth": "2"}
    assert manifest.recipe.output.shape == ["batch", 7]


def test_the_factorys_own_weights_are_exported_and_recorded(cli, preprocess, tmp_path):
    done = cli(
        f"{NETWORKS}:padded", "--preprocess", preprocess, "--batch", "1:2:3", "--out", tmp_path / "b.bundle"
    )
    assert done.code == 0, done.json["error"]
    source = read_manifest(tmp_path / "b.bundle").recipe.source
    assert (source.zoo, source.name, source.factory) == ("python", "padded", "own_networks.py:padded")
    assert (source.weights.kind, source.weights.random) == ("factory", False)
    assert len(source.weights.sha256) == 64
    assert str(NETWORKS.parent) not in (tmp_path / "b.bundle" / "manifest.json").read_text()
    engine = export_zoo.load(tmp_path / "b.bundle")
    held = held_out(tmp_path / "b.bundle", read_manifest(tmp_path / "b.bundle"))
    torch.manual_seed(0)
    eager = padded().eval()
    with torch.inference_mode():
        batch = normalize(held.pixels[:2], engine.manifest.recipe.preprocess)
        wanted = eager(torch.from_numpy(batch)).numpy()
    np.testing.assert_allclose(engine.run(batch), wanted, atol=1e-4)


@pytest.mark.parametrize("name", ["InPlace", "Autocast", "Counter", "Stretched", "WithoutLoss"])
def test_networks_with_side_effects_are_exported_as_functions(cli, preprocess, tmp_path, name):
    done = cli(f"{NETWORKS}:{name}", *SMALL[2:], "--preprocess", preprocess, "--out", tmp_path / "b.bundle")
    assert done.code == 0, done.json["error"]
    warned = [text for text in done.json["warnings"] if "runs under torch.autocast" in text]
    assert len(warned) == (name == "Autocast")
    engine = export_zoo.load(tmp_path / "b.bundle")
    torch.manual_seed(0)
    eager = getattr(own_networks, name)().eval()
    black = np.zeros((1, 3, 64, 64), dtype=np.float32)
    with torch.inference_mode():
        outputs = eager.double()(torch.from_numpy(black).double()) if name != "Autocast" else None
    wanted = outputs[0] if isinstance(outputs, tuple) else outputs
    found = engine.run(black)
    assert np.isfinite(found).all()
    if wanted is not None:
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)
    assert len(engine.manifest.recipe.outputs) == (2 if name == "WithoutLoss" else 1)
    (gate,) = (engine["gate"] for engine in done.json["engines"])
    assert set(gate["patterns"]) == set(TEST_PATTERNS)
    assert min(gate["patterns"].values()) > 60


def test_an_optimizer_that_changes_the_function_is_left_out(cli, preprocess, tmp_path, monkeypatch):
    """As the exporter's did before its constants were exact: it dropped the epsilon."""
    monkeypatch.setattr(to_onnx, "_exact_constants", contextlib.nullcontext)
    given = (f"{NETWORKS}:Stretched", *SMALL[2:], "--preprocess", preprocess, "--no-cache")
    done = cli(*given, "--out", tmp_path / "b.bundle")
    assert done.code == 0, done.json["error"]
    (told,) = (text for text in done.json["warnings"] if "optimizer" in text)
    assert "left out: with it, on the test pattern 'black', logits are not finite" in told
    assert "first seen in the output of module conv" in told
    black = np.zeros((1, 3, 64, 64), dtype=np.float32)
    assert np.isfinite(export_zoo.load(tmp_path / "b.bundle").run(black)).all()


@pytest.mark.parametrize(
    ("given", "code"),
    [((), 0), (("--strict",), 6), (("--target", "onnxruntime", "--target", "tensorrt-rtx"), 6)],
)
def test_what_one_target_refuses_is_kept_of_the_others(
    cli, photos, preprocess, tmp_path, monkeypatch, given, code
):
    if why := registry.TARGETS["tensorrt-rtx"].unavailable:
        pytest.skip(why)
    monkeypatch.setattr(registry, "AUTOMATIC", ("onnxruntime", "tensorrt-rtx"))
    command = [f"{NETWORKS}:Folded", *SMALL[2:], "--calib", photos, "--preprocess", preprocess, *UNTUNED]
    done = cli(*command, *INT8, *given, "--out", tmp_path / "b.bundle")
    assert done.code == code, done.json["error"]
    place = tmp_path / ("b.bundle.failed" if code else "b.bundle")
    manifest = read_manifest(place)
    assert manifest.status == ("failed" if code else "ok")
    names = [f"tensorrt-rtx-{precision}" for precision in ("fp32", "fp16", "int8")]
    assert [refused.name for refused in manifest.artifacts.refused] == names
    assert all("Col2Im" in refused.reason for refused in manifest.artifacts.refused)
    assert done.json["refused"] == [r.model_dump() for r in manifest.artifacts.refused]
    assert {e.state for e in manifest.artifacts.engines} == {"verified"}
    (told,) = (text for text in done.json["warnings"] if "Col2Im" in text)
    assert told.startswith(f"{', '.join(names)}: left out: ")
    assert "refused" in done.out
    if code:
        assert done.json["error"]["kind"] == "refused"
        assert str(place) in done.json["error"]["hint"]
        assert ("--strict" in done.json["error"]["hint"]) == (given == ("--strict",))
        assert not (tmp_path / "b.bundle").exists()


def test_a_network_that_the_only_target_refuses_ends_with_its_reason(cli, photos, preprocess, tmp_path):
    if why := registry.TARGETS["tensorrt-rtx"].unavailable:
        pytest.skip(why)
    command = [f"{NETWORKS}:Folded", *SMALL[2:], "--calib", photos, "--preprocess", preprocess]
    done = cli(*command, "--target", "tensorrt-rtx", *INT8[2:], "--out", tmp_path / "b.bundle")
    assert done.code == 6
    assert "parse: Col2Im" in done.json["error"]["message"]
    assert not (tmp_path / "b.bundle.failed").exists()
    assert "build" not in [stage["name"] for stage in done.json["stages"]], "asked before tuning and building"


def test_values_that_decide_stay_float(cli, photos, preprocess, tmp_path):
    for name, least in (("Unpooled", (60, 25)), ("Guarded", (45, 15))):
        done = cli(
            *(f"{NETWORKS}:{name}", *SMALL[2:], *INT8[2:], "--calib", photos, "--preprocess", preprocess),
            *(*UNTUNED, "--out", tmp_path / name),
        )
        assert done.code == 0, done.json["error"]
        figures = [engine["gate"]["eager_metrics"]["sqnr"] for engine in done.json["engines"]]
        assert [have > want for have, want in zip(figures, least, strict=True)] == [True, True], figures


def test_what_is_too_small_for_half_stays_float(cli, photos, preprocess, tmp_path):
    done = cli(
        *(
            f"{NETWORKS}:Faint",
            *SMALL[2:],
            "--precision",
            "fp16",
            "--calib",
            photos,
            "--target",
            "tensorrt-rtx",
        ),
        *("--preprocess", preprocess, "--out", tmp_path / "b.bundle"),
    )
    assert done.code == 0, done.json["error"]
    (engine,) = done.json["engines"]
    assert engine["gate"]["eager_metrics"]["sqnr"] > 55, "47 dB in half"


def test_a_weights_file_is_loaded_into_what_the_factory_makes(preprocess, tmp_path):
    trained = padded(num_classes=4)
    path = tmp_path / "net.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in trained.state_dict().items()}}, path)
    spec = resolved("padded", preprocess, weights=str(path), num_classes=4)
    built, _ = zoo.build(spec)
    assert torch.equal(built.head.weight, trained.head.weight)
    assert (spec.weights_kind, spec.num_classes) == ("file", 4)
    with pytest.raises(BadInputError, match="other shape"):
        zoo.build(resolved("padded", preprocess, weights=str(path)))


def test_the_same_seed_makes_the_same_network(preprocess):
    first, second, other = (
        zoo.build(resolved("padded", preprocess, seed=seed))[0].head.weight for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_changed_code_is_exported_anew(cli, preprocess, tmp_path, monkeypatch):
    code = tmp_path / "net.py"
    text = (
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(12288, 4), {})\n"
    )
    sizes = []
    for last in ("nn.Identity()", "nn.ReLU()"):
        code.write_text(text.format(last))
        done = cli(
            f"{code}:net", "--preprocess", preprocess, "--batch", "1:2:3", "--out", tmp_path / "b.bundle"
        )
        assert done.code == 0, done.json["error"]
        logits = export_zoo.load(tmp_path / "b.bundle").run(np.ones((1, 3, 64, 64), dtype=np.float32))
        sizes.append(float(logits.min()))
    assert sizes[0] < 0 <= sizes[1]


def test_a_project_may_have_folders_called_as_ours(preprocess, tmp_path):
    """The command, its networks, and a script there that exports and loads."""
    site, project, commands = (tmp_path / name for name in ("site", "project", "bin"))
    for folder in (site, commands, *(project / name for name in ("engines", "exporter", "calibration"))):
        folder.mkdir(parents=True)
    (site / "export_zoo").symlink_to(ROOT / "export_zoo")  # as installed, without what is beside it
    (commands / "export-zoo").write_text("from export_zoo.exporter.cli.app import run\nrun()\n")
    for name in ("engines", "exporter", "calibration"):
        (project / name / "__init__.py").write_text("")
    (project / "calibration" / "width.py").write_text("WIDTH = 6\n")
    (project / "engines" / "net.py").write_text(
        "from torch import nn\nfrom calibration.width import WIDTH\n"
        "def build():\n    return nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    shutil.copy(preprocess, project / "exporter" / "p.json")
    (project / "script.py").write_text(
        "from pathlib import Path\nimport numpy as np\nimport engines.net, exporter, export_zoo\n"
        "options = export_zoo.ExportOptions(\n"
        "    'engines.net:build', preprocess=Path('exporter/p.json'), out=Path('of-script.bundle'))\n"
        "engine = export_zoo.load(export_zoo.export(options).bundle)\n"
        "assert engine.run(np.zeros((2, 3, 64, 64), np.float32)).shape == (2, engines.net.WIDTH)\n"
    )
    command = [str(commands / "export-zoo"), "engines.net:build", "--preprocess", "exporter/p.json"]
    for program in (command, ["script.py"]):
        done = subprocess.run(
            [sys.executable, *program],
            cwd=project,
            env={**os.environ, "PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    for name in ("build.bundle", "of-script.bundle"):
        assert read_manifest(project / name).recipe.output.shape == ["batch", 6]


@pytest.mark.parametrize(
    ("model", "message", "hint"),
    [
        ("nets/none.py:build", "no such file", "FILE.py"),
        ("{}:pad", "has no function 'pad'", "padded"),
        ("{}:NOT_CALLABLE", "has no function", "returns the network"),
        ("{}:breaks", "raises RuntimeError: no licence server", "--model-arg"),
        ("{}:leaves", "raises SystemExit", "--model-arg"),
        ("{}:text", "returns str, not a torch.nn.Module", "network"),
        ("{}:Sum", r"output 'logits' is \[\] for 3 images", "outputs"),
        ("{}:Argmax", "something other than floating-point tensors", "logits"),
        (
            "{}:Gray",
            r"does not run on float32 \[3, 3, 64, 64\]: .* \(own_networks.py:\d+, `",
            "takes 1 channel(s)",
        ),
        (
            "{}:observed",
            r"is prepared or converted by torch\.ao\.quantization: conv is a Conv2d",
            "float network",
        ),
        ("{}:Two", r"output 'logits' is \[2, 3\] for 3 images", "outputs"),
        ("{}:Noisy", "output 'logits' differs between two runs on the same images$", "dropout"),
        ("{}:Trains", "puts norm into training mode", "eval mode"),
        (
            "{}:Branches",
            r"refuses the network at own_networks.py:\d+, `return x if x.sum\(\) > 0 else -x`: .*[Dd]ata-dependent",
            "torch.where",
        ),
        (
            "{}:NoStatistics",
            r"depends on the other images in its batch, .* module norm \(BatchNorm2d\)",
            "running",
        ),
        ("{}:Squeezed", r"output 'logits' is \[5\] for one image, not \[1, 5\]", "flatten(1)"),
        ("{}:Unrolled", "makes the number of images a constant, first at Concat", "loop over the images"),
        ("{}:scripted", "returns RecursiveScriptModule", "not scripted"),
        ("{}:Double", "output 'logits' is float64, not float32", ".float()"),
        ("{}:Masked", "output 'logits' is not finite", "-inf"),
        ("{}:unseeded", "has different weights each time it is built", "seed"),
        ("{}:Clashes", "output 'input' has the name of the input", "another name"),
        ("no.such.package:build", "module 'no' was not found", "FILE.py"),
        ("json:nothing", "has no function", "network"),
    ],
)
def test_what_is_no_network_is_refused_with_the_reason(cli, preprocess, tmp_path, model, message, hint):
    done = cli(model.format(NETWORKS), "--preprocess", preprocess, "--out", tmp_path / "out")
    assert done.code == 5
    assert re.search(message, done.json["error"]["message"]), done.json["error"]
    assert hint in done.json["error"]["hint"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        ("{}:", {}, "not FILE.py:FUNCTION"),
        (":build", {}, "not FILE.py:FUNCTION"),
        ("{}", {}, "names a file but no function"),
        ("{}:padded", {"model_args": (("num_classes", "9"),)}, "use --num-classes"),
        ("{}:padded", {"preprocess": None}, "user models need --preprocess FILE"),
        ("{}:padded", {"preprocess": None, "transforms": "DEFAULT"}, "user models need --preprocess FILE"),
        ("timm/resnet18", {"preprocess": None, "transforms": "DEFAULT"}, "--transforms: timm/resnet18 is no"),
        ("{}:padded", {"transform_input": True}, "--transform-input"),
        ("{}:padded", {"weights_key": "ema"}, "--weights-key: .* is exported without a weights file"),
        ("{}:padded", {"renames": (("a", "b"),)}, "--rename: .* is exported without a weights file"),
        ("{}:padded", {"skip_weights": ("a*",)}, "--skip-weights: .* is exported without a weights file"),
        ("{}:padded", {"init_missing": ("a*",)}, "--init-missing: .* is exported without a weights file"),
        ("{}:padded", {"allow_pickle": True}, "--allow-pickle: .* is exported without a weights file"),
    ],
)
def test_options_that_do_not_fit_are_refused(preprocess, model, given, message):
    with pytest.raises(UsageError, match=message):
        zoo.resolve(ExportOptions(model.format(NETWORKS), **{"preprocess": preprocess, **given}))


@pytest.mark.parametrize("given", [{"num_classes": 4}, {"model_args": (("colour", "red"),)}])
def test_an_argument_that_the_factory_does_not_take_is_named(preprocess, given):
    with pytest.raises(BadInputError, match=r"cannot be called with \(.*=") as error:
        resolved("breaks", preprocess, **given)
    assert "--num-classes" in error.value.hint


def test_code_that_does_not_import_is_named(preprocess, tmp_path):
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(BadInputError, match="cannot be imported: ModuleNotFoundError") as error:
        zoo.resolve(ExportOptions(f"{tmp_path / 'broken.py'}:build", preprocess=preprocess))
    assert "package.module:FUNCTION" in error.value.hint


def test_a_network_is_called_by_the_name_of_its_function():
    assert ExportOptions("nets/net.py:build", preprocess=Path("p.json")).out_dir == Path("build.bundle")
    assert ExportOptions("timm/resnet18").out_dir == Path("resnet18.bundle")
    assert ExportOptions("timm/resnet18.a1_in1k").short_name == "resnet18.a1_in1k"


def test_a_default_bundle_does_not_take_the_place_of_another_networks(cli, preprocess, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.py").write_text(f"from own_networks import Registered as build  # {name}\n")
    assert cli("a.py:build", *SMALL, "--preprocess", preprocess).code == 0
    before = (tmp_path / "build.bundle" / "manifest.json").read_bytes()
    other = cli("b.py:build", *SMALL, "--preprocess", preprocess)
    assert other.code == 2
    assert "build.bundle: holds the bundle of another network" in other.json["error"]["message"]
    assert (tmp_path / "build.bundle" / "manifest.json").read_bytes() == before
    assert cli("a.py:build", *SMALL, "--preprocess", preprocess).code == 0, "the same one again"
    (tmp_path / "v2").mkdir()
    shutil.copy(tmp_path / "a.py", tmp_path / "v2")
    assert cli("v2/a.py:build", *SMALL, "--preprocess", preprocess).code == 2, "the same name elsewhere"


def test_a_file_is_imported_once_and_again_when_it_changed(preprocess, tmp_path):
    """Registries take a name once."""
    path = tmp_path / "net.py"
    text = "import own_networks as o\nassert not hasattr(o, 'known_{0}')\no.known_{0} = True\n"
    path.write_text(text.format(1) + "def build(): return o.padded()\n")
    options = ExportOptions(f"{path}:build", preprocess=preprocess)
    assert zoo.build(zoo.resolve(options))[0](torch.zeros(1, 3, 64, 64)).shape == (1, 10)
    path.write_text(text.format(2) + "def build(): return o.padded(num_classes=7)\n")
    os.utime(path, ns=(0, 1))
    assert zoo.resolve(options).num_classes == 7


def test_a_module_of_a_file_is_not_changed_by_weights_that_are_loaded(preprocess, tmp_path):
    given = {name: torch.zeros_like(value) for name, value in padded().state_dict().items()}
    torch.save(given, tmp_path / "net.pth")
    plain = resolved("made", preprocess)
    zoo.build(resolved("made", preprocess, weights=str(tmp_path / "net.pth")))
    assert resolved("made", preprocess).weights_sha256 == plain.weights_sha256


def test_what_lies_beside_a_file_does_not_hide_the_standard_library(preprocess, tmp_path):
    (tmp_path / "profile.py").write_text("raise SystemExit('a script of the user')\n")
    (tmp_path / "net.py").write_text("from own_networks import padded as build\n")
    zoo.resolve(ExportOptions(f"{tmp_path / 'net.py'}:build", preprocess=preprocess))
    found = importlib.util.find_spec("profile")
    assert found is not None
    assert tmp_path not in Path(found.origin).parents


def test_lazy_layers_get_their_shapes(preprocess, tmp_path):
    spec = resolved("Lazy", preprocess)
    network, _ = zoo.build(spec)
    assert network.body[3].weight.shape == (6, 8 * 31 * 31)
    torch.save(network.state_dict(), tmp_path / "net.pth")
    again, _ = zoo.build(resolved("Lazy", preprocess, weights=str(tmp_path / "net.pth"), seed=3))
    assert torch.equal(again.body[3].weight, network.body[3].weight)


def test_mnasnet_as_a_part_takes_safetensors(preprocess, tmp_path):
    state = resolved_state("Inner", preprocess)
    save_file(state, tmp_path / "net.safetensors")
    network, _ = zoo.build(resolved("Inner", preprocess, weights=str(tmp_path / "net.safetensors")))
    assert torch.equal(network.state_dict()["body.classifier.1.weight"], state["body.classifier.1.weight"])


def resolved_state(function: str, preprocess: Path) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in zoo.build(resolved(function, preprocess))[0].state_dict().items()}


def test_random_weights_take_the_place_of_those_that_the_function_loads(preprocess):
    network, _ = zoo.build(resolved("trained", preprocess, weights="none"))
    assert network.first.weight.unique().numel() > 1
    network, _ = zoo.build(resolved("trained", preprocess))
    assert network.first.weight.unique().numel() == 1


@pytest.mark.parametrize("word", ["calibrate.py:build", "nets/export.py:net", "timm/inspect"])
def test_a_network_is_not_taken_for_a_mistyped_command(cli, word):
    assert "no command" not in cli(word, "--weights", "none").json["error"]["message"]


# -- several outputs ------------------------------------------------------------------------------------------------


def test_all_outputs_of_a_dictionary_are_compared(cli, photos, preprocess, tmp_path):
    done = cli(
        *(f"{NETWORKS}:TwoHeads", *SMALL, *INT8, "--calib", photos, "--preprocess", preprocess),
        *("--target", "onnxruntime", "--target", "tensorrt-rtx", "--out", tmp_path / "b.bundle"),
    )
    assert done.code == 0, done.json["error"]
    manifest = read_manifest(tmp_path / "b.bundle")
    assert [port.name for port in manifest.recipe.outputs] == ["species", "age"]
    assert [port.shape for port in manifest.recipe.outputs] == [["batch", 10], ["batch", 4]]
    for engine in manifest.artifacts.engines:
        figures = engine.gate.further["age"].eager_metrics
        assert figures["classes"] == 4
        assert figures["sqnr"] > 20
    assert "output age" in next(s["detail"] for s in done.json["stages"] if s["name"] == "verify")
    outputs = export_zoo.load(tmp_path / "b.bundle").run_all(np.ones((1, 3, 64, 64), dtype=np.float32))
    assert {name: value.shape for name, value in outputs.items()} == {"species": (1, 10), "age": (1, 4)}
    assert cli("verify", tmp_path / "b.bundle").code == 0


def test_outputs_that_other_layers_read_are_exact_and_their_readers_quantized(
    cli, photos, preprocess, tmp_path
):
    given = (
        f"--batch 1:2:3 --verify-images 32 --input-size 16 --tolerance top1=0 --tolerance misplaced={10**6}"
    )
    done = cli(
        *(f"{NETWORKS}:Taps", *given.split(), *INT8, "--calib", photos, "--preprocess", preprocess),
        *("--target", "onnxruntime", "--target", "tensorrt-rtx", "--out", tmp_path / "b.bundle"),
    )
    assert done.code == 0, done.json["error"]
    int8 = read_manifest(tmp_path / "b.bundle").artifacts.engines[2]
    assert int8.name == "onnxruntime-int8"
    figures = {name: further.eager_metrics["sqnr"] for name, further in int8.gate.further.items()}
    assert figures["image"] == 200.0
    assert figures["view"] == pytest.approx(figures["after"], abs=3)
    graph = onnx.load(tmp_path / "b.bundle" / int8.file.path)
    assert sum(node.op_type == "QuantizeLinear" for node in graph.graph.node) >= 3


def test_what_a_network_prints_is_no_result_and_its_names_are_kept(cli, photos, preprocess, tmp_path):
    done = cli(
        *(f"{NETWORKS}:Named", "--batch", "1:2:3", "--verify-images", "32", "--verify", photos),
        *("--preprocess", preprocess, "--out", tmp_path / "b.bundle"),
    )
    assert done.code == 0, done.json["error"]
    assert "made" in done.err
    assert "made" not in done.out
    assert "run" not in done.out.split()
    assert [p.name for p in read_manifest(tmp_path / "b.bundle").recipe.outputs] == ["scores", "features"]
    shown = cli("inspect", tmp_path / "b.bundle").out
    assert "features: float32 [batch, 8]" in shown


def test_what_compile_and_data_parallel_wrap_is_exported(preprocess):
    spec = resolved("wrapped", preprocess)
    assert "head.weight" in zoo.build(spec)[0].state_dict()


def test_half_precision_is_exported_as_float32_with_a_warning(preprocess):
    spec = resolved("half", preprocess)
    assert spec.notes == (
        f"{NETWORKS}:half: its weights are float16; they are exported and compared as float32",
    )
    assert zoo.build(spec)[0].head.weight.dtype is torch.float32
    assert resolved("padded", preprocess).notes == ()


def test_an_output_that_does_not_follow_the_size_is_refused(cli, preprocess, tmp_path):
    done = cli(
        *(
            f"{NETWORKS}:SameSize",
            "--preprocess",
            preprocess,
            "--dynamic-size",
            "64:64:96",
            "--batch",
            "1:2:3",
        ),
        *("--out", tmp_path / "out"),
    )
    assert done.code == 5
    assert re.search(r"--dynamic-size: at \d+x\d+, output logits is 64x64", done.json["error"]["message"])


def test_the_names_of_outputs_must_be_those_of_the_graph(cli, preprocess, tmp_path):
    bundle = tmp_path / "b.bundle"
    done = cli(f"{NETWORKS}:TwoHeads", "--preprocess", preprocess, "--batch", "1", "--out", bundle)
    assert done.code == 0, done.json["error"]
    document = json.loads((bundle / "manifest.json").read_text())
    document["recipe"]["further_outputs"][0]["name"] = "years"
    (bundle / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(BadInputError, match="outputs are species, age, the manifest's species, years"):
        export_zoo.load(bundle)
    document["recipe"]["further_outputs"][0]["name"] = "species"
    (bundle / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(BadInputError, match="damaged manifest"):
        export_zoo.load(bundle)


def test_images_and_sizes_of_a_wrong_kind_are_refused(digits_bundle, photos):
    engine, image = export_zoo.load(digits_bundle), next(photos.iterdir())
    for one in (image, str(image), image.read_bytes()):
        with pytest.raises(BadInputError, match="one image, not a list"):
            engine.preprocess(one)
    for size in (32, (32.0, 32), "32x32", (32, 32, 3)):
        with pytest.raises(BadInputError, match=r"not \(height, width\)"):
            engine.preprocess([image], size=size)


def test_an_engine_whose_second_output_is_wrong_fails_by_that_outputs_name(
    cli, photos, preprocess, tmp_path, monkeypatch
):
    from export_zoo.engines.targets.onnxruntime import engine

    class Broken(engine.OnnxRuntimeEngine):
        def run_all(self, batch):
            first, second = super().run_all(batch)
            return first, second[:, ::-1].copy()

    monkeypatch.setattr(engine, "OnnxRuntimeEngine", Broken)
    done = cli(
        *(f"{NETWORKS}:TwoHeads", *SMALL, "--verify", photos, "--preprocess", preprocess),
        *("--out", tmp_path / "b.bundle", "--no-cache"),
    )
    assert done.code == 3
    assert "output age: " in done.json["error"]["message"]
    assert "species" not in done.json["error"]["message"]


def test_further_outputs_may_be_of_another_kind_than_the_first(cli, photos, preprocess, tmp_path):
    done = cli(
        *(f"{NETWORKS}:Pixels", *SMALL, *INT8, "--calib", photos, "--preprocess", preprocess),
        *("--input-size", "96x80", "--out", tmp_path / "b.bundle"),
    )
    assert done.code == 0, done.json["error"]
    manifest = read_manifest(tmp_path / "b.bundle")
    assert [port.shape for port in manifest.recipe.outputs] == [["batch", 5, 96, 80], ["batch", 3]]
    assert [port.name for port in manifest.recipe.outputs] == ["logits", "output_1"]
    held = held_out(tmp_path / "b.bundle", manifest)
    assert held.logits.shape == (32, 5, 64, 64)
    engine = export_zoo.load(tmp_path / "b.bundle", engine="onnxruntime-fp32")
    batch = normalize(held.pixels[:2], manifest.recipe.preprocess)
    assert engine.run(batch).shape == (2, 5, 96, 80)
    np.testing.assert_allclose(sampled(engine.run(batch)), held.logits[:2], atol=1e-4)
    gate = manifest.artifacts.engines[0].gate
    assert (gate.metrics["images"], gate.metrics["pixels"]) == (32, 32 * 64 * 64)


def test_held_out_logits_of_a_missing_output_make_a_damaged_manifest(cli, preprocess, tmp_path):
    done = cli(
        f"{NETWORKS}:TwoHeads", "--preprocess", preprocess, "--batch", "1", "--out", tmp_path / "b.bundle"
    )
    assert done.code == 0, done.json["error"]
    path = tmp_path / "b.bundle" / "manifest.json"
    document = json.loads(path.read_text())
    document["artifacts"]["held_out"]["further"] = []
    path.write_text(json.dumps(document))
    done = cli("verify", tmp_path / "b.bundle")
    assert (done.code, "damaged manifest" in done.json["error"]["message"]) == (5, True)


def test_rows_and_columns_of_dense_outputs_are_looked_at_from_border_to_border():
    output = np.arange(2 * 3 * 100 * 40, dtype=np.float32).reshape(2, 3, 100, 40)
    seen = sampled(output)
    assert seen.shape == (2, *sampled_shape(output.shape[1:])) == (2, 3, 64, 40)
    np.testing.assert_array_equal(seen[:, :, [0, -1]], output[:, :, [0, -1]])
    assert as_rows(seen).shape == (2 * 64 * 40, 3)
    np.testing.assert_array_equal(as_rows(seen)[1], output[0, :, 0, 1])
    plain = np.ones((4, 10), dtype=np.float32)
    assert sampled(plain) is as_rows(plain) is plain


def test_eager_and_engine_agree_on_the_names_of_outputs(preprocess):
    assert [o.name for o in resolved("TwoHeads", preprocess).outputs] == ["species", "age"]
    assert [o.shape for o in resolved("Pixels", preprocess).outputs] == [(5, 64, 64), (3,)]
    with torch.inference_mode():
        assert list(TwoHeads()(torch.zeros(1, 3, 64, 64))) == ["species", "age"]
        assert len(Pixels()(torch.zeros(1, 3, 64, 64))) == 2


# -- the preprocessing file -----------------------------------------------------------------------------------------


def test_a_preprocessing_file_is_json_or_yaml_and_may_hold_labels(preprocess, tmp_path):
    as_json, none = read_preprocess(preprocess)
    path = tmp_path / "p.yaml"
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in PREPROCESS_FILE.items())
    path.write_text(lines + "labels: [cat, dog]\n")
    as_yaml, labels = read_preprocess(path)
    assert as_json.model_dump(exclude={"source"}) == as_yaml.model_dump(exclude={"source"})
    assert (none, labels) == ((), ("cat", "dog"))
    assert (as_json.source, as_yaml.source) == ("preprocess.json", "p.yaml")


def test_labels_of_the_file_reach_the_bundle_and_must_fit(cli, tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps({**PREPROCESS_FILE, "labels": list("abcdefg")}))
    done = cli(f"{NETWORKS}:Registered", *SMALL, "--preprocess", path, "--out", tmp_path / "b.bundle")
    assert done.code == 0, done.json["error"]
    assert read_manifest(tmp_path / "b.bundle").recipe.labels == list("abcdefg")
    done = cli(f"{NETWORKS}:padded", *SMALL, "--preprocess", path, "--out", tmp_path / "c.bundle")
    assert done.code == 5
    assert "7 labels, padded has 10 classes" in done.json["error"]["message"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": None}, "mean"),
        ({"mean": None, "means": [0.5, 0.5, 0.5]}, "means: Extra inputs"),
        ({"std": [0.1, 0.0, 0.1]}, "std"),
        ({"std": [0.1, 0.1]}, ".*mean has 3 and std 2 values"),
        ({"mean": [123.7, 116.3, 103.5]}, "mean: .*0..1 scale"),
        ({"interpolation": "nearest"}, "interpolation"),
        ({"crop_height": 0}, "crop_height"),
        ({"colour": "BGR"}, "colour"),
        ({"mean": [0.1, float("nan"), 0.1]}, "mean"),
    ],
)
def test_a_preprocessing_file_that_says_something_else_is_refused(tmp_path, change, message):
    path = tmp_path / "p.json"
    path.write_text(json.dumps({k: v for k, v in {**PREPROCESS_FILE, **change}.items() if v is not None}))
    with pytest.raises(BadInputError, match=f"--preprocess .*p.json: {message}") as error:
        read_preprocess(path)
    assert "docs/usage.md" in error.value.hint


@pytest.mark.parametrize("content", ["a: b: c", "[1, 2", "- 3", "", "\x00"])
def test_a_file_that_is_no_preprocessing_is_refused(tmp_path, content):
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(BadInputError, match="--preprocess"):
        read_preprocess(path)
    with pytest.raises(BadInputError, match="cannot be read"):
        read_preprocess(tmp_path / "none.json")


def test_a_zoo_model_takes_a_preprocessing_file_too(preprocess):
    spec = zoo.resolve(ExportOptions("resnet18", weights="none", preprocess=preprocess))
    assert spec.preprocess.mean == (0.5, 0.4, 0.3)
    spec = zoo.resolve(ExportOptions("resnet18", weights="none", preprocess=preprocess, input_size=(32, 32)))
    assert (spec.preprocess.crop_height, spec.preprocess.resize_size) == (32, 36)
    with pytest.raises(UsageError, match="--preprocess and --transforms"):
        ExportOptions("resnet18", preprocess=preprocess, transforms="DEFAULT")


def test_the_published_schema_is_that_of_the_code(capsys):
    main()
    schema = ROOT / "docs" / "preprocess.schema.json"
    assert json.loads(schema.read_text()) == json.loads(capsys.readouterr().out)
    import jsonschema

    jsonschema.validate(PREPROCESS_FILE, json.loads(schema.read_text()))
    assert PreprocessFile.model_validate(PREPROCESS_FILE).labels == []
