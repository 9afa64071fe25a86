"""Weights and the zoo: which file is which, what loads, what is refused, and random weights that compare."""

from __future__ import annotations

import os
import random
import re
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torchvision.models import WeightsEnum, get_model, get_model_weights

from export_zoo.base.errors import BadInputError, EnvironmentFailureError, ParityError, UsageError
from export_zoo.base.graph_io import sha256_of
from export_zoo.calibration.synthetic import synthetic_images
from export_zoo.engines.parity.metrics import check_reference
from export_zoo.exporter.graph.reference import eager_outputs
from export_zoo.exporter.models import zoo
from export_zoo.exporter.models.sources import torchvision_zoo
from export_zoo.exporter.models.spec import ModelSpec
from export_zoo.exporter.models.weights import state_dicts, weights_files
from export_zoo.exporter.options import ExportOptions

SMALL = "shufflenet_v2_x0_5"
"""1.4 million parameters, with BatchNorm and a head called `fc`."""


def _state_of(model: str, **arguments) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return dict(get_model(model, weights=None, **arguments).state_dict())


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """A state dict of the small model with ten classes. Do not change it in place."""
    return _state_of(SMALL, num_classes=10)


def _save(path: Path, content: object) -> Path:
    if path.suffix == ".safetensors":
        assert isinstance(content, dict)
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def _options(model: str = SMALL, **changes) -> ExportOptions:
    return ExportOptions(**{"model": model, "num_classes": 10, "input_size": (32, 32), **changes})


def _equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# -- reading ----------------------------------------------------------------------------------------------------

PREFIXES = ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_state_dict_is_read_and_its_wrappers_prefixes_removed(prefix, suffix, state, tmp_path):
    path = _save(tmp_path / f"net{suffix}", {prefix + name: tensor for name, tensor in state.items()})
    assert _equal(state_dicts.read_weights(path).state, state)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_state_dict_is_found_in_a_training_checkpoint(prefix, key, state, tmp_path):
    nested = {prefix + name: tensor for name, tensor in state.items()}
    checkpoint = {"epoch": 3, key: nested, "optimizer": {"lr": 0.1, "state": [1, 2]}, "best": 0.5}
    assert _equal(state_dicts.read_weights(_save(tmp_path / "net.pth", checkpoint)).state, state)


def test_a_prefix_of_some_names_only_is_part_of_the_names(tmp_path):
    mixed = {"module.weight": torch.ones(2), "head.weight": torch.zeros(2)}
    assert _equal(state_dicts.read_weights(_save(tmp_path / "net.pth", mixed)).state, mixed)


