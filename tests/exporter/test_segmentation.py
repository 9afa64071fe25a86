"""Semantic segmentation: logits for each pixel, and what is not supported."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.segmentation import (
    LRASPP_MobileNet_V3_Large_Weights,
    deeplabv3_mobilenet_v3_large,
    lraspp_mobilenet_v3_large,
)

from export_zoo.base.errors import BadInputError
from export_zoo.engines.bundle.reader import read_manifest
from export_zoo.exporter.models import zoo
from export_zoo.exporter.models.sources import torchvision_zoo
from export_zoo.exporter.options import ExportOptions

SMALL = ["--weights", "none", "--verify-images", "32", "--batch", "1:2:2", "--num-classes", "6"]


@pytest.mark.parametrize(
    ("model", "more", "outputs", "size", "engines"),
    [
        ("lraspp_mobilenet_v3_large", ["--precision", "fp32", "--precision", "int8"], ["out"], "96x64", 4),
        ("deeplabv3_mobilenet_v3_large", ["--model-arg", "aux_loss=true"], ["out", "aux"], "32", 2),
    ],
)
def test_every_output_of_a_segmentation_network_is_compared(
    cli, photos, tmp_path, model, more, outputs, size, engines
):
    done = cli(
        *(model, *SMALL, *more, "--input-size", size, "--calib", photos, "--calib-images", "16"),
        *("--target", "onnxruntime", "--target", "tensorrt-rtx", "--out", tmp_path / "b.bundle"),
    )
    assert done.code == 0, done.json["error"]
    manifest = read_manifest(tmp_path / "b.bundle")
    height, _, width = size.partition("x")
    shape = ["batch", 6, int(height), int(width or height)]
    assert [(port.name, port.shape) for port in manifest.recipe.outputs] == [
        (name, shape) for name in outputs
    ]
    assert len(manifest.artifacts.engines) == engines
    for engine in manifest.artifacts.engines:
        assert list(engine.gate.further) == outputs[1:]
        assert engine.gate.metrics["pixels"] == 32 * min(shape[2], 64) * min(shape[3], 64)
    assert cli("verify", tmp_path / "b.bundle").code == 0


def test_the_auxiliary_output_is_there_where_the_file_has_it(tmp_path):
    for auxiliary in (True, False):
        network = deeplabv3_mobilenet_v3_large(weights_backbone=None, aux_loss=auxiliary)
        torch.save(network.state_dict(), tmp_path / "net.pth")
        spec = zoo.resolve(
            ExportOptions(
                "deeplabv3_mobilenet_v3_large", weights=str(tmp_path / "net.pth"), input_size=(64, 64)
            )
        )
        assert [o.name for o in spec.outputs] == (["out", "aux"] if auxiliary else ["out"])
        built, _ = zoo.build(spec)
        with torch.inference_mode():
            assert list(built(torch.zeros(1, 3, 64, 64))) == [o.name for o in spec.outputs]


def test_the_preprocessing_is_that_of_the_weights_and_a_square_crop():
    preprocess = torchvision_zoo.preprocess_of(LRASPP_MobileNet_V3_Large_Weights.DEFAULT)
    assert (preprocess.resize_size, preprocess.crop_height, preprocess.crop_width) == (520, 520, 520)
    assert preprocess.mean == (0.485, 0.456, 0.406)


def test_building_a_segmentation_network_downloads_no_backbone(monkeypatch):
    def offline(*args, **kwargs):
        raise AssertionError("a download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    spec = zoo.resolve(ExportOptions("lraspp_mobilenet_v3_large", weights="none", input_size=(64, 64)))
    assert isinstance(zoo.build(spec)[0], type(lraspp_mobilenet_v3_large(weights_backbone=None)))
    assert spec.num_classes == 21


@pytest.mark.parametrize(
    ("model", "because", "instead"),
    [
        ("fasterrcnn_resnet50_fpn", "non-maximum suppression", "FILE.py:FUNCTION"),
        ("retinanet_resnet50_fpn_v2", "non-maximum suppression", "FILE.py:FUNCTION"),
        ("r3d_18", "clips", "torch.onnx.export"),
        ("raft_small", "two images", "torch.onnx.export"),
        ("quantized_resnet18", "quantized already", "--precision int8"),
    ],
)
def test_what_is_not_supported_says_why_and_what_to_do(model, because, instead):
    with pytest.raises(BadInputError, match=f"{model}.* is not supported, because .*{because}") as error:
        torchvision_zoo.check_model(model)
    assert instead in error.value.hint


def test_every_model_of_torchvision_is_known_or_refused_with_a_reason():
    from torchvision.models import list_models

    known = torchvision_zoo.model_names() + torchvision_zoo.segmentation_names()
    for name in set(list_models()) - set(known):
        with pytest.raises(BadInputError, match="because"):
            torchvision_zoo.check_model(name)
