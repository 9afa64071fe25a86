"""`export-zoo costs`, and exports with the file that it writes."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import onnx
import pytest
from support.options import TUNED_LITTLE, UNTUNED

from export_zoo.base import graph_io
from export_zoo.engines.bundle.bench import Effort
from export_zoo.engines.bundle.reader import read_manifest
from export_zoo.engines.targets.onnxruntime.costs import Costs, RegionTime, regions_of
from export_zoo.engines.targets.onnxruntime.regions import Region
from export_zoo.engines.targets.registry import TARGETS
from export_zoo.exporter.cli.app import main


def first_region_in_float(bundle: Path, out: Path) -> Costs:
    """A cost file by which the first region of a bundle's network, its first layer, is faster in float."""
    graph = graph_io.load(bundle / read_manifest(bundle).recipe.graph.path).graph
    region = next(region for region in regions_of(graph, frozenset()) if len(region.layers) == 1)
    times = {region.signature: {1: RegionTime(int8=2.0, float32=1.0)}}
    costs = Costs(onnxruntime="1", instruction_set="any", cpu="any", regions=times)
    costs.write(out)
    return costs


def test_a_region_that_the_cost_file_calls_slower_stays_float_and_the_manifest_says_so(
    cli, digits, digits_bundle, tmp_path
):
    first_region_in_float(digits_bundle, tmp_path / "mine.json")
    export = [*digits.arguments(), "--precision", "int8", "--calib", digits.images, *UNTUNED]
    done = cli(*export, "--costs", tmp_path / "mine.json", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    (engine,) = read_manifest(tmp_path / "out").artifacts.engines
    found = engine.float_for_speed
    assert found is not None
    assert found.costs_sha256 == hashlib.sha256((tmp_path / "mine.json").read_bytes()).hexdigest()
    assert len(found.layers) == 1
    types = {node.name: node.op_type for node in onnx.load(tmp_path / "out" / engine.file.path).graph.node}
    assert f"{found.layers[0]}_weight_DequantizeLinear" not in types
    assert types[found.layers[0]] == "Conv"
    assert sum(kind == "DequantizeLinear" for kind in types.values()) > 20, "the others have 8 bits"


def test_another_cost_file_is_tuned_again_and_the_same_one_is_not(cli, digits, digits_bundle, tmp_path):
    path = tmp_path / "mine.json"
    export = [*digits.arguments(), "--precision", "int8", "--calib", digits.images, *TUNED_LITTLE]

    def tuned() -> bool:
        done = cli(*export, "--costs", path, "--out", tmp_path / "out")
        assert done.code == 0, done.err
        (layers,) = [engine["float_for_speed"]["layers"] for engine in done.json["engines"]]
        assert ("1 layer float for speed" in done.err) == bool(layers)
        return not next(stage for stage in done.json["stages"] if stage["name"] == "tune")["cached"]

    costs = first_region_in_float(digits_bundle, path)
    assert tuned()
    assert not tuned()
    costs.model_copy(update={"regions": {}}).write(path)
    tuned()
    assert cli(*export, "--out", tmp_path / "out").code == 0
    assert (
        json.loads((tmp_path / "out" / "manifest.json").read_text())["artifacts"]["engines"][0][
            "float_for_speed"
        ]["layers"]
        == []
    )


def regions_in(bundle: Path) -> list[Region]:
    return regions_of(graph_io.load(bundle / read_manifest(bundle).recipe.graph.path).graph, frozenset())


def test_costs_are_measured_and_written_for_several_bundles(cli, digits_bundle, tmp_path, monkeypatch):
    from export_zoo.engines.verification import region_costs

    few = regions_in(digits_bundle)[:3]
    monkeypatch.setattr(region_costs, "regions_of", lambda graph, kept: regions_of(graph, kept)[:3])
    monkeypatch.setattr(region_costs, "_REGION", Effort(0.0, 1, 1))
    monkeypatch.setattr(region_costs, "_NETWORK", Effort(0.0, 1, 1))
    monkeypatch.setattr(region_costs, "faster", lambda times: True)
    monkeypatch.setattr(region_costs, "saved", lambda times: 1.0)
    monkeypatch.setattr(region_costs, "CONFIRMED", 1e9)
    done = cli("costs", digits_bundle, digits_bundle, "--out", tmp_path / "costs.json")
    assert done.code == 0, done.err
    found = Costs.read(tmp_path / "costs.json")
    assert 1 <= len(found.regions) <= 3
    assert set(found.regions) <= {region.signature for region in few}
    assert all(times.keys() == {1, 8} for times in found.regions.values())
    assert done.json["regions"] == len(found.regions)
    assert str(tmp_path / "costs.json") in done.out


def test_a_region_must_make_the_network_faster_beside_those_before_it(digits_bundle, monkeypatch):
    from export_zoo.engines.verification import region_costs

    asked = []

    def ratio(before: Path, after: Path) -> float:
        asked.append((before.name, after.name))
        return 0.9 if len(asked) == 2 else 1.0

    def time(region: Region, *_: object) -> dict[int, RegionTime]:
        single = region.end - region.begin == 1
        return {1: RegionTime(int8=20.0, float32=9.0 - len(region.signature) / 1000 if single else 17.9)}

    monkeypatch.setattr(region_costs, "regions_of", lambda graph, kept: regions_of(graph, kept)[:9])
    monkeypatch.setattr(region_costs, "_ratio", ratio)
    monkeypatch.setattr(region_costs, "_time", time)
    costs = region_costs.measure(digits_bundle, lambda done, total: None)
    assert len(costs.regions) == 1
    assert len(asked) > 2
    assert [before for before, _ in asked[:3]] == ["int8.onnx", "int8.onnx", asked[1][1]]
    begins = [int(after.removeprefix("float-").removesuffix(".onnx")) for _, after in asked]
    singles = {r.begin: r.signature for r in regions_in(digits_bundle) if r.end - r.begin == 1}
    lengths = [len(singles[begin]) for begin in begins]
    assert lengths == sorted(lengths, reverse=True), "what saves most comes first"
    assert [*costs.regions] == [singles[begins[1]]]


def without_ranges(bundle: Path) -> None:
    document = json.loads((bundle / "manifest.json").read_text())
    document["recipe"]["calibration"] = None
    document["artifacts"]["engines"] = document["artifacts"]["engines"][:1]
    (bundle / "manifest.json").write_text(json.dumps(document))


def damaged(bundle: Path) -> None:
    (path,) = bundle.glob("files/ranges.*")
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_ranges, "has no ranges"),
        (damaged, "ranges"),
        (shutil.rmtree, "not a bundle"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_its_name(change, said, cli, digits_bundle, tmp_path):
    shutil.copytree(digits_bundle, tmp_path / "mine.bundle")
    change(tmp_path / "mine.bundle")
    done = cli("costs", tmp_path / "mine.bundle", "--out", tmp_path / "costs.json")
    assert done.code == 5
    assert "mine.bundle" in done.err
    assert said in done.err
    assert not (tmp_path / "costs.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--precision", "fp32"], "--costs has no effect on fp32"),
        (
            ["--precision", "int8", "--target", "tensorrt-rtx", *UNTUNED],
            "--costs has no effect on tensorrt-rtx",
        ),
        (
            ["--precision", "int8", "--input-size", "48", *UNTUNED],
            "has no region of this network at this input size",
        ),
    ],
)
def test_a_cost_file_without_effect_is_told(arguments, said, cli, digits, digits_bundle, tmp_path):
    """By a warning: a matrix may give all its cells the same file."""
    if "tensorrt-rtx" in arguments and (why := TARGETS["tensorrt-rtx"].unavailable):
        pytest.skip(why)
    first_region_in_float(digits_bundle, tmp_path / "mine.json")
    given = [*digits.arguments(), "--calib", digits.images, "--costs", tmp_path / "mine.json", *arguments]
    done = cli(*given, "--tolerance", "top1=0", "--tolerance", "sqnr=0", "--out", tmp_path / "out")
    assert said in done.err
    assert done.code == 0, done.err