class _Exploit:
    """A pickle that makes a directory when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("nested", [False, True])
def test_a_pickle_of_arbitrary_objects_is_refused_and_runs_no_code(nested, state, tmp_path):
    marker = tmp_path / "marker"
    content = {**state, "hook": _Exploit(marker)}
    path = _save(tmp_path / "net.pth", {"state_dict": content} if nested else content)
    with pytest.raises(BadInputError, match="--weights") as caught:
        state_dicts.read_weights(path)
    assert str(path) in caught.value.message
    assert "state_dict" in caught.value.hint
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the pickle must be one that would have run"


def test_a_pickled_model_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="cannot be read as a state dict"):
        state_dicts.read_weights(_save(tmp_path / "net.pth", nn.Linear(2, 2)))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file_is_refused(share, suffix, state, tmp_path):
    path = _save(tmp_path / f"net{suffix}", state)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(BadInputError, match=r"cannot be read as a state dict: \S") as caught:
        state_dicts.read_weights(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ([1, 2], "list"),
        (torch.zeros(3), "Tensor"),
        (5, "int"),
        ({}, "dict"),
        ({"weight": 1}, "dict"),
        ({"weight": torch.zeros(2), "epoch": 3}, "dict"),
        ({"state_dict": {}}, "dict"),
        ({"model": [torch.zeros(2)]}, "dict"),
    ],
)
def test_what_is_no_state_dict_is_refused(content, kind, tmp_path):
    path = _save(tmp_path / "net.pth", content)
    with pytest.raises(BadInputError, match=f"holds a {kind}, not") as caught:
        state_dicts.read_weights(path)
    assert str(path) in caught.value.message
    assert "state_dict" in caught.value.hint


def test_an_empty_safetensors_file_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="not a mapping"):
        state_dicts.read_weights(_save(tmp_path / "net.safetensors", {}))


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
def test_text_with_the_suffix_of_weights_is_refused(name, tmp_path):
    (tmp_path / name).write_text("<html>404 not found</html>")
    with pytest.raises(BadInputError, match="cannot be read"):
        state_dicts.read_weights(tmp_path / name)


def test_a_file_that_cannot_be_read_ends_the_command_with_5(cli, tmp_path):
    (tmp_path / "net.pth").write_text("<html>404 not found</html>")
    sizes = ["--num-classes", "10", "--input-size", "32", "--resize-size", "32"]
    done = cli(SMALL, "--weights", tmp_path / "net.pth", *sizes, "--out", tmp_path / "out")
    assert done.code == 5, done.err
    assert f"--weights {tmp_path / 'net.pth'}: cannot be read" in done.json["error"]["message"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_weights_that_are_not_floating_point_are_named(dtype):
    from export_zoo.exporter.models.weights.state_dicts import load_into

    model = torch.nn.Linear(2, 3)
    state = {"weight": torch.ones(3, 2).to(dtype), "bias": torch.zeros(3)}
    with pytest.raises(BadInputError, match=rf"weight \({dtype}\)"):
        load_into(model, state, origin="odd.pth", init_missing=())


def test_checkpoints_of_torchs_quantization_are_recognized(tmp_path):
    from export_zoo.exporter.models.weights.state_dicts import Reading, load_into, read_weights

    float_weights = {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}
    observed = {
        **float_weights,
        "weight_fake_quant.scale": torch.ones(1),
        "activation_post_process.min_val": torch.ones(1),
    }
    path = tmp_path / "qat.pth"
    torch.save(observed, path)
    with pytest.raises(
        BadInputError, match=r"quantization-aware training .*: weight_fake_quant.scale"
    ) as caught:
        load_into(torch.nn.Linear(2, 3), read_weights(path).state, origin="qat.pth", init_missing=())
    options = re.findall(r"--skip-weights '(\S+)'", caught.value.hint)
    loaded = read_weights(path, Reading(skip=tuple(options)))
    model = torch.nn.Linear(2, 3)
    load_into(model, loaded.state, origin="qat.pth", init_missing=())
    assert torch.equal(model.weight, float_weights["weight"])
    torch.save({"fc.scale": torch.ones(1), "fc._packed_params._packed_params": (torch.ones(1), None)}, path)
    with pytest.raises(
        BadInputError, match=r"is a quantized checkpoint of torch\.ao\.quantization"
    ) as caught:
        read_weights(path)
    assert "before `convert`" in caught.value.hint


def test_text_and_misnamed_files_are_told_from_weights(tmp_path):
    from safetensors.torch import save_file

    from export_zoo.exporter.models.weights.state_dicts import read_weights

    (tmp_path / "text.pth").write_text("hello")
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").rename(tmp_path / "misnamed.pth")
    for name, says in (("text", "not a PyTorch file"), ("misnamed", "name it .safetensors")):
        with pytest.raises(BadInputError, match=says):
            read_weights(tmp_path / f"{name}.pth")


def test_a_weights_file_must_exist_and_have_a_known_suffix(tmp_path):
    (tmp_path / "net.ckpt").write_bytes(b"x")
    (tmp_path / "folder.pth").mkdir()
    for name, reason in (
        ("net.ckpt", "suffix"),
        ("folder.pth", "is a directory"),
        ("absent.pth", "no such file"),
    ):
        with pytest.raises(BadInputError, match=reason) as caught:
            zoo.resolve(_options(weights=str(tmp_path / name)))
        assert str(tmp_path / name) in caught.value.message
        assert ".safetensors" in caught.value.hint


# -- loading ----------------------------------------------------------------------------------------------------


def _small(num_classes: int = 10) -> nn.Module:
    return get_model(SMALL, weights=None, num_classes=num_classes)


def _load(model: nn.Module, state: dict[str, torch.Tensor], *init_missing: str) -> list[str]:
    return state_dicts.load_into(model, dict(state), origin="net.pth", init_missing=init_missing)


def test_a_fitting_state_dict_is_loaded_as_it_is(state):
    model = _small()
    assert not _equal(model.state_dict(), state)
    assert _load(model, state) == []
    assert _equal(dict(model.state_dict()), state)


def test_half_precision_weights_are_loaded_into_a_float32_model(state):
    model = _small()
    assert _load(model, {n: t.half() if t.is_floating_point() else t for n, t in state.items()}) == []
    assert model.fc.weight.dtype == torch.float32
    assert torch.equal(model.fc.weight, state["fc.weight"].half().float())


def test_missing_unexpected_and_misshapen_parameters_are_each_listed(state):
    broken = {n: t for n, t in state.items() if n not in ("conv1.0.weight", "conv5.1.running_mean")}
    broken |= {"head.weight": torch.zeros(2), "head.bias": torch.zeros(3)}
    broken |= {"fc.bias": torch.zeros(4), "conv5.0.weight": torch.zeros(1, 2, 3, 4)}
    with pytest.raises(BadInputError, match=r"--weights net\.pth") as caught:
        _load(_small(), broken)
    missing, unexpected, shape = caught.value.message.removeprefix("--weights net.pth: ").split("; ")
    assert missing == "missing: conv1.0.weight, conv5.1.running_mean"
    assert unexpected == "unexpected: head.weight, head.bias"
    assert shape.startswith("other shape: ")
    assert "fc.bias is [4], expected [10]" in shape
    assert "conv5.0.weight is [1, 2, 3, 4], expected [1024, 192, 1, 1]" in shape
    assert "--init-missing" in caught.value.hint


def test_a_long_list_of_parameters_is_cut_and_counted(state):
    with pytest.raises(BadInputError) as caught:
        _load(_small(), {"fc.weight": state["fc.weight"], "fc.bias": state["fc.bias"]})
    absent = len([name for name in state if "num_batches" not in name]) - 2
    assert f" and {absent - 6} more" in caught.value.message
    assert caught.value.message.count(", ") == 5


def test_parameters_of_another_network_are_refused(state):
    with pytest.raises(BadInputError, match=r"missing: .*unexpected: ") as caught:
        _load(get_model("squeezenet1_1", weights=None), state)
    assert "architecture" in caught.value.hint


def test_another_head_is_answered_with_the_classes_of_the_file(state, tmp_path):
    path = _save(tmp_path / "net.pth", state)
    given = {"weights": str(path), "resize_size": 32}
    with pytest.raises(BadInputError, match=r"fc\.weight is \[10, 1024\], expected \[1000, 1024\]") as caught:
        zoo.build(zoo.resolve(_options(num_classes=None, **given)))
    assert "--num-classes 10" in caught.value.hint
    assert "--init-missing 'fc.*'" in caught.value.hint

    model, report = zoo.build(zoo.resolve(_options(num_classes=10, **given)))
    initialized = report.initialized
    assert _equal(dict(model.state_dict()), state)
    assert initialized == []


def test_a_head_that_may_be_missing_is_initialized_by_the_seed(state, tmp_path):
    path = _save(tmp_path / "net.pth", state)
    options = _options(num_classes=5, weights=str(path), resize_size=32, init_missing=("fc.*",))
    spec = zoo.resolve(options)
    model, report = zoo.build(spec)
    initialized = report.initialized
    assert initialized == ["fc.bias", "fc.weight"]
    assert model.fc.weight.shape == (5, 1024)
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("fc.")}
    assert _equal(kept, {name: tensor for name, tensor in state.items() if not name.startswith("fc.")})
    again, _ = zoo.build(spec)
    assert _equal(model.state_dict(), again.state_dict())
    other, _ = zoo.build(replace(spec, seed=1))
    assert not torch.equal(model.fc.weight, other.fc.weight)


def test_a_head_that_is_absent_altogether_can_be_initialized(state):
    headless = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    assert _load(_small(5), headless, "fc.weight", "*.bias") == ["fc.bias", "fc.weight"]


@pytest.mark.slow
def test_initialized_parameters_are_named_in_warning_and_manifest(cli, tmp_path):
    model, _ = zoo.build(zoo.resolve(_options("squeezenet1_1", weights="none", num_classes=10)))
    path = _save(tmp_path / "net.safetensors", model.state_dict())
    given = ["--num-classes", "5", "--input-size", "64", "--init-missing", "classifier.1.*"]
    done = cli("squeezenet1_1", "--weights", path, *given, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    trained = done.json["recipe"]["source"]["weights"]
    assert trained["initialized"] == ["classifier.1.bias", "classifier.1.weight"]
    assert (trained["kind"], trained["random"]) == ("file", False)
    assert (trained["name"], trained["sha256"]) == ("net.safetensors", sha256_of(path))
    assert any("classifier.1.bias, classifier.1.weight" in warning for warning in done.json["warnings"])


@pytest.mark.parametrize("patterns", [["head.*"], ["fc.*", "head.*"], ["conv1.*", "fc.*"]])
def test_a_pattern_that_matches_nothing_missing_is_a_usage_error(patterns, state):
    useless = next(pattern for pattern in patterns if pattern != "fc.*")
    headless = (
        state if patterns == ["head.*"] else {n: t for n, t in state.items() if not n.startswith("fc.")}
    )
    with pytest.raises(UsageError, match=re.escape(f"--init-missing {useless}")) as caught:
        _load(_small(), headless, *patterns)
    assert caught.value.hint


def test_init_missing_excuses_neither_other_parameters_nor_unexpected_ones(state):
    headless = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    with pytest.raises(BadInputError, match=r"missing: conv1\.0\.weight$"):
        _load(_small(), {n: t for n, t in headless.items() if n != "conv1.0.weight"}, "fc.*")
    with pytest.raises(BadInputError, match=r": unexpected: fc\.scale$"):
        _load(_small(), {**headless, "fc.scale": torch.ones(1)}, "fc.*")


def test_a_head_with_a_bias_of_another_size_and_no_weight_is_refused(state):
    broken = {**state, "fc.bias": torch.zeros(4)}
    del broken["fc.weight"]
    with pytest.raises(BadInputError, match=r"missing: fc\.weight"):
        _load(_small(), broken)


def test_another_head_of_googlenet_is_answered_with_its_classes():
    trained = _state_of("googlenet", num_classes=10, aux_logits=True, init_weights=False)
    model = get_model("googlenet", weights=None, num_classes=1000, aux_logits=True, init_weights=False)
    with pytest.raises(BadInputError) as caught:
        _load(model, trained)
    assert "--num-classes 10" in caught.value.hint


def _tiny_vit(image_size: int = 32) -> nn.Module:
    sizes = {"patch_size": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    return torchvision.models.VisionTransformer(image_size=image_size, num_classes=10, **sizes).eval()


def test_another_position_embedding_is_answered_with_the_input_size():
    with pytest.raises(
        BadInputError, match=r"pos_embedding is \[1, 5, 16\], expected \[1, 17, 16\]"
    ) as caught:
        _load(_tiny_vit(64), _tiny_vit(32).state_dict())
    assert "--input-size" in caught.value.hint


def test_a_vit_saved_with_its_old_mlp_names_is_loaded():
    trained = dict(_tiny_vit().state_dict())
    old = {
        n.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): t
        for n, t in trained.items()
    }
    assert sum(".mlp.linear_" in name for name in old) == 8
    model = _tiny_vit()
    assert not _equal(model.state_dict(), trained)
    assert _load(model, old) == []
    assert _equal(dict(model.state_dict()), trained)


def test_an_old_vit_with_a_misshapen_mlp_is_refused():
    trained = dict(_tiny_vit().state_dict())
    old = {
        n.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): t
        for n, t in trained.items()
    }
    name = "encoder.layers.encoder_layer_0.mlp.linear_1.weight"
    with pytest.raises(BadInputError, match=r"mlp\.0\.weight"):
        _load(_tiny_vit(), {**old, name: torch.zeros(3, 3)})


def _tiny_densenet() -> nn.Module:
    return torchvision.models.DenseNet(4, (2, 2), num_init_features=8, num_classes=10).eval()


def test_a_densenet_saved_with_its_old_names_is_loaded():
    trained = {n: t for n, t in _tiny_densenet().state_dict().items() if "num_batches_tracked" not in n}
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", name): t for name, t in trained.items()
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    assert "features.denseblock2.denselayer2.conv.2.weight" in old
    assert sum(bool(re.search(r"\.(norm|conv)\.[12]\.", name)) for name in old) == 4 * 10
    model = _tiny_densenet()
    assert _load(model, old) == []
    loaded = {n: t for n, t in model.state_dict().items() if "num_batches_tracked" not in n}
    assert _equal(loaded, trained)


def test_a_batchnorm_saved_without_its_counter_is_loaded(state):
    old = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    assert len(old) < len(state)
    model = _small()
    assert _load(model, old) == []
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in old.items())


# -- which weights a file is -------------------------------------------------------------------------------------


def _publish(monkeypatch, model: str, files: dict[str, Path]) -> type[WeightsEnum]:
    """Make torchvision's weights of a model those of local files, by the hash in their URLs."""
    originals = get_model_weights(model)
    members = {
        name: replace(originals[name].value, url=f"https://example.org/{model}-{sha256_of(path)[:8]}.pth")
        for name, path in files.items()
    }
    published = WeightsEnum("Published", {**members, "DEFAULT": members[next(iter(files))]})
    monkeypatch.setattr(weights_files, "get_model_weights", lambda name: published)
    monkeypatch.setattr(torchvision_zoo, "get_model_weights", lambda name: published)
    return published


