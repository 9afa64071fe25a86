#!/usr/bin/env bash
# Build the C++ library with warnings as errors and run its tests: ci/cpp.sh [release|asan|tsan] [-DNAME=VALUE ...].
set -euo pipefail
preset=${1:-release}
cd "$(dirname "$0")/.."
bash ci/cpp-packages.sh
bash ci/onnxruntime-headers.sh
python="$PWD/.venv/bin/python"
onnxruntime=$("$python" -c 'import pathlib, onnxruntime; print(next(pathlib.Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")))')
openvino=$("$python" -c 'import pathlib, openvino; print(pathlib.Path(openvino.__file__).parent)')
# Another version, for a test of programs that have their own.
other=$PWD/engines/cpp/.deps/onnxruntime-1.22.1/libonnxruntime.so.1
if [ ! -f "$other" ]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  "$python" -m pip download --quiet --no-deps --only-binary :all: --python-version 3.11 --dest "$work" onnxruntime==1.22.1
  "$python" -m zipfile --extract "$work"/onnxruntime-*.whl "$work/unpacked"
  mkdir -p "$(dirname "$other")"
  cp "$work"/unpacked/onnxruntime/capi/libonnxruntime.so.1.22.1 "$other"
fi
cd engines/cpp
cmake --preset "$preset" -DEXPORT_ZOO_PYTHON="$python" -DEXPORT_ZOO_TEST_ONNXRUNTIME="$onnxruntime" \
  -DEXPORT_ZOO_TEST_OTHER_ONNXRUNTIME="$other" -DEXPORT_ZOO_OPENVINO_INCLUDE="$openvino/include" \
  -DEXPORT_ZOO_TEST_OPENVINO="$openvino/libs" "${@:2}"
cmake --build --preset "$preset"
ctest --preset "$preset"