def test_a_file_that_is_no_cost_file_ends_the_export_before_any_work(cli, digits, tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    given = [*digits.arguments(), "--calib", digits.images, "--precision", "int8"]
    done = cli(*given, "--costs", tmp_path / "mine.json", "--out", tmp_path / "out")
    assert done.code == 5
    assert "mine.json: not a cost file" in done.err
    assert not done.json.get("stages")


@pytest.mark.parametrize("kind", ["weights", "json", "folder"])
def test_what_would_be_overwritten_is_refused_before_anything_is_measured(
    kind, digits_bundle, tmp_path, capsys
):
    out = tmp_path / "none" / "costs.json" if kind == "folder" else tmp_path / "precious"
    if kind == "weights":
        out.write_bytes(b"precious")
    more = ["--json", str(out)] if kind == "json" else []
    assert main(["costs", str(digits_bundle), "--out", str(out), *more]) == 2
    assert str(out) in capsys.readouterr().err
    if kind == "weights":
        assert out.read_bytes() == b"precious"


def test_all_bundles_are_looked_at_before_the_first_is_measured(cli, digits_bundle, tmp_path, monkeypatch):
    from export_zoo.engines.verification import region_costs

    monkeypatch.setattr(region_costs, "measure", lambda *_: pytest.fail("measured"))
    done = cli("costs", digits_bundle, tmp_path / "none.bundle", "--out", tmp_path / "costs.json")
    assert done.code == 5
    assert "none.bundle" in done.err
