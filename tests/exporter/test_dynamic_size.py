"""`--dynamic-size`: graphs and engines whose height and width are open, checked at several sizes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torchvision import models
from tritonclient.grpc.model_config_pb2 import ModelConfig

import export_zoo
from export_zoo.base import graph_io
from export_zoo.base.errors import BadInputError, ExportDefectError, UsageError
from export_zoo.base.graph_io import sha256_of
from export_zoo.calibration.collect import collect
from export_zoo.calibration.preprocess import Preprocess, normalize
from export_zoo.calibration.synthetic import SyntheticStream, synthetic_images
from export_zoo.engines.bundle import reader
from export_zoo.engines.bundle.manifest import Batch
from export_zoo.engines.bundle.reader import HeldOut
from export_zoo.engines.parity.checked_sizes import odd_size, sizes_to_check
from export_zoo.engines.parity.limits import fitting
from export_zoo.engines.parity.tasks import Head
from export_zoo.engines.precision.int8.equalize import observed
from export_zoo.engines.precision.placement import classifier_layers
from export_zoo.engines.precision.registry import PRECISIONS
from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine
from export_zoo.engines.targets.registry import TARGETS, quantized_tensors
from export_zoo.engines.targets.tensorrt.build import build_engine
from export_zoo.engines.verification.gate import images_compared, judge
from export_zoo.exporter.graph import against_eager, simplify, to_onnx
from export_zoo.exporter.models import dynamic_size, zoo
from export_zoo.exporter.option_values import SizeRange
from export_zoo.exporter.options import ExportOptions
from export_zoo.exporter.stages.tuning import input_statistics

RTX = pytest.mark.skipif(bool(TARGETS["tensorrt-rtx"].unavailable), reason="tensorrt-rtx is not installed")
SIZES = SizeRange((8, 8), (16, 16), (32, 40))
PREPROCESS = Preprocess(
    resize_size=20,
    crop_height=16,
    crop_width=16,
    interpolation="bilinear",
    mean=(0.5, 0.5, 0.5),
    std=(0.2, 0.2, 0.2),
    source="test",
)


class Net(nn.Module):
    """As zoo networks are: strided convolution, residual branch, pooling, a pair to equalize, mean, dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.branch = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.pair = nn.Sequential(nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 1))
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.pool(torch.relu(x + self.branch(x)))
        return self.head(self.pair(x).mean((2, 3)))


class Fours(nn.Module):
    """Takes multiples of four."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        return self.head(x.reshape(n, c, h // 4, 4, w // 4, 4).amax((3, 5)).mean((2, 3)))


class Asks(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._assert(int(x.shape[2]) > 0, "Wrong height")
        return x if x.shape[2] > x.shape[3] else 2 * x


class Decides(nn.Module):
    """A network whose function depends on the size."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Asks()
        self.head = nn.Linear(3, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x).mean((2, 3)))


