"""The command line: commands, exit codes, what goes where, and the errors that users make."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.options import TUNED_LITTLE
from support.paths import ROOT

SIZES = ["--num-classes", "10", "--input-size", "32", "--resize-size", "32"]
RANDOM = ["squeezenet1_1", "--weights", "none", *SIZES]
"""The cheapest export: made once, from the cache after that."""

HEAVY = {"torch", "torchvision", "onnxruntime", "onnx_ir", "onnx", "onnxsim"}
COLOUR_VARIABLES = ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS")
UNREACHABLE = 199.0  # dB: more than float32 can give


def _environment(**changes: str) -> dict[str, str]:
    """This process's environment, without the variables that decide about colours."""
    return {**{k: v for k, v in os.environ.items() if k not in COLOUR_VARIABLES}, **changes}


def _program(*arguments: str | Path, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "export_zoo", *map(str, arguments)]
    options = {"capture_output": True, "env": _environment(), **options}
    return subprocess.run(command, cwd=ROOT, text=True, timeout=300, **options)


def _loaded(*arguments: str | Path) -> tuple[int, str, set[str]]:
    """Exit code, stdout, and which heavy libraries were imported by a run in a process of its own."""
    code = "import sys; from export_zoo.exporter.cli.app import main; code = main(sys.argv[1:]); "
    code += "print(code, *(m for m in sys.modules if '.' not in m), file=sys.stderr)"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, text=True, timeout=300, capture_output=True)
    status, *modules = done.stderr.splitlines()[-1].split()
    assert "click" in modules
    return int(status), done.stdout, HEAVY & set(modules)


def _refused(done, code: int, kind: str) -> dict[str, str]:
    """The error of a run that ended with `code`, after checking what all such runs owe."""
    assert done.code == code, done.err
    assert done.json["schema_version"] == 1
    assert done.json["tool"].startswith("export-zoo ")
    assert done.json["exit_code"] == code
    error = done.json["error"]
    assert error["kind"] == kind
    assert f"error: {error['message']}\n" in done.err
    assert error["hint"]
    assert f"next: {error['hint']}\n" in done.err
    return error


