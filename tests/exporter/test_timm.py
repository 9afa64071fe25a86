"""timm's models by `timm/NAME`, preprocessed as timm does."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from export_zoo.base.errors import BadInputError, EnvironmentFailureError, UsageError
from export_zoo.calibration.preprocess import normalize, resize_and_crop
from export_zoo.engines.bundle.reader import read_manifest
from export_zoo.exporter.models import zoo
from export_zoo.exporter.models.sources import timm_zoo
from export_zoo.exporter.options import ExportOptions

timm = pytest.importorskip("timm")

SMALL = ["--weights", "none", "--input-size", "64", "--verify-images", "32", "--batch", "1:2:3"]


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_050", "dm_nfnet_f0"])
def test_the_preprocessing_is_timms_to_the_bit(photos, name):
    from timm.data import create_transform, resolve_data_config

    theirs = create_transform(
        **resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    )
    ours = timm_zoo.preprocess_of(name)
    for path in sorted(photos.iterdir())[:6]:
        image = Image.open(path).convert("RGB")
        mine = normalize(resize_and_crop(image, ours)[None], ours)[0]
        np.testing.assert_array_equal(mine, theirs(image).numpy())


@pytest.mark.parametrize(
    ("name", "precisions"),
    [
        ("resnet18", ["fp32", "fp16", "int8"]),
        ("vit_tiny_patch16_224", ["fp32", "int8"]),
        ("convnext_atto", ["int8"]),
    ],
)
def test_models_of_timm_end_verified(cli, photos, tmp_path, name, precisions):
    given = [word for precision in precisions for word in ("--precision", precision)]
    done = cli(
        *(f"timm/{name}", *SMALL, *given, "--calib", photos, "--target", "onnxruntime"),
        *("--out", tmp_path / "b.bundle"),
    )
    assert done.code == 0, done.json["error"]
    source = read_manifest(tmp_path / "b.bundle").recipe.source
    assert (source.zoo, source.name, source.weights.random) == ("timm", name, True)
    assert {engine["state"] for engine in done.json["engines"]} == {"verified"}


def test_a_file_of_timms_model_is_loaded(tmp_path):
    trained = timm.create_model("resnet10t", num_classes=6)
    torch.save({"state_dict_ema": trained.state_dict()}, tmp_path / "net.pth")
    options = ExportOptions(
        "timm/resnet10t", weights=str(tmp_path / "net.pth"), num_classes=6, input_size=(64, 64)
    )
    spec = zoo.resolve(options)
    built, report = zoo.build(spec)
    assert torch.equal(built.fc.weight, trained.fc.weight)
    assert (spec.num_classes, report.entry) == (6, "state_dict_ema")


def test_arguments_reach_timm():
    options = ExportOptions(
        "timm/resnet10t", weights="none", input_size=(64, 64), model_args=(("output_stride", "16"),)
    )
    assert zoo.build(zoo.resolve(options))[0].layer4[0].conv2.stride == (1, 1)
    with pytest.raises(BadInputError, match=r"timm/resnet10t: cannot be built: .*colour"):
        zoo.resolve(ExportOptions("timm/resnet10t", weights="none", model_args=(("colour", "red"),)))


def test_a_download_that_fails_says_what_to_do(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network\nmuch more")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        EnvironmentFailureError,
        match=r"download of its weights \(timm/resnet18.* on Hugging Face\) failed: no network$",
    ) as error:
        zoo.resolve(ExportOptions("timm/resnet18"))
    assert "--weights none" in error.value.hint


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(EnvironmentFailureError, match="timm cannot be imported") as error:
        zoo.resolve(ExportOptions("timm/resnet18"))
    assert "export-zoo[timm]" in error.value.hint


@pytest.mark.parametrize("name", ["resnet188", "resnet18.no_such_tag"])
def test_an_unknown_name_is_answered_with_near_ones(name):
    with pytest.raises(BadInputError, match=f"no model '{name}'") as error:
        zoo.resolve(ExportOptions(f"timm/{name}", weights="none"))
    assert "timm/resnet18" in error.value.hint


def test_a_crop_that_cannot_be_reproduced_is_refused_until_a_file_says_what_to_do(tmp_path):
    with pytest.raises(BadInputError, match="crop mode border") as error:
        zoo.resolve(ExportOptions("timm/deepseek_vit_412m_enc", weights="none"))
    assert "--preprocess" in error.value.hint


@pytest.mark.parametrize("given", [{"transforms": "DEFAULT"}, {"transform_input": True}])
def test_torchvisions_options_are_refused(given):
    with pytest.raises(UsageError, match="is not a torchvision model"):
        zoo.resolve(ExportOptions("timm/resnet18", weights="none", **given))


def test_every_model_has_a_preprocessing_or_a_reason():
    refused = []
    for name in timm.list_models():
        try:
            assert timm_zoo.preprocess_of(name).crop_height > 0
        except BadInputError:
            refused.append(name)
    assert len(refused) < 0.01 * len(timm.list_models())