def _made(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return kind().eval()


def _inputs(height: int, width: int, count: int = 3) -> np.ndarray:
    return normalize(synthetic_images(count, PREPROCESS.at_size(height, width), 5), PREPROCESS)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[nn.Module, Path]:
    module = _made(Net)
    path = tmp_path_factory.mktemp("dynamic") / "model.onnx"
    to_onnx.export(module, 16, 16, path, sizes=SIZES)
    return module, path


@pytest.fixture(scope="module")
def sums(tmp_path_factory) -> Path:
    """A graph that is right at 16x16 only: the mean over height and width as a sum over a constant, 256."""
    path = tmp_path_factory.mktemp("sums") / "model.onnx"
    rng = np.random.default_rng(3)
    constants = {
        "axes": np.array([2, 3]),
        "area": np.array(256, dtype=np.float32),
        "weight": rng.normal(size=(3, 10)).astype(np.float32),
    }
    made = helper.make_graph(
        [
            helper.make_node("ReduceSum", ["input", "axes"], ["sum"], keepdims=0),
            helper.make_node("Div", ["sum", "area"], ["mean"]),
            helper.make_node("MatMul", ["mean", "weight"], ["logits"]),
        ],
        "main",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, "height", "width"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


class Means(nn.Module):
    """The network that `sums` is at 16x16."""

    def __init__(self) -> None:
        super().__init__()
        weight = np.random.default_rng(3).normal(size=(3, 10)).astype(np.float32)
        self.weight = nn.Parameter(torch.from_numpy(weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) @ self.weight


# -- the option ------------------------------------------------------------------------------------


def test_sizes_are_parsed():
    assert SizeRange.parse("64:96:160") == SizeRange((64, 64), (96, 96), (160, 160))
    found = SizeRange.parse("64x80:96:160x320")
    assert found == SizeRange((64, 80), (96, 96), (160, 320))
    assert str(found) == "64x80:96x96:160x320"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("64", "not MIN:OPT:MAX"),
        ("64:96", "not MIN:OPT:MAX"),
        ("64:96:160:200", "not MIN:OPT:MAX"),
        ("64:big:160", "'big': not N or HxW"),
        ("0:64:96", "'0': not N or HxW"),
        ("96:64:160", "MIN <= OPT <= MAX"),
        ("64x96:64:160", "MIN <= OPT <= MAX"),
        ("64:96:160x80", "MIN <= OPT <= MAX"),
        ("96:96:96", "MIN and MAX are the same size"),
        ("64:96:9000", "at most 8192"),
    ],
)
def test_what_is_no_range_of_sizes_is_refused(cli, text, message):
    done = cli("resnet18", "--weights", "none", "--dynamic-size", text)
    assert done.code == 2
    assert "--dynamic-size" in done.json["error"]["message"]
    assert message in done.json["error"]["message"]
    assert done.json["error"]["hint"]


def test_it_takes_the_place_of_the_input_size(cli):
    done = cli("resnet18", "--weights", "none", "--dynamic-size", "64:96:160", "--input-size", "64")
    assert done.code == 2
    assert "--dynamic-size and --input-size" in done.json["error"]["message"]
    assert ExportOptions("resnet18", dynamic_size=SIZES).crop_size == (16, 16)


def test_sizes_to_check_are_the_ends_and_an_odd_one_that_is_not_square():
    assert sizes_to_check((64, 64), (96, 96), (160, 160)) == [(64, 64), (101, 123), (160, 160)]
    assert sizes_to_check((64, 64), (64, 64), (160, 160)) == [(101, 123), (160, 160)]
    assert odd_size((224, 64), (224, 512)) == (224, 341)
    assert odd_size((64, 64), (65, 64)) is None
    assert sizes_to_check((64, 64), (64, 64), (65, 64)) == [(65, 64)]


def test_another_size_is_preprocessed_by_the_same_rule():
    there = PREPROCESS.at_size(32, 48)
    assert (there.resize_size, there.crop_height, there.crop_width) == (40, 32, 48)
    assert there.model_copy(update={"resize_size": 20, "crop_height": 16, "crop_width": 16}) == PREPROCESS


# -- what fixes a size -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "module", "hint"),
    [
        ("vit_b_32", "VisionTransformer", "--input-size"),
        ("swin_t", "SwinTransformer", "--input-size"),
        ("maxvit_t", "MaxVit", "--input-size"),
        ("vgg11", r"avgpool \(AdaptiveAvgPool2d\)", "--fully-convolutional"),
        ("alexnet", r"avgpool \(AdaptiveAvgPool2d\)", "--fully-convolutional"),
    ],
)
def test_networks_of_one_size_are_refused_by_name_and_reason(model, module, hint):
    with torch.device("meta"):
        built = models.get_model(model)
    with pytest.raises(UsageError, match=f"--dynamic-size: {model} .* {module}: ") as error:
        dynamic_size.check(built, model)
    assert hint in error.value.hint


@pytest.mark.parametrize("model", ["resnet18", "squeezenet1_1", "efficientnet_b0", "densenet121"])
def test_pooling_to_one_place_is_no_reason(model):
    with torch.device("meta"):
        dynamic_size.check(models.get_model(model), model)