def _pictures(folder: Path, count: int, seed: int = 0) -> Path:
    """A folder of small PNG files, no two alike, each of its own brightness."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        low = int(rng.integers(0, 200))
        pixels = rng.integers(low, low + 56, size=(32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03}.png")
    return folder


def _tree(directory: Path) -> dict[str, str]:
    """Every file below a directory, by hash."""
    return {
        str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }


# -- commands, aliases, help ------------------------------------------------------------------------------------


def test_export_and_its_alias_do_the_same_with_options_on_either_side(cli, tmp_path):
    forms = [["export", *RANDOM], RANDOM, [*RANDOM[1:], RANDOM[0]], ["export", *RANDOM[1:], RANDOM[0]]]
    recipes = []
    for index, form in enumerate(forms):
        done = cli(*form, "--out", tmp_path / str(index))
        assert done.code == 0, done.err
        assert done.json["error"] is None
        assert done.json["exit_code"] == 0
        assert (done.json["schema_version"], done.json["bundle"]) == (1, str(tmp_path / str(index)))
        assert (tmp_path / str(index) / "manifest.json").is_file()
        recipes.append(done.json["recipe"])
    assert all(recipe == recipes[0] for recipe in recipes)


def test_the_bundle_is_named_after_the_model_where_no_out_is_given(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli(*RANDOM).code == 0
    assert (tmp_path / f"{RANDOM[0]}.bundle" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("exprot", "export"),
        ("Export", "export"),
        ("verfiy", "verify"),
        ("inspct", "inspect"),
        ("lst", "list"),
        ("LIST", "list"),
    ],
)
def test_a_mistyped_command_is_answered_with_the_one_meant(typed, meant, cli):
    error = _refused(cli(typed, "something"), 2, "usage")
    assert typed in error["message"]
    assert "did you mean" in error["hint"]
    assert f"export-zoo {meant}" in error["hint"]


def test_no_model_is_taken_for_a_mistyped_command(cli):
    from export_zoo.exporter.models.sources.torchvision_zoo import model_names

    assert len(model_names()) >= 80
    for name in model_names():
        # Refused for its target, so it was understood as a model to export.
        assert cli(name, "--target", "tensorrt").code == 4, name


COMMANDS = [[], ["export"], ["list"], ["verify"], ["inspect"], ["resnet50"]]


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command) or "group")
def test_help_is_answered_without_loading_pytorch(command, flag):
    code, out, heavy = _loaded(*command, flag)
    assert code == 0
    assert f"Usage: export-zoo {'export' if command == ['resnet50'] else ' '.join(command)}" in out
    assert heavy <= {"onnxruntime"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command) or "group")
def test_help_is_answered_without_loading_onnxruntime(command):
    code, _, heavy = _loaded(*command, "--help")
    assert code == 0
    assert "onnxruntime" not in heavy


def test_help_names_the_commands_the_alias_and_the_exit_codes(cli, capsys):
    from export_zoo.exporter.cli.app import main

    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("export", "list", "verify", "inspect"):
        assert f"\n  {command} " in text
    assert "export-zoo MODEL" in text
    codes = {
        int(line.split()[0]) for line in text.splitlines() if line.split()[:1] and line.split()[0].isdigit()
    }
    assert codes == {0, 1, 2, 3, 4, 5, 6, 7, 130}


def test_no_arguments_show_the_help_and_count_as_a_usage_error(capsys):
    from export_zoo.exporter.cli.app import main

    assert main([]) == 2
    assert "Usage: export-zoo" in capsys.readouterr().out


def test_version_is_the_package_version(capsys):
    from export_zoo import __version__
    from export_zoo.exporter.cli.app import main

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"export-zoo, version {__version__}\n"


# -- 2: usage -----------------------------------------------------------------------------------------------------

USAGE_ERRORS = {
    # options.py
    "--batch": ["0:1:2", "4:2:8", "1:8:4", "1:8", "0", "-1", "many", ""],
    "--input-size": ["0", "32x0", "wide", "32x32x3", "-32"],
    "--resize-size": ["0", "-1"],
    "--num-classes": ["0", "-5"],
    "--task": ["detection", "segmentation"],
    "--calib-images": ["0", "15"],
    "--verify-images": ["0", "31"],
    "--precision": ["fp64", "int8"],
    "--method": ["median"],
    "--steps": ["retrain", "equalize,retrain", ""],
    "--effort": ["most", ""],
    "--keep-float": ["@deep"],
    "--require": ["built"],
    "--tolerance": ["sqnr", "sqnr=", "speed=3", "sqnr=fast", "sqnr=nan", "int8:speed=3", "=3", "a:b:sqnr=3"],
    # target.py
    "--target": ["cuda", ""],
    # zoo.py: resnet18 has no such option
    "--transform-input": [None],
    "--no-transform-input": [None],
}


@pytest.mark.parametrize(
    ("option", "value"), [(option, value) for option, values in USAGE_ERRORS.items() for value in values]
)
def test_a_usage_error_names_its_option_and_a_next_step(option, value, cli, tmp_path):
    arguments = ["resnet18", "--weights", "none", option, *([] if value is None else [value])]
    done = cli(*arguments, "--out", tmp_path / "out")
    error = _refused(done, 2, "usage")
    assert option.replace("--no-", "--") in error["message"]
    if value:
        assert value.rpartition(":")[2].partition("=")[0] in error["message"]
    assert done.json["stages"] == []
    assert done.out == ""
    assert not list(tmp_path.glob("out*"))


def test_int8_without_calib_says_what_to_pass(cli):
    error = _refused(cli(*RANDOM, "--precision", "int8"), 2, "usage")
    assert "--calib" in error["message"]
    assert "images" in error["hint"]


def test_random_weights_have_nothing_to_miss(cli):
    error = _refused(cli(*RANDOM, "--init-missing", "fc.*"), 2, "usage")
    assert "--init-missing" in error["message"]
    assert "--weights none" in error["message"]


def test_no_precision_at_all_is_a_usage_error_of_the_python_api():
    from export_zoo import ExportOptions
    from export_zoo.base.errors import UsageError

    with pytest.raises(UsageError, match="--precision") as caught:
        ExportOptions(model="resnet18", precisions=())
    assert "fp16" in caught.value.hint


def test_auto_beside_another_target_is_a_usage_error(cli):
    done = cli(*RANDOM, "--target", "onnxruntime", "--target", "auto")
    assert "--target auto" in _refused(done, 2, "usage")["message"]


def test_a_vit_refuses_oblong_inputs(cli):
    error = _refused(cli("vit_b_32", "--weights", "none", "--input-size", "64x32"), 2, "usage")
    assert "--input-size" in error["message"]
    assert "square" in error["message"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["resnet18", "--presicion", "int8"], "--presicion"),
        (["resnet18", "--seed", "x"], "--seed"),
        (["resnet18", "resnet50"], "resnet50"),
        (["export"], "MODEL"),
        (["verify"], "BUNDLE"),
        (["inspect", "--weights", "none"], "--weights"),
        (["list", "a", "b"], "b"),
    ],
)
def test_what_click_refuses_is_reported_like_our_own_usage_errors(arguments, named, cli):
    error = _refused(cli(*arguments), 2, "usage")
    assert named in error["message"]
    assert "--help" in error["hint"]


@pytest.mark.parametrize("last", ["--calib", "--refittable=yes"], ids=["missing value", "value too many"])
def test_an_option_with_too_few_or_too_many_values_is_reported_with_a_hint(last, tmp_path, capsys):
    from export_zoo.exporter.cli.app import main

    path = tmp_path / "result.json"
    assert main(["resnet18", "--json", str(path), last]) == 2
    error = json.loads(path.read_text())["error"]
    assert last.partition("=")[0] in error["message"]
    assert error["message"] in capsys.readouterr().err
    assert error["hint"]


@pytest.mark.parametrize("seed", ["-1", str(2**64)])
def test_a_seed_that_no_generator_takes_is_a_usage_error(seed, cli, tmp_path):
    done = cli(*RANDOM, "--seed", seed, "--out", tmp_path / "out")
    assert "--seed" in _refused(done, 2, "usage")["message"]


def test_a_tolerance_for_an_engine_that_is_not_built_is_a_usage_error(cli, tmp_path):
    done = cli(*RANDOM, "--tolerance", "onnxruntime-in8:sqnr=50", "--out", tmp_path / "out")
    assert "--tolerance" in _refused(done, 2, "usage")["message"]


def test_out_must_not_be_a_file(cli, tmp_path):
    (tmp_path / "out").write_text("precious")
    done = cli(*RANDOM, "--out", tmp_path / "out")
    error = _refused(done, 2, "usage")
    assert "--out" in error["message"]
    assert done.json["stages"] == []
    assert (tmp_path / "out").read_text() == "precious"


def test_out_must_not_be_a_directory_of_something_else(cli, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    done = cli(*RANDOM, "--out", tmp_path / "out")
    error = _refused(done, 2, "usage")
    assert "--out" in error["message"]
    assert done.json["stages"] == []
    assert _tree(tmp_path / "out").keys() == {"thesis.tex"}


def test_an_empty_directory_will_do_as_out(cli, tmp_path):
    (tmp_path / "out").mkdir()
    assert cli(*RANDOM, "--out", tmp_path / "out").code == 0
    assert (tmp_path / "out" / "manifest.json").is_file()


# -- 0 and 3: exports, overwriting, batches, tolerances ----------------------------------------------------------


def test_stages_and_warnings_go_to_stderr_and_the_table_to_stdout(cli, tmp_path):
    done = cli(*RANDOM, "--out", tmp_path / "out")
    assert done.code == 0
    names = [stage["name"] for stage in done.json["stages"]]
    assert names == [
        *("weights", "export", "simplify", "reference", "build", "bench", "verify", "bundle"),
    ]
    for name in names:
        assert f"\n{name} " in "\n" + done.err
        assert f"\n{name} " not in done.out
    assert len(done.json["warnings"]) >= 2
    for warning in done.json["warnings"]:
        assert f"warning: {warning}\n" in done.err
    assert "warning:" not in done.out
    assert "onnxruntime-fp32 │" in done.out
    assert "SQNR dB" in done.out
    assert "│" not in done.err
    assert done.json["warnings"] == json.loads((tmp_path / "out" / "manifest.json").read_text())["warnings"]


def test_an_existing_bundle_is_replaced(cli, tmp_path):
    out = tmp_path / "out"
    assert cli(*RANDOM, "--out", out).code == 0
    assert cli("verify", out).code == 0
    assert list((out / "attestations").iterdir())
    before = _tree(out)
    done = cli(*RANDOM, "--precision", "fp16", "--batch", "1", "--out", out)
    assert done.code == 0, done.err
    manifest = json.loads((out / "manifest.json").read_text())
    assert [e["name"] for e in manifest["artifacts"]["engines"]] == ["onnxruntime-fp16"]
    assert manifest["recipe"]["batch"]["max"] == 1
    assert not (out / "attestations").exists(), "they attest the bundle that was replaced"
    engine, ranges = manifest["artifacts"]["engines"][0]["file"], manifest["recipe"]["calibration"]["ranges"]
    assert _tree(out).keys() - before.keys() == {engine["path"], ranges["path"]}
    assert cli("verify", out).code == 0
    assert [p.name for p in tmp_path.iterdir() if p.name != "result.json"] == ["out"]


@pytest.mark.parametrize(("given", "batch", "compared"), [("4:4:4", 4, [4]), ("1", 1, [1]), ("3", 3, [3])])
def test_a_fixed_batch_is_exported_and_compared_at_that_size_only(given, batch, compared, cli, tmp_path):
    import export_zoo
    from export_zoo.base.errors import BadInputError

    done = cli(*RANDOM, "--batch", given, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert done.json["recipe"]["batch"] == {"min": batch, "opt": batch, "max": batch}
    assert done.json["engines"][0]["gate"]["batches"] == compared
    engine = export_zoo.load(tmp_path / "out")
    assert engine.run(np.zeros((batch, 3, 32, 32), np.float32)).shape == (batch, 10)
    with pytest.raises(BadInputError, match=f"range {batch} to {batch}"):
        engine.run(np.zeros((batch + 1, 3, 32, 32), np.float32))


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        ("", ["onnxruntime-fp32", "onnxruntime-int8"]),
        ("onnxruntime:", ["onnxruntime-fp32", "onnxruntime-int8"]),
        ("fp32:", ["onnxruntime-fp32"]),
        ("int8:", ["onnxruntime-int8"]),
        ("onnxruntime-int8:", ["onnxruntime-int8"]),
    ],
)
def test_a_tolerance_applies_to_the_engines_it_selects_and_no_others(
    selector, names, digits, digits_bundle, cli, tmp_path
):
    both = ["--precision", "fp32", "--precision", "int8", "--calib", digits.images]
    tolerances = ["--tolerance", f"{selector}cosine=0.25", "--tolerance", f"{selector}sqnr={UNREACHABLE}"]
    done = cli(*digits.arguments(), *both, *TUNED_LITTLE, *tolerances, "--out", tmp_path / "out")
    _refused(done, 3, "parity")
    gates = {e["name"]: e["gate"] for e in done.json["engines"]}
    assert list(gates) == ["onnxruntime-fp32", "onnxruntime-int8"]
    for name, gate in gates.items():
        selected = name in names
        assert gate["tolerances"].get("cosine") == (0.25 if selected else None)
        assert (gate["tolerances"]["sqnr"] == UNREACHABLE) == selected
        assert bool(gate["failures"]) == selected
        assert all("sqnr" in text for text in gate["failures"])
        assert (name in done.json["error"]["message"]) == selected


def test_the_last_tolerance_for_a_metric_wins(cli, tmp_path):
    given = ["--tolerance", f"sqnr={UNREACHABLE}", "--tolerance", "fp32:sqnr=1.5"]
    done = cli(*RANDOM, *given, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert done.json["engines"][0]["gate"]["tolerances"]["sqnr"] == 1.5


def test_a_tolerance_that_cannot_be_met_keeps_the_bundle_aside_and_the_old_one_in_place(cli, tmp_path):
    out, kept = tmp_path / "out", tmp_path / "out.failed"
    assert cli(*RANDOM, "--out", out).code == 0
    before = _tree(out)
    done = cli(*RANDOM, "--tolerance", f"sqnr={UNREACHABLE}", "--out", out)
    error = _refused(done, 3, "parity")
    assert "sqnr" in error["message"]
    assert str(kept) in error["hint"]
    assert "FP32 does not depend on calibration" in error["hint"]
    assert "--calib" not in error["hint"]
    assert done.json["bundle"] == str(kept)
    assert done.json["engines"][0]["state"] == "built"
    assert "FAILED" in done.out
    assert _tree(out) == before
    assert json.loads((kept / "manifest.json").read_text())["status"] == "failed"

    shown = cli("inspect", kept)
    assert shown.code == 0
    assert "failed" in shown.out
    assert "FAILED" in shown.out
    _refused(cli("verify", kept), 3, "parity")


def test_something_else_in_place_of_the_failed_bundle_does_not_hide_the_verdict(cli, tmp_path):
    (tmp_path / "out.failed").write_text("precious")
    done = cli(*RANDOM, "--tolerance", f"sqnr={UNREACHABLE}", "--out", tmp_path / "out")
    assert done.code in (2, 3), done.err


def test_a_failed_gate_with_the_current_directory_as_out_is_a_parity_error(cli, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = cli(*RANDOM, "--tolerance", f"sqnr={UNREACHABLE}", "--out", ".")
    monkeypatch.chdir(tmp_path)
    _refused(done, 3, "parity")


def test_an_infinite_tolerance_is_refused_or_can_be_read_back(cli, tmp_path):
    done = cli(*RANDOM, "--tolerance", "max_abs=inf", "--out", tmp_path / "out")
    assert done.code in (0, 2)
    assert done.json["exit_code"] == done.code
    if done.code == 0:
        assert cli("inspect", tmp_path / "out").code == 0


def test_an_engine_that_makes_nan_fails_its_gate_with_valid_json(cli, tmp_path, monkeypatch):
    from export_zoo.engines.targets.onnxruntime import engine

    class Broken(engine.OnnxRuntimeEngine):
        def run_all(self, batch):
            return tuple(np.full_like(output, np.nan) for output in super().run_all(batch))

    monkeypatch.setattr(engine, "OnnxRuntimeEngine", Broken)
    done = cli(*RANDOM, "--tolerance", "sqnr=61", "--out", tmp_path / "out")
    _refused(done, 3, "parity")
    assert cli("inspect", tmp_path / "out.failed").code == 0


# -- 1: unexpected ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [[], ["-v"]])
def test_an_unexpected_error_asks_for_a_report_and_shows_its_traceback_only_with_v(
    flag, cli, tmp_path, monkeypatch
):
    from export_zoo.exporter.models import zoo

    def explode(options):
        raise RuntimeError("the sky fell")

    monkeypatch.setattr(zoo, "resolve", explode)
    done = cli(*RANDOM, *flag, "--out", tmp_path / "out")
    error = _refused(done, 1, "unexpected")
    assert error["message"] == "RuntimeError: the sky fell"
    assert "report" in error["hint"]
    assert ("Traceback" in done.err) == bool(flag)
    assert not (tmp_path / "out").exists()


# -- 4: targets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_an_unavailable_target_is_refused_before_anything_else_is_looked_at(target, cli, tmp_path):
    from export_zoo.engines.targets.registry import TARGETS

    if not TARGETS[target].unavailable:
        pytest.skip(f"{target} is available here")
    arguments = ["no_such_model", "--weights", "absent.pth", "--target", "onnxruntime", "--target", target]
    done = cli(*arguments, "--out", tmp_path / "out")
    error = _refused(done, 4, "target")
    assert f"--target {target} " in error["message"]
    assert "onnxruntime" in error["hint"]
    assert done.json["stages"] == []


def test_an_unavailable_target_is_refused_before_pytorch_is_loaded(tmp_path):
    path = tmp_path / "result.json"
    code, out, heavy = _loaded("resnet18", "--target", "tensorrt", "--json", path)
    assert (code, out) == (4, "")
    assert not heavy & {"torch", "torchvision"}
    assert json.loads(path.read_text())["exit_code"] == 4


def test_the_embedded_target_is_unavailable_without_onnxruntime(cli, monkeypatch):
    from export_zoo.engines.targets import base

    monkeypatch.setattr(base, "library_versions", lambda *names: dict.fromkeys(names, "absent"))
    error = _refused(cli(*RANDOM, "--target", "onnxruntime"), 4, "target")
    assert "install onnxruntime" in error["message"]


def test_auto_is_unavailable_where_no_target_is(cli, tmp_path, monkeypatch):
    from export_zoo.engines.targets import base

    monkeypatch.setattr(base, "library_versions", lambda *names: dict.fromkeys(names, "absent"))
    _refused(cli(*RANDOM, "--out", tmp_path / "out"), 4, "target")


# -- 5: input -------------------------------------------------------------------------------------------------------


def test_an_unknown_model_is_answered_with_the_nearest_names(cli):
    error = _refused(cli("resnet19", "--weights", "none"), 5, "input")
    assert "resnet19" in error["message"]
    assert "resnet18" in error["hint"]


def test_an_input_size_that_the_model_cannot_take_is_bad_input(cli, tmp_path):
    arguments = ["squeezenet1_1", "--weights", "none", "--input-size", "8", "--out", tmp_path / "out"]
    error = _refused(cli(*arguments), 5, "input")
    assert "8x8" in error["message"]
    assert "--input-size" in error["hint"]


@pytest.mark.parametrize("option", ["--calib", "--verify"])
def test_an_image_folder_that_is_none_is_bad_input(option, cli, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    for name, reason in (
        ("absent", "no such"),
        ("file", "not a folder"),
        ("empty", "no images"),
        ("other", "no im"),
    ):
        error = _refused(cli(*RANDOM, option, tmp_path / name), 5, "input")
        assert option in error["message"]
        assert str(tmp_path / name) in error["message"]
        assert reason in error["message"]


def test_too_few_images_to_calibrate_and_verify_on_are_bad_input(cli, tmp_path):
    folder = _pictures(tmp_path / "few", 55)
    error = _refused(cli(*RANDOM, "--precision", "int8", "--calib", folder), 5, "input")
    assert "55" in error["message"]
    assert "56" in error["message"]
    assert str(folder) in error["message"]


def test_images_with_the_same_bytes_count_once(cli, tmp_path):
    folder = _pictures(tmp_path / "few", 55)
    shutil.copy(folder / "000.png", folder / "copy.png")
    error = _refused(cli(*RANDOM, "--precision", "int8", "--calib", folder), 5, "input")
    assert "55 different" in error["message"]


def test_too_few_images_to_verify_on_are_bad_input(cli, tmp_path):
    folder = _pictures(tmp_path / "few", 31)
    error = _refused(cli(*RANDOM, "--verify", folder), 5, "input")
    assert "--verify" in error["message"]
    assert "31" in error["message"]
    assert "32" in error["message"]


def test_images_must_not_be_both_calibrated_and_verified_on(cli, tmp_path):
    folder = _pictures(tmp_path / "images", 60)
    error = _refused(cli(*RANDOM, "--calib", folder, "--verify", folder), 5, "input")
    assert "--verify" in error["message"]
    assert "60" in error["message"]


def test_one_calibration_image_under_another_name_is_found_in_the_verify_folder(cli, tmp_path):
    calib, check = _pictures(tmp_path / "a", 60, seed=1), _pictures(tmp_path / "b", 60, seed=2)
    shutil.copy(calib / "007.png", check / "other.png")
    error = _refused(cli(*RANDOM, "--calib", calib, "--verify", check), 5, "input")
    assert "1 of its images" in error["message"]
    assert "other.png" in error["message"]


def test_a_folder_of_mostly_unreadable_files_is_bad_input(cli, tmp_path):
    folder = _pictures(tmp_path / "images", 40)
    for index in range(10):
        (folder / f"broken-{index}.jpg").write_bytes(b"<html>404</html>")
    error = _refused(cli(*RANDOM, "--verify", folder), 5, "input")
    assert "10 of 50" in error["message"]
    assert "broken-0.jpg" in error["message"]


def test_a_few_unreadable_files_are_left_out_and_named(cli, tmp_path):
    folder = _pictures(tmp_path / "images", 40)
    (folder / "page.jpg").write_bytes(b"<html>404</html>")
    whole = (folder / "000.png").read_bytes()
    (folder / "000.png").write_bytes(whole[: len(whole) // 2])  # its header is fine, its pixels are not
    done = cli(*RANDOM, "--verify", folder, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    for name in ("page.jpg", "000.png"):
        assert sum(name in warning for warning in done.json["warnings"]) == 1
        assert name in done.err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["warnings"] == done.json["warnings"]
    assert manifest["artifacts"]["held_out"]["count"] == 39


def test_numbers_of_images_without_a_folder_are_warned_of(cli, tmp_path):
    done = cli(*RANDOM, "--calib-images", "20", "--verify-images", "40", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    for option in ("--calib-images", "--verify-images"):
        assert any(f"{option} has no effect without" in warning for warning in done.json["warnings"])


def test_an_unreadable_file_with_a_latin1_name_is_left_out_and_named(cli, tmp_path):
    folder = _pictures(tmp_path / "images", 40)
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")).write_bytes(b"<html>404</html>")
    done = cli(*RANDOM, "--verify", folder, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "caf" in done.err


# -- 6: states ------------------------------------------------------------------------------------------------------


@pytest.fixture
def only_graph_verified(monkeypatch):
    """Engines that could not be run here: no target of this version makes such ones by itself."""
    from export_zoo.engines.bundle import manifest

    real = manifest.Engine
    monkeypatch.setattr(manifest, "Engine", lambda **fields: real(**{**fields, "state": "graph verified"}))


def test_an_engine_below_the_required_state_ends_with_6(only_graph_verified, cli, tmp_path):
    out = tmp_path / "out"
    done = cli(*RANDOM, "--require", "verified", "--out", out)
    error = _refused(done, 6, "state")
    assert done.json["bundle"] == str(tmp_path / "out.failed")
    assert [(e["name"], e["state"]) for e in done.json["engines"]] == [("onnxruntime-fp32", "graph verified")]
    assert "onnxruntime-fp32" in done.out
    assert "--require verified" in error["message"]
    assert "onnxruntime-fp32" in error["message"]
    assert not out.exists(), "what was asked for was not reached"
    assert str(tmp_path / "out.failed") in error["hint"]
    assert json.loads((tmp_path / "out.failed" / "manifest.json").read_text())["status"] == "failed"
    _refused(cli("verify", tmp_path / "out.failed"), 3, "parity")


def test_a_verified_precision_graph_is_enough_by_default(only_graph_verified, cli, tmp_path):
    done = cli(*RANDOM, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert done.json["engines"][0]["state"] == "graph verified"


def test_a_verified_engine_reaches_the_required_state(cli, tmp_path):
    assert cli(*RANDOM, "--require", "verified", "--out", tmp_path / "out").code == 0


# -- 7: network and disk --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1"])
def test_a_failed_download_names_the_url_and_how_to_pass_the_file(weights, cli, tmp_path, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # nobody listens there, network or not
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    done = cli("resnet18", "--weights", weights, "--out", tmp_path / "out")
    error = _refused(done, 7, "environment")
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in error["message"]
    assert "--weights ./resnet18-f37072fd.pth" in error["hint"]
    assert str(tmp_path / "torch" / "hub" / "checkpoints") in error["hint"]
    assert _tree(tmp_path / "torch") == {}
    assert not (tmp_path / "out").exists()


def test_out_below_a_file_is_refused_before_any_work(cli, tmp_path):
    (tmp_path / "file").write_text("precious")
    done = cli(*RANDOM, "--out", tmp_path / "file" / "out")
    error = _refused(done, 2, "usage")
    assert done.json["stages"] == []
    assert str(tmp_path / "file") in error["message"]
    assert (tmp_path / "file").read_text() == "precious"


@pytest.fixture
def nearly_full_disk():
    """No file may grow beyond 1 MiB: what a full disk does, by the kernel's hand. JSON still fits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_no_new_bundle(cli, tmp_path, request):
    assert cli(*RANDOM, "--out", tmp_path / "cached").code == 0
    request.getfixturevalue("nearly_full_disk")
    error = _refused(cli(*RANDOM, "--out", tmp_path / "out"), 7, "environment")
    assert "File too large" in error["message"]
    assert {p.name for p in tmp_path.iterdir()} == {"cached", "result.json"}


