#!/usr/bin/env bash
# Build the wheel and use it from outside the checkout: what a user installs must be complete.
set -euo pipefail
bin="$PWD/.venv/bin"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$bin/python" -m build --wheel --outdir "$work/dist" . >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
"$bin/python" -m pip install --quiet --no-deps --target "$work/site" "$work"/dist/*.whl
cd "$work"
PYTHONPATH="$work/site" "$bin/python" - "$work/site" <<'PY'
import pathlib, sys
import export_zoo
from export_zoo import ExportOptions, export, load, verify
from export_zoo.exporter.matrix import report
folder = pathlib.Path(export_zoo.__file__).parent
assert folder.parent == pathlib.Path(sys.argv[1]), folder
assert (folder / "py.typed").is_file(), folder
for name in ("exporter", "engines", "calibration"):
    assert (folder / name / "__init__.py").is_file() and not (folder / name).is_symlink(), name
    assert not (folder.parent / name).exists(), name
assert pathlib.Path(report.__file__).with_name("matrix.html.jinja").is_file()
print("wheel: complete")
PY
