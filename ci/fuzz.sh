#!/usr/bin/env bash
# Fuzz the decoders and the manifest reader under the address and undefined-behaviour sanitizers: ci/fuzz.sh [SECONDS].
# Needs clang. Findings are written to engines/cpp/build/fuzz; the corpus in the repository stays as it is.
set -euo pipefail
seconds=${1:-60}
cd "$(dirname "$0")/.."
bash ci/cpp-packages.sh
if ! command -v clang++ > /dev/null; then
  sudo=""
  [ "$(id -u)" -eq 0 ] || sudo=sudo
  $sudo apt-get install -y -qq --no-install-recommends clang
fi
bash ci/onnxruntime-headers.sh
cd engines/cpp
cmake --preset fuzz
cmake --build --preset fuzz
cd build/fuzz
mkdir -p corpus/decode corpus/manifest
for bundle in ../../../../tests/cases/bundles/*/; do
  cp "$bundle/manifest.json" "corpus/manifest/$(basename "$bundle").json"
done
for what in decode manifest; do
  seeds=()
  if [[ -d ../../fuzz/corpus/$what ]]; then seeds+=("../../fuzz/corpus/$what"); fi
  fuzz/fuzz-$what -max_total_time="$seconds" -max_len=65536 -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 \
    -verbosity=0 "corpus/$what" "${seeds[@]}"
done