def test_a_full_disk_leaves_the_old_bundle_as_it_was(cli, tmp_path, digits_bundle, request):
    import export_zoo

    out = tmp_path / "out"
    shutil.copytree(digits_bundle, out)
    assert cli(*RANDOM, "--out", tmp_path / "cached").code == 0
    before = _tree(out)
    request.getfixturevalue("nearly_full_disk")
    _refused(cli(*RANDOM, "--out", out), 7, "environment")
    after = _tree(out)
    assert {name: after.get(name) for name in before} == before
    assert export_zoo.load(out).run(np.zeros((1, 3, 32, 32), np.float32)).shape == (1, 10)


def test_a_full_disk_in_the_middle_of_the_work_is_a_disk_error(cli, tmp_path, nearly_full_disk):
    error = _refused(cli(*RANDOM, "--no-cache", "--out", tmp_path / "out"), 7, "environment")
    assert "File too large" in error["message"]
    assert not (tmp_path / "out").exists()


def test_figures_stand_where_no_attestation_can_be_written(cli, tmp_path, digits_bundle):
    shutil.copytree(digits_bundle, tmp_path / "copy")
    (tmp_path / "copy" / "attestations").write_text("in the way")
    done = cli("verify", tmp_path / "copy")
    assert done.code == 0, done.err
    assert "attestations cannot be written to" in done.out
    assert "onnxruntime-int8: verified" in done.out
    assert done.json["attestation"] is None