def test_a_file_with_the_content_of_torchvisions_weights_is_recognised_by_any_name(
    state, tmp_path, monkeypatch
):
    path = _save(tmp_path / "my-copy.pth", state)
    published = _publish(monkeypatch, SMALL, {"IMAGENET1K_V1": path})
    found = weights_files.local_file(path, SMALL)
    assert found.known is published["IMAGENET1K_V1"]
    assert found.sha256 == sha256_of(path)

    spec = zoo.resolve(ExportOptions(SMALL, weights=str(path)))
    assert (spec.weights_kind, spec.weights_name) == ("torchvision", "Published.IMAGENET1K_V1")
    assert spec.preprocess.source.startswith("Published.IMAGENET1K_V1.transforms()")
    assert (spec.num_classes, len(spec.labels), spec.labels[0]) == (1000, 1000, "tench")
    assert zoo.resolve(ExportOptions(SMALL, weights=str(path), num_classes=10)).labels == ()
    assert zoo.resolve(ExportOptions(SMALL, weights=str(path), init_missing=("fc.*",))).labels == ()


def test_the_content_tells_which_of_several_preprocessings_applies(tmp_path, monkeypatch):
    (tmp_path / "1.pth").write_bytes(b"first")
    (tmp_path / "2.pth").write_bytes(b"second")
    _publish(
        monkeypatch,
        "mobilenet_v2",
        {"IMAGENET1K_V1": tmp_path / "1.pth", "IMAGENET1K_V2": tmp_path / "2.pth"},
    )
    for name, resize in (("1.pth", 256), ("2.pth", 232)):
        assert (
            zoo.resolve(ExportOptions("mobilenet_v2", weights=str(tmp_path / name))).preprocess.resize_size
            == resize
        )


