#!/usr/bin/env bash
# Build the wheels and use them from outside the checkout: what a user installs must be complete.
# ci/wheel.sh [BUNDLE]: with a bundle, also install export-zoo-runtime into a fresh environment and serve the bundle there.
set -euo pipefail
bin="$PWD/.venv/bin"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$bin/python" -m build --wheel --outdir "$work/dist" . >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
"$bin/python" -m pip install --quiet --no-deps --target "$work/site" "$work"/dist/*.whl
(cd "$work" && PYTHONPATH="$work/site" "$bin/python" - "$work/site" <<'PY'
import pathlib, sys
import export_zoo
from export_zoo import ExportOptions, export, load, verify
from export_zoo.exporter.matrix import slurm
from export_zoo.exporter.page import templates
folder = pathlib.Path(export_zoo.__file__).parent
assert folder.parent == pathlib.Path(sys.argv[1]), folder
assert (folder / "py.typed").is_file(), folder
for name in ("exporter", "engines", "calibration"):
    assert (folder / name / "__init__.py").is_file() and not (folder / name).is_symlink(), name
    assert not (folder.parent / name).exists(), name
assert pathlib.Path(slurm.__file__).with_name("slurm.sh.jinja").is_file()
assert len([*pathlib.Path(templates.__file__).parent.glob("*.jinja")]) >= 6
print("wheel: complete")
PY
)
[ $# -eq 0 ] && exit 0

bundle=$(realpath "$1")
"${PYTHON:-python3}" -m venv "$work/runtime"
"$work/runtime/bin/python" -m pip install --quiet ./runtime
cat >"$work/run.py" <<'PY'
import hashlib, importlib.util, sys
import numpy as np
import export_zoo
engine = export_zoo.load(sys.argv[1], engine="onnxruntime-int8")  # both environments can run it
p = engine.manifest.recipe.preprocess
batch = np.random.default_rng(0).standard_normal((3, 3, p.crop_height, p.crop_width), dtype=np.float32)
print(engine.name, hashlib.sha256(engine.run(batch).tobytes()).hexdigest())
assert importlib.util.find_spec("torch") is None or sys.argv[2:] == ["--torch"], "the runtime installed torch"
PY
cd "$work"
"$work/runtime/bin/python" run.py "$bundle" >served
"$bin/python" run.py "$bundle" --torch >expected
diff served expected
"$work/runtime/bin/export-zoo" verify "$bundle" --quiet
"$work/runtime/bin/export-zoo" inspect "$bundle" >/dev/null
"$work/runtime/bin/export-zoo" report "$bundle" >card.md
"$work/runtime/bin/export-zoo" bench "$bundle" --seconds 0.05 --batch 1 --quiet
du -sh "$work/runtime" | cut -f1 | xargs echo "runtime: the same logits without PyTorch;"
