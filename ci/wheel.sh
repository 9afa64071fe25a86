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
import calibration, engines, exporter
from exporter import ExportOptions, export_zoo
for package in (calibration, engines, exporter):
    folder = pathlib.Path(package.__file__).parent
    assert folder.parent == pathlib.Path(sys.argv[1]), folder
    assert (folder / "py.typed").is_file(), folder
print("wheel: complete")
PY