@pytest.mark.parametrize("name", ["resnet18-f37072fd.pth", "resnet18-f37072fd.pt", "copy-of-f37072fd.pth"])
def test_a_name_that_promises_torchvisions_weights_must_keep_it(name, tmp_path):
    (tmp_path / name).write_bytes(b"something else")
    with pytest.raises(BadInputError, match=r"ResNet18_Weights\.IMAGENET1K_V1") as caught:
        weights_files.local_file(tmp_path / name, "resnet18")
    assert "f37072fd" in caught.value.message
    assert sha256_of(tmp_path / name)[:8] in caught.value.message
    assert "rename" in caught.value.hint


@pytest.mark.parametrize("name", ["resnet18.pth", "resnet18-00000000.pth", "resnet34-b627a593.pth"])
def test_a_name_that_promises_nothing_of_this_model_is_just_a_name(name, tmp_path):
    (tmp_path / name).write_bytes(b"something else")
    assert weights_files.local_file(tmp_path / name, "resnet18").known is None
    spec = zoo.resolve(ExportOptions("resnet18", weights=str(tmp_path / name)))
    assert (spec.weights_kind, spec.weights_name, spec.labels) == ("file", name, ())


def test_the_key_of_a_model_depends_on_the_files_content_and_not_on_its_place(tmp_path):
    for folder, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "net.pth").write_bytes(content)
    a, b, c = (zoo.resolve(_options(weights=str(tmp_path / f / "net.pth"))).key() for f in "abc")
    assert a == b != c


