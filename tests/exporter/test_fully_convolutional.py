"""`--fully-convolutional`: VGG and AlexNet whose Linear layers became convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from export_zoo.base.errors import BadInputError, UsageError
from export_zoo.engines.bundle.reader import read_manifest
from export_zoo.exporter.models import zoo
from export_zoo.exporter.options import ExportOptions


def built(model: str, size: int = 224, *, dense: bool = True) -> nn.Module:
    """With few classes: the networks are large enough as they are."""
    options = ExportOptions(
        model, weights="none", num_classes=10, input_size=(size, size), fully_convolutional=dense
    )
    return zoo.build(zoo.resolve(options))[0]


@pytest.mark.parametrize("model", ["alexnet", "vgg11", "vgg11_bn"])
def test_logits_at_the_original_size_are_those_of_the_original(model):
    plain, dense = built(model, dense=False), built(model)
    assert not [m for m in dense.modules() if isinstance(m, nn.Linear | nn.AdaptiveAvgPool2d)]
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        want, found = plain(x), dense(x)
    assert (found - want).abs().max() <= 1e-5 * want.abs().max()


def test_scores_of_a_larger_input_are_the_mean_over_its_windows():
    # AlexNet's feature map of 224x288 has 8 columns: three windows of 6, as if the image were scored three times.
    plain, dense = built("alexnet", dense=False), built("alexnet")
    x = torch.randn(1, 3, 224, 288, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        features = plain.features(x)
        assert features.shape[2:] == (6, 8)
        windows = [plain.classifier(features[..., i : i + 6].flatten(1)) for i in range(3)]
        want, found = torch.stack(windows).mean(0), dense(x)
    assert (found - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize(("model", "size"), [("alexnet", 222), ("vgg11", 223), ("alexnet", 32)])
def test_inputs_whose_feature_map_is_smaller_than_the_kernel_are_refused(model, size):
    with pytest.raises(BadInputError, match=rf"--fully-convolutional: .* input {size}x{size}") as error:
        built(model, size)
    assert "224x224" in error.value.hint


@pytest.mark.parametrize("model", ["resnet18", "vit_b_16", "squeezenet1_1"])
def test_other_models_are_refused_before_anything_is_downloaded(model):
    with pytest.raises(UsageError, match=f"--fully-convolutional: {model}") as error:
        zoo.resolve(ExportOptions(model, fully_convolutional=True))
    assert "leave it out" in error.value.hint


def test_it_is_another_network_to_the_cache():
    plain, dense = (
        zoo.resolve(ExportOptions("alexnet", weights="none", fully_convolutional=given)).key()
        for given in (False, True)
    )
    assert plain != dense


def test_the_bundle_says_so(cli, photos, tmp_path):
    done = cli(
        *("alexnet", "--fully-convolutional", "--weights", "none", "--num-classes", "10"),
        *("--verify", photos, "--verify-images", "32", "--batch", "4:8:8", "--out", tmp_path / "a.bundle"),
    )
    assert done.code == 0, done.json["error"]
    assert done.json["stages"][0]["detail"].endswith(", fully convolutional")
    manifest = read_manifest(tmp_path / "a.bundle")
    assert manifest.recipe.source.fully_convolutional
    assert manifest.artifacts.engines[0].state == "verified"
