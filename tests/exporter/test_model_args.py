"""`--model-arg`: variants that torchvision's functions make of the same classes."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch
from torch import nn
from torchvision import models

from export_zoo.base.errors import BadInputError, UsageError
from export_zoo.engines.bundle.reader import read_manifest
from export_zoo.exporter.models import zoo
from export_zoo.exporter.models.model_arguments import value_of
from export_zoo.exporter.models.sources import torchvision_zoo
from export_zoo.exporter.option_values import parse_model_args
from export_zoo.exporter.options import ExportOptions

SMALL = ["--weights", "none", "--input-size", "64", "--verify-images", "32", "--batch", "1:2:3"]


def built(model: str, *texts: str) -> nn.Module:
    options = ExportOptions(model, weights="none", input_size=(64, 64), model_args=parse_model_args(texts))
    return zoo.build(zoo.resolve(options))[0]


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def test_groups_and_width_make_a_resnext_of_a_resnet():
    assert shapes(built("resnet50", "groups=32", "width_per_group=4")) == shapes(models.resnext50_32x4d())


def test_lists_words_and_numbers_reach_the_function():
    dilated = built("resnet50", "replace_stride_with_dilation=[false, true, true]")
    assert dilated.layer4[1].conv2.dilation == (4, 4)
    assert built("mobilenet_v2", "width_mult=0.5").features[0][0].out_channels == 16
    assert built("vgg11", "dropout=0.25").classifier[2].p == 0.25


@pytest.mark.parametrize("text", ["GroupNorm(8)", "nn.GroupNorm(8)", "torch.nn.GroupNorm(8)"])
def test_layers_are_classes_of_torch_nn(text):
    assert torchvision_zoo.model_argument("norm_layer", text).func is nn.GroupNorm
    assert isinstance(torchvision_zoo.model_argument("norm_layer", text), partial)
    assert torchvision_zoo.model_argument("activation_layer", "SiLU") is nn.SiLU


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("eps", "1e-6", 1e-6),
        ("ratio", "1:4:8", "1:4:8"),
        ("answer", "no", "no"),
        ("n_layer", "12", 12),
        ("act_layer", "relu", "relu"),
        ("norm_layer", "LayerNorm2d", "LayerNorm2d"),
        ("norm_layer", "LayerNorm", nn.LayerNorm),
    ],
)
def test_values_are_those_of_yaml_1_2_and_other_networks_take_names_for_layers(key, text, value):
    assert value_of(key, text) == value


@pytest.mark.parametrize(("key", "text"), [("when", "2024-13-45"), ("norm_layer", "GrupNorm(8)")])
def test_what_is_neither_value_nor_layer_is_refused(key, text):
    with pytest.raises(UsageError, match=f"--model-arg {key}="):
        value_of(key, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zero_init_residual", "not KEY=VALUE"),
        ("=1", "not KEY=VALUE"),
        ("a-b=1", "not KEY=VALUE"),
        ("num_classes=10", "use --num-classes"),
        ("weights=DEFAULT", "use --weights"),
        ("norm_layer=os.system", "not a class of torch.nn"),
        ("norm_layer=Parameter", "not a class of torch.nn"),
        ("norm_layer=functional", "not a class of torch.nn"),
        ("groups=[1", "not a number"),
        ("groups=!!python/object:os.system {}", "not a number"),
    ],
)
def test_what_is_no_argument_is_refused(text, message):
    with pytest.raises(UsageError) as error:
        built("resnet18", text)
    assert "--model-arg" in error.value.message
    assert message in error.value.message


@pytest.mark.parametrize("text", ["colour=red", "groups=0", "width_per_group=wide"])
def test_what_the_function_does_not_take_is_refused_with_its_words(text):
    with pytest.raises(
        BadInputError, match=f"--model-arg {text}: resnet50 cannot be built with these arguments"
    ):
        built("resnet50", text)


@pytest.mark.parametrize(
    ("kept", "message"), [(dict, "Unexpected running stats"), (copy.copy, r"unexpected: bn1\.weight")]
)
def test_weights_of_the_plain_network_do_not_fit_a_variant(tmp_path, kept, message):
    """A plain dictionary has no versions of its modules: InstanceNorm2d then says itself what it does not take."""
    torch.save(kept(models.resnet18().state_dict()), tmp_path / "net.pth")
    options = ExportOptions(
        "resnet18",
        weights=str(tmp_path / "net.pth"),
        model_args=(("width_per_group", "64"), ("norm_layer", "InstanceNorm2d")),
    )
    with pytest.raises(BadInputError, match=message) as error:
        zoo.build(zoo.resolve(options))
    assert len(error.value.message) < 500


@pytest.mark.parametrize(
    ("model", "args"),
    [
        ("resnet50", ["replace_stride_with_dilation=[false,true,true]", "zero_init_residual=true"]),
        ("resnet18", ["norm_layer=GroupNorm(8)"]),
        ("resnet18", ["norm_layer=InstanceNorm2d"]),
        ("mobilenet_v2", ["width_mult=0.5", "round_nearest=4"]),
    ],
)
def test_variants_are_exported_to_verified_engines(cli, tmp_path, photos, model, args):
    given = [word for text in args for word in ("--model-arg", text)]
    done = cli(
        *("export", model, *SMALL, *given, "--calib", photos, "--precision", "fp32", "--precision", "int8"),
        *("--target", "onnxruntime", "--out", tmp_path / "b.bundle"),
    )
    assert done.code == 0, done.json["error"]
    assert all(text in done.json["stages"][0]["detail"] for text in args)
    manifest = read_manifest(tmp_path / "b.bundle")
    assert manifest.recipe.source.arguments == dict(text.split("=", 1) for text in args)
    assert {e.state for e in manifest.artifacts.engines} == {"verified"}
    assert json.loads((tmp_path / "b.bundle" / "manifest.json").read_text())["recipe"]["source"]["arguments"]