@pytest.mark.parametrize("model", ["alexnet", "maxvit_t"])
def test_the_command_refuses_them_before_weights_are_downloaded(cli, model):
    done = cli(model, "--dynamic-size", "224:256:288")
    assert done.code == 2
    assert f"--dynamic-size: {model}" in done.json["error"]["message"]
    assert done.json["stages"] == []


def test_multiples_are_named(tmp_path):
    with pytest.raises(
        BadInputError, match=r"(?s)15x23, which lies in .*height = 4\*n, width = 4\*n"
    ) as error:
        to_onnx.export(
            _made(Fours), 16, 16, tmp_path / "model.onnx", sizes=SizeRange((8, 8), (16, 16), (24, 32))
        )
    assert "--input-size" in error.value.hint


def test_a_size_that_the_network_does_not_run_at_is_named(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 9), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    with pytest.raises(
        BadInputError, match="does not run at input 8x8, which lies in --dynamic-size 8x8:16x16"
    ):
        to_onnx.export(network.eval(), 16, 16, tmp_path / "model.onnx", sizes=SIZES)


def test_what_the_exporter_cannot_leave_open_is_one_line_with_the_module(tmp_path):
    with pytest.raises(UsageError) as error:
        to_onnx.export(_made(Decides), 16, 16, tmp_path / "model.onnx", sizes=SIZES)
    assert error.value.message.startswith(
        "--dynamic-size: the exporter cannot make height and width dynamic: "
    )
    assert "\n" not in error.value.message
    assert not (tmp_path / "model.onnx").exists()


# -- the graph -------------------------------------------------------------------------------------


def test_height_and_width_are_symbolic_and_the_logits_are_eagers_at_all_sizes(exported):
    module, path = exported
    (feed,) = onnx.load(path).graph.input
    dims = [d.dim_param or d.dim_value for d in feed.type.tensor_type.shape.dim]
    assert dims == ["batch", 3, "height", "width"]
    for height, width in ((8, 8), (9, 40), (16, 16), (31, 17), (32, 40)):
        assert against_eager.check_batches(path, module, _inputs(height, width)) < 1e-5


def test_without_the_option_the_size_is_fixed(tmp_path):
    to_onnx.export(_made(Net), 16, 16, tmp_path / "model.onnx")
    shape = onnx.load(tmp_path / "model.onnx").graph.input[0].type.tensor_type.shape
    assert [d.dim_value for d in shape.dim][1:] == [3, 16, 16]


def test_a_height_may_be_fixed_beside_a_width_that_is_not(tmp_path):
    module = _made(Net)
    to_onnx.export(module, 16, 24, tmp_path / "m.onnx", sizes=SizeRange((16, 16), (16, 24), (16, 64)))
    for width in (16, 33, 64):
        assert against_eager.check_batches(tmp_path / "m.onnx", module, _inputs(16, width)) < 1e-5


def test_a_graph_that_is_wrong_at_another_size_is_found(sums):
    assert against_eager.check_batches(sums, _made(Means), _inputs(16, 16)) < 1e-5
    with pytest.raises(ExportDefectError, match="at input 8x24"):
        against_eager.check_batches(sums, _made(Means), _inputs(8, 24))


def test_simplifying_keeps_the_logits_at_all_sizes(exported, tmp_path):
    module, path = exported
    done = simplify.simplify(path, tmp_path, _inputs(16, 16), _inputs(8, 8), _inputs(31, 17))
    assert done.warning == ""
    assert "GlobalAveragePool" in [node.op_type for node in onnx.load(done.files[0]).graph.node]
    for height, width in ((8, 8), (9, 40), (32, 40)):
        assert against_eager.check_batches(done.files[0], module, _inputs(height, width)) < 1e-5


def test_simplifying_that_changes_the_logits_of_one_size_is_found(sums, tmp_path):
    right = tmp_path / "model.onnx"
    to_onnx.export(_made(Means), 16, 16, right, sizes=SIZES)
    assert simplify._difference(sums, right, [_inputs(16, 16)]) < 1e-5
    assert simplify._difference(sums, right, [_inputs(16, 16), _inputs(8, 24)]) > 0.1


