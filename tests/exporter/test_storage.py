"""Results and bundles of a matrix in a storage: complete, replaced as a whole, and continued elsewhere."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from export_zoo.base.errors import EnvironmentFailureError
from export_zoo.exporter.cli.app import main
from export_zoo.exporter.cli.export import read_arguments
from export_zoo.exporter.matrix import plan
from export_zoo.exporter.matrix import run as matrix_run
from export_zoo.exporter.matrix.results import CellResult, stored
from export_zoo.exporter.matrix.storage import Storage
from export_zoo.exporter.publish import failed_place

TEXT = """\
models: [resnet18, vgg11]
precisions: [fp32]
targets: [onnxruntime]
cpus: [host, haswell]
"""


BUNDLE = "bundles/resnet18-onnxruntime-fp32.bundle"


class Place:
    """Writes a small folder in place of each bundle, and adds to it where an emulated CPU verifies it."""

    at_once = 1

    def __init__(self, words: str = "one", *, fails: bool = False) -> None:
        self._words, self._fails = words, fails
        self.ran: list[str] = []

    def run(self, cell, exported, bundle, limits, expected) -> CellResult:
        self.ran.append(cell.name)
        place = failed_place(bundle) if self._fails else bundle
        if exported is None:
            (place / "files").mkdir(parents=True, exist_ok=True)
            (place / "files" / self._words).write_text(self._words)
            (place / "manifest.json").write_text(self._words)
        else:
            assert (bundle / "manifest.json").exists(), "an emulated CPU needs the bundle"
        status = "failed" if self._fails else "ok"
        fields = {"engine": {"name": cell.engine}, "versions": {"code": "1"}}
        return CellResult(
            cell.model,
            cell.target,
            cell.precision,
            tuple(cell.command()),
            status,
            cpu=cell.cpu,
            **fields,
            inputs=(
                matrix_run.fingerprints(cell)
                if exported is None
                else matrix_run.inputs_on_cpu(cell, exported)
            ),
        )

    def versions(self, cell):
        return [{"code": "1"}]

    def stop(self) -> None:
        raise AssertionError


@pytest.fixture
def cells(tmp_path: Path) -> list[plan.Cell]:
    path = tmp_path / "m.yaml"
    path.write_text(TEXT)
    return plan.cells(path, plan.read(path), plan.Names(("resnet18", "vgg11")), read_arguments)


@pytest.fixture(params=["memory", "file"])
def uri(request, tmp_path: Path):
    yield {"memory": "memory://matrix", "file": f"file://{tmp_path / 'share' / 'matrix'}"}[request.param]
    if request.param == "memory":
        fsspec.filesystem("memory").rm("/matrix", recursive=True)


def run(cells, out: Path, uri: str, place: Place, **options) -> list[CellResult]:
    return matrix_run.run(cells, out, seconds=9, place=place, storage=Storage(uri), **options)


def files(uri: str) -> dict[str, str]:
    found, root = fsspec.core.url_to_fs(uri)
    found.invalidate_cache()
    return {path.partition("matrix/")[2]: found.cat_file(path).decode() for path in found.find(root)}


def test_another_machine_continues_from_a_storage(cells, uri, tmp_path):
    first, second = Place(), Place("two")
    results = run(cells[:2], tmp_path / "first", uri, first)
    there = files(uri)
    assert there[f"{BUNDLE}/manifest.json"] == there[f"{BUNDLE}/files/one"] == "one"
    assert sorted(there)[2:] == [
        "results/resnet18-onnxruntime-fp32-haswell.json",
        "results/resnet18-onnxruntime-fp32.json",
    ]
    assert run(cells, tmp_path / "second", uri, second)[:2] == results
    assert second.ran == ["vgg11-onnxruntime-fp32", "vgg11-onnxruntime-fp32-haswell"]
    assert not (tmp_path / "second" / BUNDLE).exists()


def test_a_bundle_travels_where_an_emulated_cpu_needs_it(cells, uri, tmp_path):
    run(cells[:1], tmp_path / "first", uri, Place())
    second = Place()
    run(cells[:2], tmp_path / "second", uri, second)
    assert second.ran == ["resnet18-onnxruntime-fp32-haswell"]
    assert (tmp_path / "second" / BUNDLE / "files" / "one").read_text() == "one"


def test_a_bundle_is_replaced_with_all_its_files(cells, uri, tmp_path):
    run(cells[:1], tmp_path / "first", uri, Place())
    run(cells[:1], tmp_path / "second", uri, Place("two"), again=True)
    bundle = {name: text for name, text in files(uri).items() if name.startswith("bundles/")}
    assert bundle == {f"{BUNDLE}/manifest.json": "two", f"{BUNDLE}/files/two": "two"}
    run(cells[:1], tmp_path / "third", uri, Place("bad", fails=True), again=True)
    there = files(uri)
    assert there[f"{BUNDLE}/manifest.json"] == "two"
    assert there[f"{BUNDLE}.failed/manifest.json"] == "bad"


def test_bundles_can_be_in_the_storage_only(cells, uri, tmp_path):
    run(cells[:2], tmp_path / "out", uri, Place(), keep_bundles=False)
    assert not (tmp_path / "out" / BUNDLE).exists()
    assert files(uri)[f"{BUNDLE}/manifest.json"] == "one"
    again = Place()
    run(cells[:2], tmp_path / "out", uri, again, keep_bundles=False)
    assert again.ran == []


def test_a_storage_that_fails_loses_nothing_and_the_next_run_copies_what_it_lacks(
    cells, tmp_path, monkeypatch
):
    uri = f"file://{tmp_path / 'share' / 'matrix'}"
    real = Storage._put

    def fails(self, path, place):
        if path.name == "manifest.json":
            raise OSError(28, "No space left on device")
        real(self, path, place)

    monkeypatch.setattr(Storage, "_put", fails)
    with pytest.raises(
        EnvironmentFailureError, match=r"--storage file://\S+: cannot write: OSError: .*No space left"
    ):
        run(cells[:1], tmp_path / "out", uri, Place())
    assert not any(name.endswith("manifest.json") for name in files(uri)), "nothing that seems complete"
    assert [*stored(tmp_path / "out" / "results")] == ["resnet18-onnxruntime-fp32"]
    monkeypatch.undo()
    again = Place()
    run(cells[:1], tmp_path / "out", uri, again)
    assert again.ran == []
    assert f"{BUNDLE}/manifest.json" in files(uri)
    assert "results/resnet18-onnxruntime-fp32.json" in files(uri)


def test_an_old_result_never_lies_beside_a_new_bundle(cells, tmp_path, monkeypatch):
    uri = f"file://{tmp_path / 'share' / 'matrix'}"
    run(cells[:1], tmp_path / "out", uri, Place())
    real, result = Storage._put, "results/resnet18-onnxruntime-fp32.json"

    def fails(self, path, place):
        if path.suffix == ".json" and path.parent.name == "results":
            raise OSError(28, "No space left on device")
        real(self, path, place)

    monkeypatch.setattr(Storage, "_put", fails)
    with pytest.raises(EnvironmentFailureError, match="cannot write"):
        run(cells[:1], tmp_path / "out", uri, Place("two"), again=True)
    assert result not in files(uri)
    monkeypatch.undo()
    again = Place()
    run(cells[:1], tmp_path / "out", uri, again)
    assert again.ran == []
    assert files(uri)[result] == (tmp_path / "out" / result).read_text()


def test_a_result_that_is_ok_elsewhere_takes_the_place_of_one_that_failed_here(cells, uri, tmp_path):
    with_failure = run(cells[:1], tmp_path / "out", "memory://other/matrix", Place(fails=True))
    assert with_failure[0].status == "failed"
    run(cells[:1], tmp_path / "elsewhere", uri, Place())
    again = Place()
    (result,) = run(cells[:1], tmp_path / "out", uri, again)
    assert (result.status, again.ran) == ("ok", [])


def test_stored_results_are_told_from_a_storage(cells, tmp_path, capsys):
    uri = f"file://{tmp_path / 'share' / 'matrix'}"
    run(cells, tmp_path / "first", uri, Place())
    arguments = ["matrix", tmp_path / "m.yaml", "--out", tmp_path / "other", "--storage", uri, "--stored"]
    assert main([*map(str, arguments)]) == 0
    assert "vgg11" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("nowhere://x", "--storage nowhere://x: cannot be opened: ValueError: Protocol not known"),
        ("gs://x/y", "--storage gs://x/y: cannot be opened: ImportError"),
        ("github://x/y", "--storage github://x/y: cannot be opened: TypeError"),
        ("zip://nothing.zip", "--storage zip://nothing.zip: cannot be opened"),
        ("", "--storage : cannot be opened: ValueError: not a URI"),
    ],
)
def test_a_storage_that_nothing_can_open_is_refused_before_anything_runs(uri, says, tmp_path, capsys):
    (tmp_path / "m.yaml").write_text(TEXT)
    code = main(["matrix", str(tmp_path / "m.yaml"), "--out", str(tmp_path / "out"), "--storage", uri])
    told = capsys.readouterr().err
    assert code == 2, told
    assert says in told
    assert not (tmp_path / "out").exists()
