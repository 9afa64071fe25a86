#!/usr/bin/env bash
# ONNX Runtime's official headers into engines/cpp/.deps/include. No wheel carries them; Debian 13 packages them, and they
# compile on Debian 12 as well. Only the headers are used: the library is found at run time.
set -euo pipefail
cd "$(dirname "$0")/../engines/cpp"
[ -f .deps/include/onnxruntime_cxx_api.h ] && exit 0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{lists/partial,cache/archives/partial}
# The mirror that this machine's own apt uses, or DEBIAN_MIRROR where that is not Debian's, as on Ubuntu.
mirror=${DEBIAN_MIRROR:-}
[ -n "$mirror" ] || mirror=$(apt-cache policy 2>/dev/null | grep -o -m1 'http[s]*://[^ ]*/debian/\? ' | tr -d ' ' || true)
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
if [ -z "$mirror" ]; then
  echo "onnxruntime-headers.sh: apt knows no Debian mirror here (it is Ubuntu's?): set DEBIAN_MIRROR to the URL of one," \
    "http://HOST/debian" >&2
  exit 1
fi
if [ ! -f "$keyring" ]; then
  echo "onnxruntime-headers.sh: there is no $keyring: apt-get install debian-archive-keyring" >&2
  exit 1
fi
echo "deb [signed-by=$keyring] $mirror trixie main" >"$work/sources.list"
apt=(-o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State::lists=$work/lists"
  -o "Dir::Cache=$work/cache" -o APT::Sandbox::User="$(id -un)" -o Debug::NoLocking=true)
apt-get "${apt[@]}" -qq update
(cd "$work" && apt-get "${apt[@]}" -qq download libonnxruntime-dev)
dpkg-deb -x "$work"/libonnxruntime-dev_*.deb "$work/unpacked"
mkdir -p .deps/include
cp -r "$work"/unpacked/usr/include/onnxruntime/. .deps/include/