def _weights_at(url: str) -> SimpleNamespace:
    return SimpleNamespace(url=url)


def test_weights_are_downloaded_once_and_checked_by_their_hash(state, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    path = _save(tmp_path / "server.pth", state)
    path = path.rename(tmp_path / f"net-{sha256_of(path)[:8]}.pth")
    source = _weights_at(path.as_uri())
    found = weights_files.downloaded(source)
    assert found.path == tmp_path / "torch" / "hub" / "checkpoints" / path.name
    assert found.path.read_bytes() == path.read_bytes()
    assert found.known is source
    path.unlink()
    assert weights_files.downloaded(source) == found

    found.path.write_bytes(b"damaged")
    with pytest.raises(BadInputError, match="damaged") as caught:
        weights_files.downloaded(source)
    assert str(found.path) in caught.value.message
    assert "delete" in caught.value.hint


def test_a_download_with_another_hash_is_refused_and_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    path = tmp_path / "net-00000000.pth"
    path.write_bytes(b"not what the name says")
    with pytest.raises(EnvironmentFailureError, match=r"invalid hash value") as caught:
        weights_files.downloaded(_weights_at(path.as_uri()))
    assert path.as_uri() in caught.value.message
    assert "--weights ./net-00000000.pth" in caught.value.hint
    assert not [p for p in (tmp_path / "torch").rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    "name", ["DEFAULT", "IMAGENET1K_V2", "ResNet50_Weights.IMAGENET1K_V2", "ResNet50_Weights.DEFAULT"]
)
def test_weights_are_found_by_name(name):
    from torchvision.models import ResNet50_Weights

    assert weights_files.by_name("resnet50", name, option="--weights") is ResNet50_Weights.IMAGENET1K_V2


@pytest.mark.parametrize(
    "name", ["IMAGENET1K_V3", "imagenet1k_v1", "ResNet18_Weights.IMAGENET1K_V1", "X.DEFAULT"]
)
def test_a_wrong_name_of_weights_is_answered_with_the_right_ones(name):
    with pytest.raises(BadInputError, match=f"--weights {name}: resnet50") as caught:
        zoo.resolve(ExportOptions("resnet50", weights=name))
    assert "IMAGENET1K_V1, IMAGENET1K_V2" in caught.value.hint


def test_a_wrong_name_of_transforms_is_answered_with_what_that_option_takes():
    with pytest.raises(BadInputError, match="--transforms IMAGENET1K_V3") as caught:
        zoo.resolve(ExportOptions("resnet50", weights="none", transforms="IMAGENET1K_V3"))
    assert "IMAGENET1K_V1, IMAGENET1K_V2" in caught.value.hint
    assert "file" not in caught.value.message + caught.value.hint


# -- preprocessing ------------------------------------------------------------------------------------------------


@pytest.fixture
def unknown(tmp_path) -> str:
    """A weights file that is none of torchvision's."""
    (tmp_path / "net.pth").write_bytes(b"fine-tuned")
    return str(tmp_path / "net.pth")


@pytest.mark.parametrize("model", ["mobilenet_v2", "resnet50"])
@pytest.mark.parametrize("size", [None, (32, 32)])
def test_a_file_that_could_have_several_preprocessings_must_be_told(size, model, unknown):
    with pytest.raises(UsageError, match=f"--weights {unknown}") as caught:
        zoo.resolve(ExportOptions(model, weights=unknown, input_size=size))
    crop, first, second = (224, 256, 232) if size is None else (32, 37, 33)
    assert f"IMAGENET1K_V1 (resize {first}, crop {crop}, bilinear, mean" in caught.value.message
    assert f"IMAGENET1K_V2 (resize {second}, crop {crop}, bilinear, mean" in caught.value.message
    assert "--transforms IMAGENET1K_V1" in caught.value.hint


@pytest.mark.parametrize("model", ["mobilenet_v2", "resnet50"])
def test_transforms_tells_the_preprocessing(model, unknown):
    for name, resize in (("IMAGENET1K_V1", 256), ("IMAGENET1K_V2", 232), ("DEFAULT", 232)):
        spec = zoo.resolve(ExportOptions(model, weights=unknown, transforms=name))
        assert spec.preprocess.resize_size == resize
        assert spec.weights_kind == "file"


@pytest.mark.parametrize("model", ["mobilenet_v2", "resnet50"])
def test_sizes_that_make_all_preprocessings_equal_need_no_transforms(model, unknown):
    spec = zoo.resolve(ExportOptions(model, weights=unknown, input_size=(32, 48), resize_size=40))
    p = spec.preprocess
    assert (p.crop_height, p.crop_width, p.resize_size, p.interpolation) == (32, 48, 40, "bilinear")


def test_sizes_do_not_decide_between_interpolations(unknown):
    with pytest.raises(UsageError, match=r"bilinear.*bicubic"):
        zoo.resolve(ExportOptions("vit_b_16", weights=unknown, input_size=(32, 32), resize_size=32))
    options = {"weights": unknown, "input_size": (32, 32), "resize_size": 32}
    spec = zoo.resolve(ExportOptions("vit_b_16", transforms="IMAGENET1K_SWAG_LINEAR_V1", **options))
    assert spec.preprocess.interpolation == "bicubic"


def test_preprocessings_to_choose_from_do_not_look_alike(unknown):
    with pytest.raises(UsageError) as caught:
        zoo.resolve(ExportOptions("vgg16", weights=unknown))
    shown = caught.value.message.rpartition("trained with: ")[2]
    descriptions = [choice.partition(" ")[2] for choice in shown.split("; ")]
    assert len(descriptions) == len(set(descriptions)) == 2


@pytest.mark.parametrize(
    ("model", "size", "resize"),
    [
        ("resnet18", None, 256),
        ("resnet18", (112, 112), 128),
        ("resnet18", (448, 448), 512),
        ("resnet18", (32, 32), 37),
        ("resnet18", (112, 224), 128),
        ("resnet18", (224, 112), 128),
        ("inception_v3", (150, 150), 172),
        ("swin_t", (112, 112), 116),
    ],
)
def test_the_resize_keeps_its_proportion_to_the_input(model, size, resize):
    p = zoo.resolve(ExportOptions(model, weights="none", input_size=size)).preprocess
    assert p.resize_size == resize
    if size is not None:
        assert (p.crop_height, p.crop_width) == size
        assert "sizes from options" in p.source


def test_a_resize_that_was_given_is_kept():
    p = zoo.resolve(ExportOptions("resnet18", weights="none", input_size=(32, 32), resize_size=99)).preprocess
    assert (p.crop_height, p.resize_size) == (32, 99)
    p = zoo.resolve(ExportOptions("resnet18", weights="none", resize_size=99)).preprocess
    assert (p.crop_height, p.resize_size) == (224, 99)


@pytest.mark.parametrize("model", torchvision_zoo.model_names())
def test_every_model_has_a_preprocessing_for_all_its_weights(model):
    for entry in get_model_weights(model):
        theirs, ours = entry.transforms(), torchvision_zoo.preprocess_of(entry)
        assert [ours.crop_height] == [ours.crop_width] == theirs.crop_size
        assert [ours.resize_size] == theirs.resize_size
        assert ours.interpolation == theirs.interpolation.value
        assert (list(ours.mean), list(ours.std)) == (list(theirs.mean), list(theirs.std))
        assert str(entry) in ours.source


def test_transforms_that_are_not_a_classifiers_are_refused():
    from torchvision.models.video import R3D_18_Weights

    with pytest.raises(BadInputError, match="cannot be reproduced"):
        torchvision_zoo.preprocess_of(R3D_18_Weights.DEFAULT)


# -- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("resnet_50", "resnet50"),
        ("ResNet18", "resnet18"),
        ("mobilenetv2", "mobilenet_v2"),
        ("vit-b-16", "vit_b_16"),
    ],
)
def test_an_unknown_model_is_answered_with_near_names(typed, meant):
    with pytest.raises(BadInputError, match=typed) as caught:
        torchvision_zoo.check_model(typed)
    assert "did you mean" in caught.value.hint
    assert meant in caught.value.hint
    assert "export-zoo list" in caught.value.hint


