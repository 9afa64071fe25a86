"""Pages in a real browser: complete in one file, readable on small screens, in both schemes, and true."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from export_zoo.engines.verification.throughput import Point
from export_zoo.exporter.cli.app import main
from export_zoo.exporter.matrix.results import CellResult
from export_zoo.exporter.page import throughput
from export_zoo.exporter.page.diagnosis import SHOWN
from export_zoo.exporter.page.templates import decibels

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page(digits_bundle, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("page")
    arguments = ["diagnose", digits_bundle, "--images", "16", "--html", folder / "new" / "page.html"]
    assert main([*map(str, arguments), "--json", str(folder / "result.json"), "--quiet"]) == 0
    document = json.loads((folder / "result.json").read_text())
    assert document["html"] == str(folder / "new" / "page.html")
    return folder / "new" / "page.html", document["diagnosis"]


@pytest.fixture(scope="module")
def pages(page, aimed, tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    """Each kind of page, and its JSON."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "matrix" / "results").mkdir(parents=True)
    (folder / "matrix" / "results" / "resnet18.json").write_text(json.dumps(asdict(_cell(aimed))))
    found = {"diagnosis": page}
    for kind, arguments in {
        "card": ("report", aimed),
        "matrix": ("report", folder / "matrix"),
        "throughput": ("bench", aimed, "--batch", "1", "--batch", "2", "--seconds", "0.05"),
    }.items():
        path, document = folder / f"{kind}.html", folder / f"{kind}.json"
        assert main([*map(str, arguments), "--html", str(path), "--json", str(document), "--quiet"]) == 0
        found[kind] = path, json.loads(document.read_text())
    return found


@pytest.fixture(scope="module")
def aimed(digits_bundle, tmp_path_factory) -> Path:
    """The digits bundle with an aim in its manifest, which has other figures than a real one."""
    bundle = shutil.copytree(digits_bundle, tmp_path_factory.mktemp("aimed") / "digits.bundle")
    document = json.loads((bundle / "manifest.json").read_text())
    steps = [(0, 0.0, 31.5), (5, 0.5, 36.25), (7, 0.75, 35.0)]
    document["artifacts"]["engines"][1]["aim"] = {
        "metric": "sqnr",
        "value": 36,
        "layers": ["node_a"],
        "modules": ["layer2.0.conv1", "a|b <i>"],
        "reached": True,
        "select": 36.25,
        "images": 62,
        "ms": 2.0,
        "fp32_ms": 3.0,
        "added_ms": 0.5,
        "added_bytes": 1000,
        "tried": [{"layers": n, "added_ms": ms, "value": value} for n, ms, value in steps],
    }
    (bundle / "manifest.json").write_text(json.dumps(document))
    return bundle


def _cell(bundle: Path) -> CellResult:
    engine = json.loads((bundle / "manifest.json").read_text())["artifacts"]["engines"][1]
    return CellResult(
        "resnet18", "onnxruntime", "int8", ("export-zoo",), "ok", engine=engine, date="2026-01-01"
    )


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("kind", ["diagnosis", "card", "matrix", "throughput"])
def test_a_browser_shows_it_without_errors_requests_or_sideways_scrolling(
    pages, browser, kind, width, scheme
):
    path, _ = pages[kind]
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    shown, told, asked = context.new_page(), [], []
    shown.on("console", lambda message: told.append(message.text))
    shown.on("pageerror", lambda error: told.append(str(error)))
    shown.on("request", lambda request: asked.append(request.url))
    shown.goto(path.as_uri())
    assert told == []
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    colours = shown.evaluate(_COLOURS)
    assert len(colours) > 15
    for front, back in colours:
        assert contrast(front, back) >= 4.5
    context.close()


_COLOURS = """() => {
  const back = getComputedStyle(document.body).backgroundColor;
  const texts = [...document.querySelectorAll("p, h1, h2, th, td, li, figcaption, span.differs")];
  const plots = [...document.querySelectorAll("svg text")].map(text => getComputedStyle(text).fill);
  return [...texts.map(text => getComputedStyle(text).color), ...plots].map(front => [front, back]);
}"""


def contrast(front: str, back: str) -> float:
    """Contrast of two CSS colours, as the WCAG defines it (w3.org/TR/WCAG21, 1.4.3)."""

    def luminance(colour: str) -> float:
        channels = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    first, second = sorted((luminance(front), luminance(back)), reverse=True)
    return (first + 0.05) / (second + 0.05)