def test_ranges_are_those_of_the_fixed_graph(exported, tmp_path):
    # In several passes: what one image takes must be known.
    module, path = exported
    to_onnx.export(module, 16, 16, tmp_path / "fixed.onnx")
    fixed, dynamic = (
        collect(source, SyntheticStream(16, 1, PREPROCESS, 4), threads=1, budget=3 << 12)
        for source in (tmp_path / "fixed.onnx", path)
    )
    assert fixed.tensors == dynamic.tensors


def test_int8_finds_in_it_what_it_finds_in_the_fixed_graph(exported, tmp_path):
    module, path = exported
    to_onnx.export(module, 16, 16, tmp_path / "fixed.onnx")
    found = []
    for name, source in (("fixed", tmp_path / "fixed.onnx"), ("dynamic", path)):
        (tmp_path / name).mkdir()
        done = simplify.simplify(source, tmp_path / name, _inputs(16, 16))
        network = graph_io.load(done.files[0]).graph
        found.append((observed(network), quantized_tensors(network), classifier_layers(network)))
    assert found[0] == found[1]
    assert all(found[0])


def test_two_ranges_around_one_size_are_two_networks_to_the_cache():
    keys = [
        zoo.resolve(ExportOptions("resnet18", weights="none", dynamic_size=SizeRange.parse(text))).key()
        for text in ("64:96:160", "64:96:128")
    ]
    assert keys[0] != keys[1]


# -- the gate --------------------------------------------------------------------------------------


def _held(module: nn.Module, height: int, width: int, count: int = 32) -> HeldOut:
    pixels = synthetic_images(count, PREPROCESS.at_size(height, width), 9)
    with torch.inference_mode():
        return HeldOut(pixels, module(torch.from_numpy(normalize(pixels, PREPROCESS))).numpy())


