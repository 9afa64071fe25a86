#!/usr/bin/env bash
# The whole gate, in the order that fails fastest. Called by .ci/run and by the GitHub workflow.
set -euo pipefail
cd "$(dirname "$0")/.."
export EXPORT_ZOO_CACHE="${EXPORT_ZOO_CACHE:-$PWD/.ci-cache}" PIP_DISABLE_PIP_VERSION_CHECK=1 NO_COLOR=1
# CPU time and disk of each step, for ci/budget.py.
taken=$(mktemp -d)
number=-1
used() { df -BM --output=used . | tail -n 1 | tr -dc 0-9; }
mark() {
  times >"$taken/times"  # not in a pipe: that would be a shell of its own, without children
  printf '%s | %s | %s\n' "$1" "$(tail -n 1 "$taken/times")" "$(used)" >>"$taken/steps"
  number=$((number + 1))
  echo "$number" >"$taken/number"
}
step() {
  printf '\n=== %s (%ss)\n' "$1" "$SECONDS"
  mark "$1"
}
echo 0 >"$taken/number"
: >"$taken/disk"
(while sleep 5; do echo "$(cat "$taken/number") $(used)" >>"$taken/disk"; done) &
sampler=$!
trap 'kill "$sampler" 2>/dev/null; rm -rf .ci-cache "$taken"' EXIT

step "system packages"
bash ci/system-packages.sh

step "virtual environment"
make venv

step "ruff, mypy, import-linter"
make check

step "README commands: make demo"
make demo

step "a sample of the matrix"
.venv/bin/export-zoo matrix ci/matrix.yaml --job sample --out demo/matrix --html demo/matrix/index.html

step "INT8 on other CPUs"
export EXPORT_ZOO_ARM64_ROOT="$EXPORT_ZOO_CACHE/arm64-root"
.venv/bin/python -m export_zoo.engines.emulation.arm64_root
.venv/bin/export-zoo verify demo/resnet18-digits.bundle --cpu haswell --cpu nehalem --cpu neoverse-n1 | tee demo/cpus.txt
# Integers are the same to the bit; ARM64 may differ in the last bits of what is float.
# Nehalem's kernels do not saturate, so it is what this CPU must equal, too.
for cpu in haswell nehalem; do grep -q "onnxruntime-int8 on $cpu: .*logits are equal to the bit" demo/cpus.txt; done

step "a visit to a GPU, rehearsed"
.venv/bin/python ci/gpu_visit.py rehearse demo/gpu-visit --images demo/photos --digits demo/digits
rm -rf demo/gpu-visit

step "wheels"
bash ci/wheel.sh demo/resnet18-digits.bundle

step "C++ library and ctest"
bash ci/cpp.sh

# Last, so that the closing line of the log is that of the tests.
step "README commands: make test"
.venv/bin/python ci/budget.py "$taken"
make test
mark "end"
.venv/bin/python ci/budget.py "$taken" >/dev/null
