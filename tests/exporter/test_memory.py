"""Expected peak memory: from shapes alone, listed, and refused beforehand where it is not free."""

from __future__ import annotations

import pytest
import torch
from torchvision.models import get_model

from export_zoo.base.errors import BadInputError, EnvironmentFailureError
from export_zoo.base.machine import available_memory
from export_zoo.exporter.models import memory, zoo
from export_zoo.exporter.options import ExportOptions

GIB = 1 << 30


def found(model: str, size: int = 64) -> memory.Footprint | None:
    return zoo.footprint(zoo.resolve(ExportOptions(model, weights="none", input_size=(size, size))))


@pytest.mark.parametrize(
    "model",
    [
        *("resnet18", "vit_b_32", "swin_t", "regnet_x_400mf", "googlenet"),
        pytest.param("maxvit_t", marks=pytest.mark.slow),
    ],
)
def test_weights_are_counted_as_they_are(model):
    size = 224 if model == "maxvit_t" else 64
    real, _ = zoo.build(zoo.resolve(ExportOptions(model, weights="none", input_size=(size, size))))
    footprint = found(model, size)
    assert footprint is not None
    assert footprint.weights == sum(4 * tensor.numel() for tensor in real.state_dict().values())


def test_the_largest_tensor_and_the_layers_are_those_of_a_run():
    sizes = []
    real = get_model("squeezenet1_1", weights=None).eval()
    for module in real.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda _, __, output: sizes.append(4 * output.numel()))
    with torch.inference_mode():
        real(torch.zeros(1, 3, 96, 96))
    footprint = found("squeezenet1_1", 96)
    assert footprint is not None
    assert (footprint.largest, footprint.layers) == (max(sizes), len(sizes))


def test_nothing_of_the_networks_size_is_allocated(monkeypatch):
    import psutil

    before = psutil.Process().memory_info().rss
    footprint = found("regnet_y_128gf", 64)
    assert footprint is not None
    assert footprint.weights > 2 * GIB
    assert psutil.Process().memory_info().rss - before < GIB // 4
    assert torch.empty(1).device.type == "cpu", "the context is left"


def test_more_weights_larger_batches_and_calibration_are_expected_to_take_more():
    small, large = memory.Footprint(10 << 20, 1 << 20, 50), memory.Footprint(500 << 20, 1 << 20, 50)
    wide = memory.Footprint(10 << 20, 64 << 20, 300)

    def expected(footprint, calibrated=False, batch=8):
        return memory.expected_bytes(footprint, calibrated=calibrated, batch=batch)

    assert expected(small) < expected(large)
    assert expected(wide) < expected(wide, batch=32)
    assert expected(wide, batch=1) < expected(wide, calibrated=True, batch=1)


@pytest.mark.slow
def test_a_model_that_does_not_fit_is_refused_before_anything_is_done(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: GIB)
    given = ["squeezenet1_1", "--weights", "none", "--input-size", "64", "--batch", "1:2:3"]
    done = cli(*given, "--out", tmp_path / "out")
    assert done.code == 7
    assert (
        "squeezenet1_1: is expected to take 1.6 GiB of memory, 1.0 GiB are free"
        in done.json["error"]["message"]
    )
    assert "--no-memory-check" in done.json["error"]["hint"]
    assert [stage["name"] for stage in done.json["stages"]] in ([], ["weights"])
    assert not (tmp_path / "out").exists()
    assert cli(*given, "--no-memory-check", "--out", tmp_path / "out").code == 0


def test_a_size_that_the_network_does_not_take_is_found_by_its_shapes():
    with pytest.raises(BadInputError, match="32x32") as error:
        found("inception_v3", 32)
    assert "--input-size" in error.value.hint


@pytest.mark.parametrize(
    ("files", "free"),
    [
        (
            {
                "memory.max": "3000000",
                "memory.current": "2000000",
                "memory.stat": "file 9\ninactive_file 500000\n",
            },
            1500000,
        ),
        ({"memory.max": "1000", "memory.current": "5000", "memory.stat": "inactive_file 0\n"}, 0),
        (
            {
                "memory/memory.limit_in_bytes": "4000000",
                "memory/memory.usage_in_bytes": "1000000",
                "memory/memory.stat": "cache 1\ntotal_inactive_file 100\n",
            },
            3000100,
        ),
    ],
)
def test_a_containers_limit_counts(tmp_path, files, free):
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert available_memory(tmp_path) == free


@pytest.mark.parametrize("limit", ["max", "", None])
def test_without_a_containers_limit_the_machines_memory_counts(tmp_path, limit):
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text("1")
        (tmp_path / "memory.stat").write_text("inactive_file 0\n")
    assert available_memory(tmp_path) > GIB // 8


def test_what_is_free_is_told_in_the_refusal(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 3 * GIB)
    memory.check("net", 3 * GIB)
    with pytest.raises(
        EnvironmentFailureError, match=r"net: is expected to take 3\.5 GiB .* 3\.0 GiB are free"
    ):
        memory.check("net", 7 * GIB // 2)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet18", "timm/resnet18.a1_in1k"])
def test_memory_is_checked_before_weights_are_downloaded(model, cli, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: GIB // 8)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("downloaded"))
    done = cli(model, "--weights", "DEFAULT", "--out", tmp_path / "out")
    assert done.code == 7
    assert "is expected to take" in done.json["error"]["message"]
    assert "--no-memory-check" in done.json["error"]["hint"]