def test_a_name_like_no_model_is_answered_with_the_list():
    with pytest.raises(BadInputError, match="unknown model") as caught:
        torchvision_zoo.check_model("zzzzzzzz")
    assert "did you mean" not in caught.value.hint
    assert "export-zoo list" in caught.value.hint


def test_all_classification_models_of_torchvision_are_known():
    names = torchvision_zoo.model_names()
    assert len(names) == len(set(names)) >= 80
    for name in names:
        torchvision_zoo.check_model(name)
        assert "categories" in get_model_weights(name)["DEFAULT"].meta


@pytest.mark.parametrize("model", [name for name in torchvision_zoo.model_names() if name.startswith("vit_")])
def test_a_vit_takes_square_inputs_only(model):
    with pytest.raises(UsageError, match=f"--input-size: {model} .*square"):
        zoo.resolve(ExportOptions(model, weights="none", input_size=(64, 32)))
    assert zoo.resolve(ExportOptions(model, weights="none", input_size=(64, 64))).preprocess.crop_width == 64


def test_a_vit_is_built_for_its_input_size():
    model, _ = zoo.build(zoo.resolve(_options("vit_b_32", weights="none", input_size=(64, 64))))
    assert model.encoder.pos_embedding.shape == (1, 5, 768)


def test_classes_are_those_of_the_zoo_unless_given(unknown):
    for chosen in ("none", unknown):
        spec = zoo.resolve(ExportOptions("resnet18", weights=chosen))
        assert (spec.num_classes, spec.labels) == (1000, ())
        spec = zoo.resolve(ExportOptions("resnet18", weights=chosen, num_classes=7))
        assert (spec.num_classes, spec.labels) == (7, ())
    assert zoo.build(zoo.resolve(_options("resnet18", weights="none", num_classes=7)))[0].fc.out_features == 7