def test_figures_in_the_page_are_those_of_the_json(page, browser):
    path, found = page
    shown = browser.new_page()
    shown.goto(path.as_uri())
    rows = shown.eval_on_selector_all(
        "#layers tr", "rows => rows.map(row => [...row.cells].map(cell => cell.textContent.trim()))"
    )
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert len(rows) == 1 + min(SHOWN, len(layers))
    for row, name in zip(rows[1:], found["worst"], strict=False):
        layer = layers[name]
        assert row[0] == str(1 + list(layers).index(name))
        assert row[1] == layer["module"]
        assert row[3] == f"{100 * layer['share']:.1f} %"
        wanted = [decibels(layer[what]) for what in ("sqnr", "weights", "clipping", "rounding", "along")]
        assert row[4:9] == wanted
    answers = shown.eval_on_selector_all("#images figcaption", "all => all.map(one => one.textContent)")
    assert len(answers) == len(found["answers"])
    assert all(f"{decibels(a['sqnr'])} dB" in text for a, text in zip(found["answers"], answers, strict=True))
    shown.close()


def _rows(browser, path: Path, tables: str) -> list[list[str]]:
    shown = browser.new_page()
    shown.goto(path.as_uri())
    rows = shown.eval_on_selector_all(
        f"{tables} tr", "rows => rows.map(row => [...row.cells].map(cell => cell.textContent.trim()))"
    )
    shown.close()
    return rows


def test_texts_of_a_card_are_those_of_the_json(pages, browser):
    path, document = pages["card"]
    card = document["card"]
    assert _rows(browser, path, "#facts") == [[name, text] for name, text in card["facts"].items()]
    tables = [row for table in card["tables"] for row in (table["columns"], *table["rows"])]
    shown = [[" ".join(cell.split()) for cell in row] for row in _rows(browser, path, "table.card")]
    assert shown == tables
    curve = next(table for table in card["tables"] if table["title"].startswith("Accuracy over speed"))
    assert curve["rows"] == [["0", "31.5", "2.00", "+0.00"], ["5", "36.25", "2.50", "+0.50"]]


def test_figures_of_throughput_are_those_of_the_json(pages, browser):
    path, document = pages["throughput"]
    points = [Point(**point) for point in document["throughput"]["points"]]
    assert _rows(browser, path, "#points")[1:] == [list(throughput.row(point)) for point in points]


def test_a_page_of_a_matrix_has_its_cells(pages, browser):
    path, document = pages["matrix"]
    (cell,) = document["cells"]
    rows = _rows(browser, path, "table")
    assert rows[1][:3] == ["resnet18", "onnxruntime-int8", "ok"]
    assert rows[1][4] == f"{cell['engine']['gate']['eager_metrics']['sqnr']:.1f}"


@pytest.mark.parametrize("kind", ["diagnosis", "card", "matrix", "throughput"])
def test_it_is_one_small_file(pages, kind):
    path, _ = pages[kind]
    text = path.read_text()
    assert len(text) < 2_000_000
    assert not re.search(r"<(script|link)|(src|href)=\"(?!data:|#)", text)


def test_a_page_that_cannot_be_written_is_refused_before_any_work(digits_bundle, cli, tmp_path):
    (tmp_path / "file").write_text("")
    done = cli("diagnose", digits_bundle, "--html", tmp_path / "file" / "page.html")
    assert done.code == 2
    assert "--html" in done.err
    assert "cannot be written to" in done.err


def test_a_page_never_takes_the_place_of_a_bundles_file_or_of_the_json(digits_bundle, cli, tmp_path):
    manifest = digits_bundle / "manifest.json"
    before = manifest.read_bytes()
    done = cli("diagnose", digits_bundle, "--html", manifest)
    assert (done.code, manifest.read_bytes()) == (2, before)
    assert "lies in the bundle" in done.err
    done = cli("diagnose", digits_bundle, "--html", tmp_path / "result.json")  # where `cli` has --json
    assert done.code == 2
    assert "is the file of another option" in done.err


@pytest.mark.parametrize("command", ["diagnose", "bench", "report"])
def test_without_matplotlib_the_option_says_what_to_install(
    digits_bundle, cli, tmp_path, monkeypatch, command
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = cli(command, digits_bundle, "--html", tmp_path / "page.html")
    assert done.code == 7
    assert "pip install 'export-zoo[report]'" in done.err