def test_json_that_cannot_be_written_is_refused_before_any_work(digits_bundle, tmp_path, capsys):
    from export_zoo.exporter.cli.app import main

    path = tmp_path / "absent" / "result.json"
    assert main(["list", "resnet18", "--json", str(path)]) == 7
    captured = capsys.readouterr()
    assert f"--json {path}" in captured.err
    assert captured.out == ""


def test_flags_may_stand_before_the_command(cli):
    done = cli("-q", "list", "resnet18")
    assert (done.code, done.out) == (0, "")
    assert done.json["models"][0]["model"] == "resnet18"


def test_json_inside_the_bundle_is_refused(cli, tmp_path):
    from export_zoo.exporter.cli.app import main

    out = tmp_path / "out"
    out.mkdir()
    assert main([*map(str, RANDOM), "--out", str(out), "--json", str(out / "manifest.json")]) == 2
    assert not list(out.glob("*.onnx"))


def test_a_tolerance_on_accuracy_without_labels_fails_the_gate(cli, tmp_path):
    done = cli(*RANDOM, "--tolerance", "accuracy=0.5", "--out", tmp_path / "out")
    error = _refused(done, 3, "parity")
    assert "accuracy" in error["message"]
    assert not (tmp_path / "out").exists()


def test_a_tolerance_for_no_engine_of_this_run_is_warned_of_and_the_specific_one_wins(cli, tmp_path):
    limits = ["--tolerance", "fp32:top1=0.25", "--tolerance", "top1=0.5", "--tolerance", "fp16:sqnr=199"]
    done = cli(*RANDOM, *limits, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert done.json["engines"][0]["gate"]["tolerances"]["top1"] == 0.25
    assert any("fp16:sqnr" in warning for warning in done.json["warnings"])


def test_a_bundle_without_engines_is_bad_input(cli, tmp_path, digits_bundle):
    shutil.copytree(digits_bundle, tmp_path / "copy")
    manifest = tmp_path / "copy" / "manifest.json"
    document = json.loads(manifest.read_text())
    document["artifacts"]["engines"] = []
    manifest.write_text(json.dumps(document))
    assert "engines" in _refused(cli("verify", tmp_path / "copy"), 5, "input")["message"]


def test_a_full_disk_at_out_is_said_of_out(cli, tmp_path, monkeypatch):
    import errno

    from export_zoo.exporter import publish

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere/inside")

    monkeypatch.setattr(publish, "publish", full)
    error = _refused(cli(*RANDOM, "--out", tmp_path / "out"), 7, "environment")
    assert error["message"] == f"--out {tmp_path / 'out'}: cannot be written: No space left on device"


# -- --json -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["before", "after", "equals"])
def test_json_is_written_wherever_the_option_stands(place, tmp_path):
    from export_zoo.exporter.cli.app import main

    path, command = tmp_path / "result.json", ["resnet18", "--batch", "0"]
    given = [f"--json={path}"] if place == "equals" else ["--json", str(path)]
    path.write_text("old")
    assert main([*given, *command] if place == "before" else [*command, *given]) == 2
    assert json.loads(path.read_text())["exit_code"] == 2
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("given", [["--json", "{}", "-q"], ["-q", "--json={}"]])
def test_options_of_every_command_may_stand_before_it(given, tmp_path, capsys):
    from export_zoo.exporter.cli.app import main

    path = tmp_path / "result.json"
    assert main([*(word.format(path) for word in given), "list", "resnet18"]) == 0
    assert [row["model"] for row in json.loads(path.read_text())["models"]] == ["resnet18"]
    assert capsys.readouterr().out == ""


def test_the_last_json_is_written(tmp_path):
    from export_zoo.exporter.cli.app import main

    places = [tmp_path / "a.json", tmp_path / "b.json"]
    assert main(["list", "resnet18", *(word for place in places for word in ("--json", str(place)))]) == 0
    assert list(tmp_path.iterdir()) == places[1:]


@pytest.mark.parametrize("place", ["manifest.json", "files/result.json", "other.json"])
def test_json_into_any_bundle_is_refused(place, cli, digits_bundle):
    from export_zoo.exporter.cli.app import main

    before = (digits_bundle / "manifest.json").read_bytes()
    assert main(["inspect", str(digits_bundle), "-q", "--json", str(digits_bundle / place)]) == 2
    assert (digits_bundle / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("lost", ["closed", "full"])
def test_lost_progress_output_changes_neither_verdict_nor_json(lost, tmp_path):
    arguments = [*map(str, RANDOM), "--out", str(tmp_path / "out"), "--json", str(tmp_path / "result.json")]
    command = [sys.executable, "-m", "export_zoo", *arguments]
    if lost == "full":
        stderr = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, stderr = os.pipe()
        os.close(reader)
    done = subprocess.run(
        command, cwd=ROOT, env=_environment(), stdout=subprocess.DEVNULL, stderr=stderr, check=False
    )
    os.close(stderr)
    assert done.returncode == 0
    assert json.loads((tmp_path / "result.json").read_text())["exit_code"] == 0
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_a_signal_after_the_verdict_does_not_change_the_exit_code(tmp_path):
    """Libraries take most of a second to leave: signals come while the bundle is there and JSON says 0."""
    path = tmp_path / "result.json"
    command = [sys.executable, "-m", "export_zoo", *map(str, RANDOM), "--out", str(tmp_path / "out")]
    with subprocess.Popen(
        [*command, "--json", str(path)], cwd=ROOT, env=_environment(), stderr=subprocess.DEVNULL
    ) as process:
        while not path.exists() and process.poll() is None:
            time.sleep(0.002)
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    assert json.loads(path.read_text())["exit_code"] == 0


def test_a_second_signal_changes_nothing(tmp_path):
    path = tmp_path / "result.json"
    command = [sys.executable, "-m", "export_zoo", *map(str, RANDOM), "--no-cache"]
    with subprocess.Popen(
        [*command, "--out", str(tmp_path / "out"), "--json", str(path)],
        cwd=ROOT,
        env=_environment(),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert "weights" in process.stderr.readline()
        for _ in range(5):
            process.send_signal(signal.SIGINT)
            time.sleep(0.02)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert json.loads(path.read_text())["exit_code"] == 130


@pytest.mark.parametrize(
    "given", [["--batch", "1:8:5000"], ["--tolerance", "top1=2"], ["--tolerance", "misplaced=-1"]]
)
def test_what_cannot_be_is_a_usage_error(given, cli, tmp_path):
    done = cli(*RANDOM, *given, "--out", tmp_path / "out")
    assert _refused(done, 2, "usage")["message"].startswith(given[0])
    assert done.json["stages"] == []


@pytest.mark.parametrize("option", ["--calib", "--verify"])
def test_folders_are_looked_at_before_weights_are_downloaded(option, cli, tmp_path):
    done = cli("resnet18", option, tmp_path / "absent", "--out", tmp_path / "out")
    assert f"{option} {tmp_path / 'absent'}: no such folder" in _refused(done, 5, "input")["message"]
    assert done.json["stages"] == []


def test_list_takes_capitals(cli):
    assert [row["model"] for row in cli("list", "ResNet18").json["models"]] == ["resnet18"]


def test_a_resize_below_the_input_is_warned_of(cli, tmp_path):
    done = cli(*RANDOM, "--resize-size", "10", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert any("the resize to 10 is smaller than the input" in warning for warning in done.json["warnings"])


def test_running_out_of_memory_is_no_defect(cli, tmp_path, monkeypatch):
    from export_zoo.exporter.stages import network

    def starve(*_: object) -> None:
        raise MemoryError("Unable to allocate 22.9 GiB")

    monkeypatch.setattr(network, "export_graph", starve)
    error = _refused(cli(*RANDOM, "--out", tmp_path / "out"), 7, "environment")
    assert "out of memory" in error["message"]
    assert "--batch" in error["hint"]


def test_a_directory_given_as_json_is_refused_and_nothing_is_left_beside_it(tmp_path):
    from export_zoo.exporter.cli.app import main

    (tmp_path / "directory").mkdir()
    assert main(["list", "resnet18", "--json", str(tmp_path / "directory")]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["directory"]


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_json_without_a_file_name_is_a_usage_error(path, capsys):
    from export_zoo.exporter.cli.app import main

    assert main(["list", "resnet18", "--json", path]) == 2
    assert "--json" in capsys.readouterr().err


def test_json_goes_into_a_pipe_and_does_not_replace_it(tmp_path):
    from export_zoo.exporter.cli.app import main

    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert main(["resnet18", "--batch", "0", "--json", str(path)]) == 2
        assert path.is_fifo()
        assert json.loads(os.read(reader, 1 << 16))["exit_code"] == 2
    finally:
        os.close(reader)


def test_json_is_written_although_nobody_reads_the_table(tmp_path):
    path = tmp_path / "result.json"
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = _program(
            "list", "resnet18", "--json", path, capture_output=False, stdout=writer, stderr=subprocess.PIPE
        )
    finally:
        os.close(writer)
    assert "Traceback" not in done.stderr
    assert json.loads(path.read_text())["exit_code"] == done.returncode


# -- 130: interrupted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["warning: no --calib", "export "], ids=["in export", "in simplify"])
def test_an_interrupted_export_leaves_no_bundle_and_writes_the_json(line, tmp_path):
    path, cache = tmp_path / "result.json", tmp_path / "cache"
    # A shell starts background jobs, the test run perhaps, with SIGINT ignored, and children inherit that.
    program = "import signal; from export_zoo.exporter.cli.app import run; "
    program += "signal.signal(signal.SIGINT, signal.default_int_handler); run()"
    places = ["--out", str(tmp_path / "out"), "--json", str(path)]
    command = [sys.executable, "-c", program, *RANDOM, *places]
    environment = _environment(EXPORT_ZOO_CACHE=str(cache))
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        shown = []
        for text in process.stderr:
            shown.append(text)
            if text.startswith(line):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        assert process.wait(timeout=120) == 130, "".join(shown) + rest
    assert "error: interrupted" in rest
    assert "Traceback" not in rest
    document = json.loads(path.read_text())
    assert (document["schema_version"], document["exit_code"]) == (1, 130)
    assert document["error"]["kind"] == "interrupted"
    assert {s["name"] for s in document["stages"]} == {"weights", "export"} - (
        {"export"} if "calib" in line else set()
    )
    assert {p.name for p in tmp_path.iterdir()} == {"result.json", "cache"}
    assert not list((cache / "work").iterdir())


# -- colours and quiet ------------------------------------------------------------------------------------------------


def _on_a_terminal(*arguments: str | Path, **environment: str) -> tuple[int, str]:
    """Exit code and all that a terminal of the usual kind is sent, stdout and stderr together."""
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "export_zoo", *map(str, arguments)]
    env = _environment(TERM="xterm-256color", **environment)
    with subprocess.Popen(command, cwd=ROOT, env=env, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        chunks = []
        try:
            while chunk := os.read(ours, 1 << 16):
                chunks.append(chunk)
        except OSError:  # the other end is closed: how Linux says end of file on a terminal
            pass
        os.close(ours)
        code = process.wait(timeout=120)
    return code, b"".join(chunks).decode()


def test_a_terminal_gets_colours():
    code, text = _on_a_terminal("resnet18", "--batch", "0")
    assert code == 2
    assert "\x1b[1;31merror: \x1b[0m--batch" in text, "bold ends with the word it is meant for"


def test_no_color_means_no_escape_codes_in_errors():
    code, text = _on_a_terminal("resnet18", "--batch", "0", NO_COLOR="1")
    assert code == 2
    assert "error: --batch" in text
    assert "\x1b" not in text


def test_no_color_means_no_escape_codes_and_no_bars_in_an_export(cli, tmp_path):
    assert cli(*RANDOM, "--out", tmp_path / "cached").code == 0
    fresh = ["--tolerance", "top5=0.5", "--out", tmp_path / "out"]  # the gate runs, the rest is cached
    code, text = _on_a_terminal(*RANDOM, *fresh, NO_COLOR="1")
    assert code == 0
    assert "onnxruntime-fp32" in text
    assert "\x1b" not in text


def test_a_pipe_gets_no_escape_codes(cli, tmp_path):
    assert cli(*RANDOM, "--out", tmp_path / "cached").code == 0
    done = _program(*RANDOM, "--tolerance", "top5=0.25", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "onnxruntime-fp32" in done.stdout
    assert "verify" in done.stderr
    assert "warning:" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stdout + done.stderr
    failed = _program("resnet18", "--batch", "0")
    assert failed.returncode == 2
    assert "\x1b" not in failed.stderr


@pytest.mark.parametrize(
    ("command", "code"),
    [
        pytest.param([*RANDOM, "--out", "{new}"], 0, id="export"),
        pytest.param(["verify", "{bundle}"], 0, id="verify"),
        pytest.param(["list", "no-such-model"], 5, id="error"),
        pytest.param([*RANDOM, "--tolerance", "sqnr=199", "--out", "{new}"], 3, id="failed"),
        pytest.param(["list", "resnet18"], 0, id="list"),
        pytest.param(["inspect", "{bundle}"], 0, id="inspect"),
    ],
)
def test_quiet_shows_warnings_and_errors_only(command, code, cli, tmp_path):
    assert cli(*RANDOM, "--out", tmp_path / "bundle").code == 0
    places = {"new": tmp_path / "new", "bundle": tmp_path / "bundle"}
    done = cli(*(word.format(**places) for word in command), "-q")
    assert done.code == code, done.err
    assert done.out == ""
    for line in done.err.splitlines():
        assert line.startswith(("warning: ", "error: ", "  next: ")), line
    assert ("warning: " in done.err) == (command[0] in (RANDOM[0], "verify"))  # the weights are random


# -- list -----------------------------------------------------------------------------------------------------------


def test_list_shows_every_model_with_all_its_weights(capsys):
    from torchvision.models import get_model_weights

    from export_zoo.exporter.cli.app import main
    from export_zoo.exporter.models.sources.torchvision_zoo import model_names, segmentation_names

    assert main(["list"]) == 0
    captured = capsys.readouterr()
    rows = [line.split("│")[1:3] for line in captured.out.splitlines() if line.startswith("│")]
    listed = {(model.strip(), weights.strip()) for model, weights in rows}
    names = model_names() + segmentation_names()
    assert listed == {(name, w.name) for name in names for w in get_model_weights(name)}
    assert captured.err == ""


def test_list_of_everything_is_valid_json(cli):
    from export_zoo.exporter.models.sources.torchvision_zoo import model_names, segmentation_names

    done = cli("list")
    assert done.code == 0
    assert {row["model"] for row in done.json["models"]} == set(model_names() + segmentation_names())
    assert all(1 < row["memory_gib"] < 40 for row in done.json["models"])


RESNET101_SEGMENTATION = {"fcn_resnet101", "deeplabv3_resnet101"}


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("resnet18", {"resnet18"}),
        ("resnet1", {"resnet18", "resnet101", "resnet152", "wide_resnet101_2", *RESNET101_SEGMENTATION}),
        ("resnet1?", {"resnet18"}),
        ("resnet??", {"resnet18", "resnet34", "resnet50"}),
        ("*_v2", {"mobilenet_v2"}),
        ("squeeze", {"squeezenet1_0", "squeezenet1_1"}),
        ("vit_b_[13]*", {"vit_b_16", "vit_b_32"}),
    ],
)
def test_list_takes_a_part_of_a_name_or_a_glob(pattern, names, cli):
    done = cli("list", pattern)
    assert done.code == 0
    assert {row["model"] for row in done.json["models"]} == names


def test_list_shows_sizes_and_accuracy_as_torchvision_publishes_them(cli):
    done = cli("list", "resnet50")
    row = next(r for r in done.json["models"] if (r["model"], r["weights"]) == ("resnet50", "IMAGENET1K_V2"))
    assert (row["input_size"], row["resize_size"], row["interpolation"]) == (224, 232, "bilinear")
    assert (row["params"], row["gflops"], row["top1"]) == (25557032, 4.089, 80.858)
    line = next(text for text in done.out.splitlines() if " resnet50 " in text and "V2" in text)
    assert [cell.strip() for cell in line.split("│")[1:-1]] == [
        *(
            "resnet50",
            "IMAGENET1K_V2",
            "224",
            "232 bilinear",
            "25.6 M",
            "4.09",
            f"{row['memory_gib']} GiB",
            "80.9",
        ),
    ]


def test_list_of_no_match_is_bad_input(cli):
    done = cli("list", "alexa*")
    error = _refused(done, 5, "input")
    assert "alexa*" in error["message"]
    assert "export-zoo list" in error["hint"]
    assert done.out == ""


# -- inspect and verify ---------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(digits_bundle, tmp_path) -> Path:
    """A copy of the digits bundle, to be damaged."""
    return Path(shutil.copytree(digits_bundle, tmp_path / "copy.bundle"))


def _manifest(bundle: Path) -> dict:
    return json.loads((bundle / "manifest.json").read_text())


def _change_manifest(bundle: Path, change) -> None:
    document = _manifest(bundle)
    change(document)
    (bundle / "manifest.json").write_text(json.dumps(document))


def _engine_file(bundle: Path, precision: str) -> Path:
    engines = {e["precision"]: e for e in _manifest(bundle)["artifacts"]["engines"]}
    return bundle / engines[precision]["file"]["path"]


def _held_out_file(bundle: Path, name: str) -> Path:
    return bundle / _manifest(bundle)["artifacts"]["held_out"][name]["path"]


def _promise(bundle: Path, path: Path) -> None:
    """Make the manifest describe a changed file: the forgery that hashes alone cannot find."""
    data = path.read_bytes()
    new = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}

    def change(node):
        if isinstance(node, dict):
            if node.get("path") == path.relative_to(bundle).as_posix():
                node.update(new)
            for value in node.values():
                change(value)
        elif isinstance(node, list):
            for value in node:
                change(value)

    _change_manifest(bundle, change)


def test_inspect_shows_the_manifest_and_changes_nothing(bundle, cli):
    before = _tree(bundle)
    done = cli("inspect", bundle)
    assert done.code == 0, done.err
    assert done.json["manifest"] == _manifest(bundle)
    assert done.err == ""
    shown = dict(line.split(None, 1) for line in done.out.splitlines() if line[:1].isalpha())
    assert str(bundle) in shown["bundle"]
    assert "ok" in shown["bundle"]
    assert shown["model"] == "resnet18, classification, 10 classes"
    assert shown["weights"].startswith("resnet18.safetensors (SHA-256 ")
    assert "[batch, 3, 32, 32]" in shown["input"]
    assert shown["batch"] == "1 to 32, best at 8"
    assert "resize 32 bilinear" in shown["preprocess"]
    assert shown["labels"] == "10 names"
    assert shown["calibration"].startswith("minmax, ")
    assert "images with eager logits" in shown["held"]
    for name in ("onnxruntime-fp32", "onnxruntime-int8"):
        assert name in done.out
    assert _tree(bundle) == before


def test_verify_runs_the_engines_again_and_writes_an_attestation(bundle, cli):
    before = _tree(bundle)
    done = cli("verify", bundle)
    assert done.code == 0, done.err
    assert list(done.json["engines"]) == ["onnxruntime-fp32", "onnxruntime-int8"]
    (path,) = (bundle / "attestations").iterdir()
    assert done.json["attestation"] == str(path)
    attestation = json.loads(path.read_text())
    assert attestation["status"] == "ok"
    assert attestation["manifest_sha256"] == before["manifest.json"]
    assert attestation["engines"] == done.json["engines"]
    for name in ("onnxruntime-fp32", "onnxruntime-int8"):
        assert f"\n{name}: verified, SQNR " in "\n" + done.out
    assert "verify " in done.err
    assert {k: v for k, v in _tree(bundle).items() if "attestations" not in k} == before


def test_inspect_shows_what_was_attested_and_what_cannot_be_read(bundle, cli):
    _change_manifest(
        bundle, lambda document: document["artifacts"]["engines"][1]["gate"]["tolerances"].update(sqnr=500)
    )
    path = Path(cli("verify", bundle).json["attestation"])
    path.with_name("0.json").write_text("{")
    done = cli("inspect", bundle)
    document = json.loads(path.read_text())
    assert done.json["attestations"] == {f"attestations/{path.name}": document}
    assert done.json["unreadable_attestations"] == ["attestations/0.json"]
    results = "onnxruntime-fp32 verified, onnxruntime-int8 FAILED"
    assert f"attestation  attestations/{path.name}, {document['machine']}: {results}" in done.out
    assert "warning      attestations/0.json cannot be read, and is not used" in done.out


def test_verify_says_that_weights_are_random(bundle, cli):
    _change_manifest(bundle, lambda document: document["recipe"]["source"]["weights"].update(random=True))
    assert "random weights: accuracy figures mean nothing" in cli("verify", bundle).json["warnings"]


def test_verify_and_inspect_do_not_load_pytorch(bundle):
    for command in ("verify", "inspect"):
        code, out, heavy = _loaded(command, bundle)
        assert code == 0
        assert "onnxruntime-int8" in out
        assert not heavy & {"torch", "torchvision"}


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_what_is_no_bundle_is_bad_input(command, cli, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name, why in (
        ("empty", "no manifest.json in it"),
        ("file", "a file"),
        ("absent", "no such directory"),
    ):
        error = _refused(cli(command, tmp_path / name), 5, "input")
        assert str(tmp_path / name) in error["message"]
        assert why in error["message"]


def _other_version(document: dict) -> None:
    document["schema_version"] = 2


def _lacks_recipe(document: dict) -> None:
    del document["recipe"]


def _points_outside(document: dict) -> None:
    document["artifacts"]["held_out"]["logits"]["path"] = "../../secret.npy"


@pytest.mark.parametrize("command", ["verify", "inspect"])
@pytest.mark.parametrize(
    "damage", [_other_version, _lacks_recipe, _points_outside], ids=["version", "recipe", "path"]
)
def test_a_manifest_that_does_not_hold_is_bad_input(damage, command, bundle, cli):
    _change_manifest(bundle, damage)
    error = _refused(cli(command, bundle), 5, "input")
    assert str(bundle / "manifest.json") in error["message"]


@pytest.mark.parametrize("command", ["verify", "inspect"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_a_manifest_that_is_none_is_bad_input(content, command, bundle, cli):
    (bundle / "manifest.json").write_bytes(content)
    error = _refused(cli(command, bundle), 5, "input")
    assert str(bundle / "manifest.json") in error["message"]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_truncate, _flip_a_bit, Path.unlink], ids=["truncated", "bit", "missing"])
@pytest.mark.parametrize("which", ["int8", "fp32", "inputs", "logits"])
def test_a_damaged_file_is_found_and_named(which, damage, bundle, cli):
    path = _held_out_file(bundle, which) if which in ("inputs", "logits") else _engine_file(bundle, which)
    damage(path)
    error = _refused(cli("verify", bundle), 5, "input")
    assert str(path) in error["message"]
    assert not (bundle / "attestations").exists()


@pytest.mark.parametrize(("precision", "other"), [("int8", "fp32"), ("fp32", "int8")])
def test_tampered_weights_are_found_although_the_hashes_fit(precision, other, bundle, cli):
    import onnx
    from onnx import numpy_helper

    path = _engine_file(bundle, precision)
    model = onnx.load(path)
    kernel = next(t for t in model.graph.initializer if len(t.dims) == 4)
    kernel.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(kernel)[::-1].copy(), kernel.name))
    onnx.save(model, path)
    assert cli("verify", bundle).code == 5
    _promise(bundle, path)

    done = cli("verify", bundle)
    error = _refused(done, 3, "parity")
    assert f"onnxruntime-{precision}" in error["message"]
    assert f"onnxruntime-{other}" not in error["message"]
    assert f"onnxruntime-{precision}: FAILED" in done.out
    assert f"onnxruntime-{other}: verified" in done.out
    attestation = json.loads(Path(done.json["attestation"]).read_text())
    assert attestation["status"] == "failed"
    assert attestation["states"] == {f"onnxruntime-{precision}": "built", f"onnxruntime-{other}": "verified"}


@pytest.mark.parametrize(
    "which",
    ["int8", "fp32", pytest.param("inputs"), pytest.param("logits")],
)
def test_nonsense_with_a_fitting_hash_is_bad_input(which, bundle, cli):
    path = _held_out_file(bundle, which) if which in ("inputs", "logits") else _engine_file(bundle, which)
    path.write_bytes(b"nonsense")
    _promise(bundle, path)
    error = _refused(cli("verify", bundle), 5, "input")
    assert str(path) in error["message"]


def test_tampered_logits_are_found_although_the_hashes_fit(bundle, cli):
    path = _held_out_file(bundle, "logits")
    np.save(path, np.load(path)[:, ::-1].copy())
    _promise(bundle, path)
    done = cli("verify", bundle)
    error = _refused(done, 3, "parity")
    assert "onnxruntime-fp32" in error["message"]
    assert "onnxruntime-int8" in error["message"]