# -- transform_input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["googlenet", "inception_v3"])
def test_transform_input_is_on_for_trained_weights_and_off_for_random_ones(model, unknown):
    for chosen, default in ((unknown, True), ("none", False)):
        assert zoo.resolve(ExportOptions(model, weights=chosen)).transform_input is default
        for given in (True, False):
            options = ExportOptions(model, weights=chosen, transform_input=given)
            assert zoo.resolve(options).transform_input is given


@pytest.mark.parametrize("model", ["resnet18", "vit_b_32", "squeezenet1_1"])
def test_transform_input_is_refused_for_other_models(model):
    assert zoo.resolve(ExportOptions(model, weights="none")).transform_input is None
    for given in (True, False):
        with pytest.raises(UsageError, match=f"--transform-input: {model}") as caught:
            zoo.resolve(ExportOptions(model, weights="none", transform_input=given))
        assert "googlenet and inception_v3" in caught.value.hint


@pytest.fixture(scope="module")
def googlenet_file(tmp_path_factory) -> Path:
    """GoogLeNet with ten classes and both auxiliary heads, as torchvision publishes it."""
    model, _ = zoo.build(zoo.resolve(_options("googlenet", weights="none", input_size=(64, 64))))
    state = _state_of("googlenet", num_classes=10, aux_logits=True, init_weights=False) | model.state_dict()
    return _save(tmp_path_factory.mktemp("googlenet") / "net.safetensors", state)


def _googlenet(path: Path, transform_input: bool | None = None) -> nn.Module:
    options = _options("googlenet", weights=str(path), input_size=(64, 64), transform_input=transform_input)
    return zoo.build(zoo.resolve(options))[0]


def test_transform_input_changes_the_logits_as_torchvision_means_it(googlenet_file):
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 3, 64, 64)).astype(np.float32))
    std, mean = torch.tensor([0.229, 0.224, 0.225]), torch.tensor([0.485, 0.456, 0.406])
    other_statistics = (x * std.view(3, 1, 1) + mean.view(3, 1, 1) - 0.5) / 0.5
    with torch.inference_mode():
        default, on, off = (_googlenet(googlenet_file, given)(x) for given in (None, True, False))
        same = _googlenet(googlenet_file, False)(other_statistics)
    assert torch.equal(default, on)
    assert not torch.allclose(on, off, atol=0.05 * float(on.std()))
    assert torch.allclose(on, same, atol=1e-4 * float(on.std()))


def test_googlenet_is_loaded_with_and_without_its_auxiliary_heads(googlenet_file, tmp_path):
    state = state_dicts.read_weights(googlenet_file).state
    plain = {name: tensor for name, tensor in state.items() if not name.startswith("aux")}
    assert len(plain) < len(state)
    path = _save(tmp_path / "plain.safetensors", plain)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, 64, 64)).astype(np.float32))
    with torch.inference_mode():
        assert torch.equal(_googlenet(path)(x), _googlenet(googlenet_file)(x))


# -- random weights ---------------------------------------------------------------------------------------------------

RANDOM = {
    "resnet18": 64,
    "mobilenet_v2": 64,
    "googlenet": 64,
    SMALL: 64,
    "efficientnet_b0": 64,
    "squeezenet1_1": 64,
    "vit_b_32": 32,
    "convnext_tiny": 64,
}


def _random_spec(model: str, **changes) -> ModelSpec:
    size = RANDOM[model]
    return zoo.resolve(_options(model, weights="none", input_size=(size, size), **changes))


@pytest.mark.parametrize("model", RANDOM)
def test_random_weights_give_logits_that_vary_with_the_image(model):
    spec = _random_spec(model)
    assert (spec.weights_kind, spec.weights_sha256, spec.weights_path) == ("random", "", None)
    built, report = zoo.build(spec)
    initialized = report.initialized
    assert initialized == []
    assert not any(module.training for module in built.modules())
    pixels = synthetic_images(24, spec.preprocess, seed=99)
    logits = eager_outputs(built, pixels, spec.preprocess)[0]
    assert logits.shape == (24, 10)
    check_reference(logits)
    assert len({int(row.argmax()) for row in logits}) > 1, "the same class for every image"