@pytest.mark.parametrize("unfused", [False, True])
def test_an_engine_that_is_wrong_at_another_size_fails_with_the_size_named(sums, exported, unfused):
    done: list[int] = []
    module = _made(Means)
    at_opt, further = _held(module, 16, 16), [_held(module, 16, 16), _held(module, 8, 24)]

    def plain(pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        with torch.inference_mode():
            return (module(torch.from_numpy(normalize(pixels, PREPROCESS))).numpy(),)

    gate = judge(
        OnnxRuntimeEngine(sums),
        pixels=at_opt.pixels,
        eager={"logits": at_opt.logits},
        heads={"logits": Head(classes=at_opt.logits.shape[1])},
        labels=None,
        preprocess=PREPROCESS,
        batch=Batch(min=1, opt=4, max=8),
        tolerances=fitting(PRECISIONS["fp32"].tolerances, Head()),
        unfused=plain if unfused else None,
        sizes=[(held.pixels, {"logits": held.logits}) for held in further],
        progress=done.append,
    )
    assert gate.sizes == [(16, 16), (8, 24)]
    assert [text.split(":")[0] for text in gate.failures if "sqnr" in text] == [
        "size 8x24, batch 4",
        "size 8x24, batch 8",
    ]
    assert all(text.startswith("size 8x24") for text in gate.failures)
    assert sum(done) == images_compared(32, Batch(min=1, opt=4, max=8), 64)


# -- TensorRT --------------------------------------------------------------------------------------


@RTX
def test_tensorrt_gets_one_profile_for_batch_height_and_width(exported, tmp_path):
    build = {"target": "tensorrt-rtx", "batch": (1, 2, 4)}
    out = tmp_path / "engine.plan"
    assert build_engine(exported[1], out, sizes=(SIZES.min, SIZES.opt, SIZES.max), **build).version
    assert out.stat().st_size > 1000
    with pytest.raises(UsageError, match="profile"):
        build_engine(exported[1], out, **build)


# -- from the command to the bundle ----------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(digits, tmp_path_factory) -> Path:
    """Digits at 24 to 48 pixels, trained at 32: FP32 and INT8."""
    from export_zoo.exporter.cli.app import main

    out = tmp_path_factory.mktemp("dynamic") / "digits.bundle"
    weights = ["--weights", digits.weights["resnet18"], "--num-classes", "10", "--resize-size", "32"]
    given = ["resnet18", *weights, "--dynamic-size", "24:32:48", "--calib", digits.images, "--batch", "1:4:8"]
    given += ["--calib-images", "64", "--precision", "fp32", "--precision", "int8", "--target", "onnxruntime"]
    given += ["--steps", "round", "--method", "minmax"]
    if not TARGETS["tensorrt-rtx"].unavailable:
        given += ["--target", "tensorrt-rtx"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(input_statistics, "LARGEST", 600)  # layers with more inputs take half a minute to round
        assert main([*map(str, given), "--out", str(out), "--quiet"]) == 0
    return out


def _changed(bundle: Path, tmp_path: Path, change) -> Path:
    """A copy of a bundle with a changed manifest."""
    copy = tmp_path / "changed.bundle"
    shutil.copytree(bundle, copy)
    document = json.loads((copy / "manifest.json").read_text())
    change(document)
    (copy / "manifest.json").write_text(json.dumps(document))
    return copy


def test_every_engine_is_compared_at_all_sizes(bundle):
    manifest = reader.read_manifest(bundle)
    recipe, held = manifest.recipe, manifest.artifacts.held_out
    assert recipe.input.shape == ["batch", 3, "height", "width"]
    assert recipe.input_size is not None
    assert (recipe.input_size.min, recipe.input_size.opt, recipe.input_size.max) == (
        (24, 24),
        (32, 32),
        (48, 48),
    )
    assert (recipe.preprocess.crop_height, recipe.preprocess.crop_width) == (32, 32)
    further = [(24, 24), (33, 39), (48, 48)]
    assert [(part.height, part.width, part.count) for part in held.sizes] == [(*size, 32) for size in further]
    for engine in manifest.artifacts.engines:
        assert engine.gate.sizes == further
        assert engine.state == ("verified" if engine.target == "onnxruntime" else "graph verified")


def test_the_first_convolution_of_int8_stays_one_that_takes_odd_sizes(bundle, digits_bundle):
    operators = []
    for root in (bundle, digits_bundle):
        engine = reader.named(root, reader.read_manifest(root), "onnxruntime-int8")
        operators.append({node.op_type for node in onnx.load(root / engine.file.path).graph.node})
    assert "SpaceToDepth" not in operators[0]
    assert operators[1] - operators[0] == {"SpaceToDepth"}


def test_held_out_images_of_other_sizes_are_the_first_ones_resized(bundle, digits):
    manifest = reader.read_manifest(bundle)
    held = reader.held_out(bundle, manifest)
    by_hash = {sha256_of(path): path for path in digits.images.rglob("*.png")}
    first = [by_hash[sha256] for sha256 in manifest.artifacts.held_out.image_sha256[:32]]
    engine = export_zoo.load(bundle, engine="onnxruntime-fp32")
    for part in held.sizes:
        size = part.pixels.shape[1:3]
        inputs = engine.preprocess(first, size=size)
        assert np.array_equal(inputs, normalize(part.pixels, manifest.recipe.preprocess))
        logits = np.concatenate([engine.run(inputs[start : start + 8]) for start in range(0, 32, 8)])
        assert np.abs(logits - part.logits).max() < 1e-3 * np.abs(part.logits).max()


def test_an_engine_runs_at_any_size_in_the_range_and_at_no_other(bundle, digits):
    image = next(digits.images.rglob("*.png"))
    for name in ("onnxruntime-fp32", "onnxruntime-int8"):
        engine = export_zoo.load(bundle, engine=name)
        assert engine.preprocess([image]).shape == (1, 3, 32, 32)
        for size in ((24, 48), (25, 24), (37, 29)):
            assert np.isfinite(engine.run(engine.preprocess([image], size=size))).all()
        for size in ((23, 32), (32, 49)):
            with pytest.raises(BadInputError, match=f"{size[0]}x{size[1]} is outside .* 24x24 to 48x48"):
                engine.preprocess([image], size=size)
            with pytest.raises(BadInputError, match=f"{size[0]}x{size[1]} is outside .* 24x24 to 48x48"):
                engine.run(np.zeros((1, 3, *size), np.float32))


def test_a_bundle_of_one_size_takes_no_other(digits_bundle, digits):
    engine = export_zoo.load(digits_bundle)
    with pytest.raises(BadInputError, match="size 24x24: this bundle takes 32x32 only"):
        engine.preprocess([next(digits.images.rglob("*.png"))], size=(24, 24))


def test_verify_repeats_it_and_fails_where_one_size_is_wrong(cli, bundle, tmp_path):
    assert cli("verify", bundle).code == 0

    def swap(document) -> None:
        part = document["artifacts"]["held_out"]["sizes"][1]
        path = tmp_path / "changed.bundle" / part["logits"]["path"]
        np.save(path, np.load(path)[::-1])
        part["logits"] |= {"sha256": sha256_of(path), "size_bytes": path.stat().st_size}

    done = cli("verify", _changed(bundle, tmp_path, swap))
    assert done.code == 3
    assert "onnxruntime-fp32: size 33x39, batch 4: sqnr" in done.json["error"]["message"]
    assert "size 48x48" not in done.json["error"]["message"]


def test_inspect_shows_the_sizes(cli, bundle):
    done = cli("inspect", bundle)
    assert "[batch, 3, height, width] NCHW, 24x24 to 48x48, best at 32x32" in done.out
    assert "32 at 24x24, 32 at 33x39, 32 at 48x48" in done.out


def test_triton_is_told_that_they_are_open(cli, bundle, tmp_path):
    assert cli("triton", bundle, tmp_path / "models").code == 0
    text = (tmp_path / "models" / "resnet18" / "config.pbtxt").read_text()
    found = text_format.Parse(text, ModelConfig())
    assert list(found.input[0].dims) == [3, -1, -1]


@pytest.mark.parametrize(
    ("pointer", "value"),
    [
        (("recipe", "input_size"), None),
        (("recipe", "input_size", "opt"), [40, 40]),
        (("recipe", "input_size", "min"), [33, 24]),
        (("recipe", "input", "shape"), ["batch", 3, 32, 32]),
        (("artifacts", "held_out", "sizes"), []),
        (("recipe", "input_size", "max"), [56, 56]),
    ],
)
def test_sizes_that_do_not_belong_together_are_a_damaged_manifest(bundle, tmp_path, pointer, value):
    def change(document) -> None:
        *above, last = pointer
        for key in above:
            document = document[key]
        document[last] = value

    with pytest.raises(BadInputError, match="damaged manifest"):
        reader.read_manifest(_changed(bundle, tmp_path, change))


def test_manifests_from_before_are_valid(digits_bundle, tmp_path):
    def older(document) -> None:
        del document["recipe"]["input_size"], document["artifacts"]["held_out"]["sizes"]
        del document["recipe"]["source"]["fully_convolutional"]
        for engine in document["artifacts"]["engines"]:
            del engine["gate"]["sizes"]

    assert reader.read_manifest(_changed(digits_bundle, tmp_path, older)).recipe.input_size is None


def test_ranges_are_calibrated_at_opt_for_the_same_graph(cli, digits, bundle, tmp_path):
    given = ["--weights", digits.weights["resnet18"], "--num-classes", "10", "--resize-size", "32"]
    given += ["--calib", digits.images, "--dynamic-size", "24:32:48"]
    done = cli("calibrate", "resnet18", *given, "--out", tmp_path / "ranges.json")
    assert done.code == 0, done.json["error"]
    ranges = json.loads((tmp_path / "ranges.json").read_text())
    recipe = reader.read_manifest(bundle).recipe
    assert ranges["graph_sha256"] == recipe.graph.sha256
    assert ranges["preprocess"]["crop_height"] == 32
