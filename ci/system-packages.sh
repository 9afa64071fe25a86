#!/usr/bin/env bash
# Install what a bare Debian or Ubuntu lacks: make, Python with venv, and qemu-user, by which tests run other CPUs, and a browser. Does
# nothing where all is there.
set -euo pipefail
missing=()
command -v make >/dev/null || missing+=(make)
"${PYTHON:-python3}" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3 python3-venv)
command -v qemu-x86_64 >/dev/null && command -v qemu-aarch64 >/dev/null || missing+=(qemu-user)
command -v chromium >/dev/null || command -v google-chrome >/dev/null || missing+=(chromium)  # tests look at pages
[ ${#missing[@]} -eq 0 ] && exit 0
sudo=""
[ "$(id -u)" -eq 0 ] || sudo=sudo
$sudo apt-get update -qq
$sudo apt-get install -y -qq --no-install-recommends "${missing[@]}"
