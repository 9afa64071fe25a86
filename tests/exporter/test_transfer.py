"""Checkpoints as people have them: moving averages, other prefixes, further entries, pickled modules."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from export_zoo.base.errors import BadInputError, UsageError
from export_zoo.engines.bundle.reader import read_manifest
from export_zoo.exporter.models import zoo
from export_zoo.exporter.models.weights import state_dicts
from export_zoo.exporter.models.weights.state_dicts import Reading, read_weights
from export_zoo.exporter.option_values import parse_renames
from export_zoo.exporter.options import ExportOptions


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """Random, but with logits that vary."""
    options = ExportOptions("shufflenet_v2_x0_5", weights="none", num_classes=10, input_size=(64, 64))
    return zoo.build(zoo.resolve(options))[0]


@pytest.fixture(scope="module")
def state(network) -> dict[str, torch.Tensor]:
    return dict(network.state_dict())


def save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def doubled(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: 2 * tensor for name, tensor in state.items()}


def test_the_weights_are_taken_before_their_moving_average_which_is_told(state, tmp_path):
    path = save(tmp_path / "c.pth", {"epoch": 1, "model_ema": doubled(state), "model": state})
    found = read_weights(path, Reading())
    assert equal(found.state, state)
    assert (found.entry, found.others) == ("model", ("model_ema",))
    averaged = read_weights(path, Reading(key="model_ema"))
    assert equal(averaged.state, doubled(state))
    assert (averaged.entry, averaged.others) == ("model_ema", ())


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema_state_dict", "ema"])
def test_a_moving_average_alone_is_taken(key, network, state, tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(network).state_dict()
    assert "n_averaged" in averaged
    found = read_weights(save(tmp_path / "c.pth", {key: averaged, "epoch": 2}), Reading())
    assert equal(found.state, state)
    assert found.entry == key


def test_a_bare_state_dict_has_no_entry(state, tmp_path):
    found = read_weights(save(tmp_path / "c.pth", state), Reading())
    assert (found.entry, found.others, found.skipped) == ("", (), ())


def test_a_key_leads_into_the_checkpoint(state, tmp_path):
    path = save(tmp_path / "c.pth", {"nets": {"student": state, "teacher": doubled(state)}})
    assert equal(read_weights(path, Reading(key="nets.teacher")).state, doubled(state))
    with pytest.raises(BadInputError, match=r"--weights-key nets.pupil: .*c\.pth has no 'pupil'") as error:
        read_weights(path, Reading(key="nets.pupil"))
    assert "student, teacher" in error.value.hint
    with pytest.raises(BadInputError, match="has no 'deeper'"):
        read_weights(path, Reading(key="nets.student.deeper"))


def test_prefixes_are_renamed_in_order(state, tmp_path):
    lightning = {f"net.{name.replace('fc.', 'head.')}": tensor for name, tensor in state.items()}
    path = save(tmp_path / "c.ckpt.pth", {"state_dict": lightning})
    assert equal(read_weights(path, Reading(renames=(("net.", ""), ("head.", "fc.")))).state, state)
    with pytest.raises(UsageError, match=r"--rename fc\.=x: no name in"):
        read_weights(path, Reading(renames=(("fc.", "x"),)))
    both = save(tmp_path / "d.pth", {"a.w": torch.ones(1), "b.w": torch.zeros(1)})
    with pytest.raises(UsageError, match="two names become one"):
        read_weights(both, Reading(renames=(("a.", "b."),)))


def test_what_is_left_out_is_told(state, tmp_path):
    path = save(tmp_path / "c.pth", {**state, "loss.weight": torch.ones(3), "loss.bias": torch.ones(3)})
    found = read_weights(path, Reading(skip=("loss.*",)))
    assert equal(found.state, state)
    assert found.skipped == ("loss.weight", "loss.bias")
    with pytest.raises(UsageError, match=r"--skip-weights lost\.\*: matches no name"):
        read_weights(path, Reading(skip=("lost.*",)))


class Exploit:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_pickled_module_is_loaded_only_when_that_is_allowed(network, state, tmp_path):
    path = save(tmp_path / "whole.pth", nn.DataParallel(network))
    with pytest.raises(BadInputError, match="more than tensors") as error:
        read_weights(path, Reading())
    assert "--allow-pickle" in error.value.hint
    assert equal(read_weights(path, Reading(allow_pickle=True)).state, state)
    nested = save(tmp_path / "nested.pth", {"model": network, "epoch": 1})
    assert equal(read_weights(nested, Reading(allow_pickle=True)).state, state)
    trap = save(tmp_path / "trap.pth", {"a": Exploit(tmp_path / "marker")})
    with pytest.raises(BadInputError):
        read_weights(trap, Reading())
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("text", ["backbone", "=x"])
def test_a_rename_is_two_prefixes(text):
    with pytest.raises(UsageError, match="not OLD=NEW"):
        parse_renames([text])
    assert parse_renames(["a.=", "b=c=d"]) == (("a.", ""), ("b", "c=d"))


@pytest.mark.parametrize(
    "given",
    [{"weights_key": "ema"}, {"renames": (("a", "b"),)}, {"skip_weights": ("a",)}, {"allow_pickle": True}],
)
def test_random_weights_have_no_file(given):
    with pytest.raises(UsageError, match="--weights none"):
        ExportOptions("resnet18", weights="none", **given)


def test_the_manifest_and_the_run_tell_what_was_loaded(cli, state, tmp_path):
    lightning = {f"net.{name}": tensor for name, tensor in state.items()} | {"loss.weight": torch.ones(3)}
    path = save(tmp_path / "c.pth", {"state_dict": lightning, "ema": doubled(state)})
    done = cli(
        *("export", "shufflenet_v2_x0_5", "--weights", path, "--num-classes", "10", "--input-size", "64"),
        *("--rename", "net.=", "--skip-weights", "loss.*", "--target", "onnxruntime", "--batch", "1:2:3"),
        *("--verify-images", "32", "--out", tmp_path / "b.bundle", "--no-cache"),
    )
    assert done.code in (0, 3), done.json["error"]
    export = next(stage for stage in done.json["stages"] if stage["name"] == "export")
    assert "weights: state_dict of the checkpoint" in export["detail"]
    warned = " ".join(done.json["warnings"])
    assert "read state_dict; the file also has ema: --weights-key" in warned
    assert "left out of the file: loss.weight" in warned
    recorded = read_manifest(Path(done.json["bundle"])).recipe.source.weights
    assert (recorded.entry, recorded.skipped, recorded.initialized) == ("state_dict", ["loss.weight"], [])


def test_without_options_a_file_is_read_plainly(state, tmp_path):
    assert equal(state_dicts.read_weights(save(tmp_path / "c.pth", state)).state, state)