def test_a_vit_as_torchvision_initializes_it_would_compare_nothing():
    spec = _random_spec("vit_b_32")
    plain = get_model("vit_b_32", weights=None, num_classes=10, image_size=32).eval()
    with pytest.raises(ParityError, match="hardly vary"):
        check_reference(
            eager_outputs(plain, synthetic_images(8, spec.preprocess, seed=99), spec.preprocess)[0]
        )


@pytest.mark.parametrize("model", ["resnet18", SMALL, "squeezenet1_1"])
def test_random_weights_follow_the_seed_and_nothing_else(model):
    first = dict(zoo.build(_random_spec(model))[0].state_dict())
    torch.manual_seed(12345)
    np.random.seed(12345)
    assert _equal(first, dict(zoo.build(_random_spec(model))[0].state_dict()))
    assert not _equal(first, dict(zoo.build(_random_spec(model, seed=1))[0].state_dict()))


@pytest.mark.parametrize("chosen", ["none", "file"])
def test_building_a_model_does_not_disturb_the_random_number_generators(chosen, state, tmp_path):
    options = _options(weights="none")
    if chosen == "file":
        path = str(_save(tmp_path / "net.pth", state))
        options = _options(weights=path, num_classes=5, resize_size=32, init_missing=("fc.*",))
    spec = zoo.resolve(options)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    zoo.build(spec)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_an_input_size_that_the_architecture_refuses_is_bad_input():
    for model, size in (("vit_b_32", 40), ("inception_v3", 32)):
        with pytest.raises(BadInputError, match=f"{size}x{size}") as caught:
            zoo.build(zoo.resolve(_options(model, weights="none", input_size=(size, size))))
        assert "--input-size" in caught.value.hint


class _Flipped(nn.Module):
    """Takes files of before version 2 to hold its weight with the other sign."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest) -> None:
        if local_metadata.get("version", 1) < 2:
            state_dict[f"{prefix}weight"] = -state_dict[f"{prefix}weight"]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


@pytest.mark.parametrize(
    ("prefix", "renames"),
    [("", ()), ("module.", ()), ("net.", (("net.", ""),)), ("old.", (("old.part.", "part."),))],
)
def test_modules_are_told_the_version_of_what_they_load(prefix, renames, tmp_path):
    """Otherwise, they would take it for an old one, and change it."""
    outer = nn.Sequential(OrderedDict(part=_Flipped()))
    saved = outer
    for name in reversed(prefix.split(".")[:-1]):
        saved = nn.Sequential(OrderedDict([(name, saved)]))
    torch.save({"state_dict": saved.state_dict()}, tmp_path / "net.pth")
    loaded = state_dicts.read_weights(tmp_path / "net.pth", state_dicts.Reading(renames=renames))
    model = nn.Sequential(OrderedDict(part=_Flipped()))
    state_dicts.load_into(model, loaded.state, origin="net.pth", init_missing=(), versions=loaded.versions)
    assert torch.equal(model.part.weight, torch.ones(3))
    state_dicts.load_into(model, loaded.state, origin="net.pth", init_missing=())
    assert torch.equal(model.part.weight, -torch.ones(3)), "without a version it is taken for an old one"


def test_hints_name_the_option_that_would_read_the_file(state, tmp_path):
    torch.save({"net": state, "acc": 0.9}, tmp_path / "net.pth")
    with pytest.raises(BadInputError) as error:
        state_dicts.read_weights(tmp_path / "net.pth")
    assert "--weights-key net" in error.value.hint
    with pytest.raises(BadInputError) as error:
        _load(_small(), {f"backbone.{name}": tensor for name, tensor in state.items()})
    assert "--rename backbone.=" in error.value.hint


def test_a_network_of_parametrized_layers_refuses_plain_weights_with_their_names():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    with pytest.raises(BadInputError, match=r"missing: 0\.bias") as error:
        _load(model, {"other": torch.zeros(3)})
    assert "architecture" in error.value.hint


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "model", ["mnasnet0_5", pytest.param("vit_b_32", marks=pytest.mark.slow), "densenet121"]
)
def test_networks_that_ask_a_state_dict_for_its_version_are_loaded(model, suffix, tmp_path):
    size = {"image_size": 32} if model == "vit_b_32" else {}
    trained = get_model(model, weights=None, num_classes=10, **size)
    path = _save(tmp_path / f"net{suffix}", trained.state_dict())
    loaded, _ = zoo.build(
        zoo.resolve(_options(model, weights=str(path), input_size=(32, 32), transforms="DEFAULT"))
    )
    assert _equal(loaded.state_dict(), trained.state_dict())


def test_weights_that_are_not_finite_are_refused_by_name(state):
    broken = {**state, "fc.bias": torch.full_like(state["fc.bias"], float("nan"))}
    with pytest.raises(BadInputError, match=r"not finite: fc\.bias"):
        _load(_small(), broken)
