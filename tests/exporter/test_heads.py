"""Networks with outputs other than the logits of a classification: what they are taken for, and how they are judged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.options import PREPROCESS_FILE, UNTUNED
from support.paths import ROOT

import export_zoo
from export_zoo.base.errors import UsageError
from export_zoo.engines.bundle import triton
from export_zoo.engines.bundle.reader import read_manifest
from export_zoo.engines.parity.limits import METRICS
from export_zoo.engines.parity.tasks import TASKS
from export_zoo.exporter.models import zoo
from export_zoo.exporter.option_values import TOLERANCE_METRICS
from export_zoo.exporter.options import TASKS as TASK_OPTIONS
from export_zoo.exporter.options import ExportOptions

NETWORKS = ROOT / "tests" / "own_networks.py"
SMALL = ("--verify-images", "32", "--batch", "1:2:3", "--target", "onnxruntime", *UNTUNED)
PREPROCESS = {**PREPROCESS_FILE, "resize_size": 36, "crop_height": 32, "crop_width": 32}


@pytest.fixture
def preprocess(tmp_path: Path) -> Path:
    path = tmp_path / "preprocess.json"
    path.write_text(json.dumps(PREPROCESS))
    return path


@pytest.mark.parametrize(
    ("kind", "given", "task", "scores", "measured"),
    [
        ("logit", None, "binary", "logits", {"agreement"}),
        ("logit", "regression", "regression", "values", {"correlation", "relative_error"}),
        ("number", "regression", "regression", "values", {"correlation", "relative_error"}),
        ("yes", None, "binary", "probabilities", {"agreement"}),
        ("labels", None, "multilabel", "probabilities", {"agreement", "misplaced"}),
        ("shares", None, "classification", "probabilities", {"top1", "top5", "misplaced"}),
        ("quantities", "regression", "regression", "values", {"correlation", "relative_error"}),
        ("directions", None, "embedding", "values", {"similarity", "nearest"}),
        ("averages", None, "embedding", "values", {"similarity", "nearest"}),
        ("averages", "multilabel", "multilabel", "probabilities", {"agreement", "misplaced"}),
        ("tokens", None, "embedding", "values", {"similarity", "nearest"}),
        ("tokens", "classification", "classification", "logits", {"top1", "top5", "misplaced"}),
        ("mask", None, "segmentation", "probabilities", {"agreement"}),
        ("depth", "regression", "regression", "values", {"correlation", "relative_error"}),
    ],
)
def test_each_head_is_judged_by_the_metrics_that_fit_it(
    cli, photos, preprocess, tmp_path, kind, given, task, scores, measured
):
    done = cli(
        *(f"{NETWORKS}:Headed", *SMALL, "--precision", "fp32", "--precision", "int8", "--calib", photos),
        *("--preprocess", preprocess, "--model-arg", f"kind={kind}", "--out", tmp_path / "b.bundle"),
        *(("--task", given) if given else ()),
    )
    assert done.code == 0, done.json["error"]
    output = read_manifest(tmp_path / "b.bundle").recipe.output
    assert (output.task, output.scores) == (task, scores)
    common = {"images", "classes", "max_abs", "max_rel", "sqnr", "cosine", "pixels", "tokens"}
    for engine in done.json["engines"]:
        assert engine["state"] == "verified"
        metrics = {name for name, value in engine["gate"]["metrics"].items() if value is not None}
        assert metrics - common == measured, engine["name"]
        limited = set(engine["gate"]["tolerances"])
        assert limited <= measured | {"sqnr"}
        assert limited & measured, "a metric of the task decides, too"
    assert export_zoo.load(tmp_path / "b.bundle").task == task
    shown = cli("inspect", tmp_path / "b.bundle")
    assert task in shown.out


@pytest.mark.parametrize(
    ("kind", "task", "reason"),
    [
        ("labels", "binary", "it has 4 values, and binary is for one"),
        ("logit", "classification", "it has one value: choose binary or regression"),
        ("shares", "segmentation", "it has no height and width"),
        ("tokens", "segmentation", "return .N, 1, height, width., by unsqueeze"),
        ("logit", "embedding", "it has one value, which has no direction"),
        ("mask", "classification", "it has one value"),
    ],
)
def test_a_task_that_the_output_cannot_have_is_refused(preprocess, kind, task, reason):
    with pytest.raises(UsageError, match=reason):
        zoo.resolve(
            ExportOptions(
                f"{NETWORKS}:Headed", preprocess=preprocess, model_args=(("kind", kind),), task=task
            )
        )


def test_two_class_folders_are_the_labels_of_a_binary_network(cli, photos, preprocess, tmp_path):
    pictures = sorted(Path(photos).iterdir())
    for index, picture in enumerate(pictures):
        folder = tmp_path / "images" / ("no" if index % 2 else "yes")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / picture.name).write_bytes(picture.read_bytes())
    preprocess.write_text(json.dumps({**PREPROCESS, "labels": ["no", "yes"]}))
    given = (f"{NETWORKS}:Headed", *SMALL, "--preprocess", preprocess, "--verify", tmp_path / "images")
    done = cli(*given, "--out", tmp_path / "b.bundle")
    assert done.code == 0, done.json["error"]
    (engine,) = done.json["engines"]
    manifest = read_manifest(tmp_path / "b.bundle")
    held = manifest.artifacts.held_out
    logits = np.load(tmp_path / "b.bundle" / held.logits.path)
    assert engine["gate"]["metrics"]["accuracy"] == np.mean((logits[:, 0] > 0) == np.array(held.labels))
    assert set(held.labels) == {0, 1}
    assert "labels: 2 class folders, by name: no = no, yes = yes" in done.err
    assert "label_filename" not in triton.config(manifest, manifest.artifacts.engines[0], "x")
    preprocess.write_text(json.dumps({**PREPROCESS, "labels": ["yes"]}))
    refused = cli(*given, "--out", tmp_path / "c.bundle")
    assert refused.code == 5
    assert "give two labels, the no first" in refused.json["error"]["hint"]


def test_a_limit_that_eager_misses_too_is_not_blamed_on_the_engine(cli, photos, preprocess, tmp_path):
    pictures = sorted(Path(photos).iterdir())
    for index, picture in enumerate(pictures):
        folder = tmp_path / "images" / str(index % 2)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / picture.name).write_bytes(picture.read_bytes())
    done = cli(
        *(f"{NETWORKS}:Headed", *SMALL, "--preprocess", preprocess, "--verify", tmp_path / "images"),
        *("--tolerance", "accuracy=0.99", "--out", tmp_path / "b.bundle"),
    )
    assert done.code == 3
    assert "(eager's is 0." in done.json["error"]["message"]
    assert "module" not in done.json["error"]["message"]
    assert "a limit that eager PyTorch itself reaches" in done.json["error"]["hint"]


def test_a_tolerance_on_a_metric_of_another_task_names_the_tasks(cli, preprocess, tmp_path):
    done = cli(
        *(f"{NETWORKS}:Headed", *SMALL, "--preprocess", preprocess, "--tolerance", "top1=0.9"),
        *("--out", tmp_path / "b.bundle"),
    )
    assert done.code == 3
    assert "top1" in done.json["error"]["message"]
    assert "some metrics are for other tasks" in done.json["error"]["hint"]


def test_timms_features_are_an_embedding(cli, tmp_path):
    pytest.importorskip("timm")
    done = cli(
        *("timm/resnet10t", "--weights", "none", "--num-classes", "0", "--input-size", "64", *SMALL),
        *("--out", tmp_path / "b.bundle"),
    )
    assert done.code == 0, done.json["error"]
    output = read_manifest(tmp_path / "b.bundle").recipe.output
    assert (output.task, output.shape) == ("embedding", ["batch", 512])


def test_torchvisions_networks_have_a_head_of_one_value_or_more(cli, tmp_path):
    spec = zoo.resolve(ExportOptions("resnet18", weights="none", num_classes=1))
    assert (spec.head.task, spec.num_classes) == ("binary", 1)
    with pytest.raises(UsageError, match="has no form without a head"):
        zoo.resolve(ExportOptions("resnet18", weights="none", num_classes=0))


def test_an_output_without_dimensions_has_one_in_triton(cli, preprocess, tmp_path):
    done = cli(
        *(f"{NETWORKS}:Headed", *SMALL, "--preprocess", preprocess, "--model-arg", "kind=number"),
        *("--task", "regression", "--out", tmp_path / "b.bundle"),
    )
    assert done.code == 0, done.json["error"]
    manifest = read_manifest(tmp_path / "b.bundle")
    assert manifest.recipe.output.shape == ["batch"]
    assert "dims: [ 1 ]\n    reshape: { shape: [ ] }" in triton.config(
        manifest, manifest.artifacts.engines[0], "number"
    )
    engine = export_zoo.load(tmp_path / "b.bundle")
    picture = tmp_path / "picture.png"
    Image.new("RGB", (40, 40), (200, 10, 30)).save(picture)
    assert engine.run(engine.preprocess([picture])).shape == (1,)


def test_the_options_know_the_tasks_and_their_metrics():
    assert tuple(TASKS) == TASK_OPTIONS
    assert set(TOLERANCE_METRICS) == METRICS
