#!/usr/bin/env bash
# Cross-compile the C++ library for ARM64 and run it under qemu: ci/cpp-arm64.sh [BUNDLES].
# BUNDLES is what engines/cpp/tests/make_bundles.py wrote, by default that of ci/cpp.sh. ONNX Runtime and OpenVINO are those
# of the ARM64 root (python -m export_zoo.engines.emulation.arm64_root).
set -euo pipefail
cd "$(dirname "$0")/.."
python="$PWD/.venv/bin/python"
bundles=${1:-$PWD/engines/cpp/build/release/bundles}
bash ci/cpp-packages.sh g++-aarch64-linux-gnu qemu-user
bash ci/onnxruntime-headers.sh
sysroot=$PWD/engines/cpp/.deps/arm64
[ -d "$sysroot" ] || "$python" engines/cpp/tests/check_arm64.py sysroot "$sysroot"
build=$PWD/engines/cpp/build/arm64
openvino=$("$python" -c 'import openvino, pathlib; print(pathlib.Path(openvino.__file__).parent)')
cmake -S engines/cpp -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_TOOLCHAIN_FILE="$PWD/engines/cpp/cmake/arm64.cmake" \
  -DBUILD_SHARED_LIBS=OFF -DEXPORT_ZOO_WARNINGS_AS_ERRORS=ON \
  -DEXPORT_ZOO_ONNXRUNTIME_INCLUDE="$PWD/engines/cpp/.deps/include" -DEXPORT_ZOO_OPENVINO_INCLUDE="$openvino/include"
cmake --build "$build"
"$python" engines/cpp/tests/check_arm64.py logits "$build/zoo-infer" "$bundles" "$sysroot"
