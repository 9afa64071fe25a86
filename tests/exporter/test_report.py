"""`export-zoo report`: a bundle's card as Markdown, and what it refuses. test_page.py has the pages."""

from __future__ import annotations

import json
import shutil

import pytest

from export_zoo.exporter.matrix.results import CellResult, store
from export_zoo.exporter.page.templates import plain


def test_the_card_is_printed_as_markdown(digits_bundle, cli):
    done = cli("report", digits_bundle)
    assert done.code == 0, done.err
    card = done.json["card"]
    lines = done.out.splitlines()
    assert lines[0] == "# resnet18, classification"
    assert "4. Divide by 255, subtract the mean (0.485, 0.456, 0.406)" in done.out
    parity = next(table for table in card["tables"] if table["title"] == "Parity with eager PyTorch")
    assert [row[0] for row in parity["rows"]] == ["onnxruntime-fp32", "onnxruntime-int8"]
    at = lines.index("## Parity with eager PyTorch")
    table = [line for line in lines[at + 1 :] if line.startswith("|")][:4]
    assert {line.count("|") for line in table} == {len(parity["columns"]) + 1}
    assert table[1] == "|---|---|---:|---:|---:|---:|"
    assert "| onnxruntime-int8 | verified |" in table[3]
    assert parity["rows"][1][3].endswith("(97.1 to 100.0)")
    assert done.out.endswith(".\n")
    assert cli("report", digits_bundle, "--quiet").out == ""


def test_the_card_of_a_failed_bundle_says_why_and_does_not_recommend_it(digits_bundle, cli, tmp_path):
    bundle = shutil.copytree(digits_bundle, tmp_path / 'we"ird.failed')
    document = json.loads((bundle / "manifest.json").read_text())
    document["status"], engine = "failed", document["artifacts"]["engines"][1]
    engine["state"], engine["gate"]["failures"] = "built", ["batch 8: sqnr is 3, must be sqnr >= 10"]
    document["recipe"]["keep_float"] = ["layer1"]
    (bundle / "manifest.json").write_text(json.dumps(document))
    (bundle / "attestations").mkdir(exist_ok=True)
    (bundle / "attestations" / "x.json").write_text("{")
    done = cli("report", bundle)
    assert done.code == 0
    assert "- **warning:** failed when it was exported: do not use it" in done.out
    assert "- **warning:** onnxruntime-int8: batch 8: sqnr is 3, must be sqnr &gt;= 10" in done.out
    assert "- **warning:** attestations/x.json: cannot be read, and is left out" in done.out
    assert 'export_zoo.load("we\\"ird.failed", allow_failed=True)  # failed' in done.out
    assert "```cpp" not in done.out
    assert "| onnxruntime-int8 | asked for (--keep-float) | layer1 |" in done.out


def test_a_damaged_bundle_has_no_card(digits_bundle, cli, tmp_path):
    bundle = shutil.copytree(digits_bundle, tmp_path / "bundle")
    next((bundle / "files").glob("*int8*.onnx")).unlink()
    done = cli("report", bundle)
    assert done.code == 5
    assert "missing from the bundle" in done.err


def test_a_matrix_whose_results_cannot_all_be_read_says_which(digits_bundle, cli, tmp_path):
    engine = json.loads((digits_bundle / "manifest.json").read_text())["artifacts"]["engines"][1]
    store(
        tmp_path,
        CellResult("resnet18", "onnxruntime", "int8", ("x",), "ok", engine=engine, date="2026-01-01"),
    )
    results = tmp_path / "results"
    results.mkdir()
    (tmp_path / "resnet18-onnxruntime-int8.json").rename(results / "resnet18-onnxruntime-int8.json")
    (results / "other.json").write_text("{")
    done = cli("report", tmp_path, "--html", tmp_path / "index.html")
    assert done.code == 0, done.err
    assert f"{results / 'other.json'}: cannot be read, and is left out" in done.err
    assert "1 ok" in (tmp_path / "index.html").read_text()
    assert cli("report", tmp_path, "--html", results / "index.html").code == 2
    (results / "resnet18-onnxruntime-int8.json").write_text("")
    done = cli("report", tmp_path)
    assert done.code == 5
    assert "has no results" in done.err


def test_what_a_bundle_says_cannot_break_the_markdown(digits_bundle, cli, tmp_path):
    bundle = shutil.copytree(digits_bundle, tmp_path / "bundle")
    document = json.loads((bundle / "manifest.json").read_text())
    document["recipe"]["source"]["name"] = "a|b <script>"
    document["warnings"] = ["first\nsecond [link](x)"]
    (bundle / "manifest.json").write_text(json.dumps(document))
    done = cli("report", bundle, "--markdown", tmp_path / "card.md")
    assert (done.code, done.out) == (0, "")
    text = (tmp_path / "card.md").read_text()
    assert text.startswith("# a\\|b &lt;script&gt;, classification")
    assert "- **warning:** first second \\[link\\](x)" in text


def test_plain_text_is_one_line_without_markup():
    assert plain("efficientnet_lite0 _a_") == "efficientnet_lite0 \\_a\\_"
    assert plain("a\nb|c<d>`e`*f*[g]") == "a b\\|c&lt;d&gt;\\`e\\`\\*f\\*\\[g\\]"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["{empty}"], 5, "neither a bundle nor the results of a matrix"),
        (["{bundle}", "--html", "{bundle}/page.html"], 2, "lies in the bundle"),
        (
            ["{bundle}", "--html", "{empty}/same", "--markdown", "{empty}/same"],
            2,
            "is the file of another option",
        ),
    ],
)
def test_what_cannot_be_reported_is_said(digits_bundle, cli, tmp_path, arguments, code, says):
    (tmp_path / "empty").mkdir()
    places = {"bundle": digits_bundle, "empty": tmp_path / "empty"}
    done = cli("report", *(argument.format(**places) for argument in arguments))
    assert done.code == code
    assert says in done.err
