#!/usr/bin/env bash
# Build the C++ library with warnings as errors and run its tests: ci/cpp.sh [release|asan|tsan] [-DNAME=VALUE ...].
set -euo pipefail
preset=${1:-release}
cd "$(dirname "$0")/.."
bash ci/cpp-packages.sh
bash ci/onnxruntime-headers.sh
python="$PWD/.venv/bin/python"
onnxruntime=$("$python" -c 'import pathlib, onnxruntime; print(next(pathlib.Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")))')
cd engines/cpp
cmake --preset "$preset" -DEXPORT_ZOO_PYTHON="$python" -DEXPORT_ZOO_TEST_ONNXRUNTIME="$onnxruntime" "${@:2}"
cmake --build --preset "$preset"
ctest --preset "$preset"
