#!/usr/bin/env bash
# Install what the C++ library is built and tested with, on Debian or Ubuntu, and the packages given: ci/cpp-packages.sh
# [PACKAGE ...]. Does nothing where all is there.
set -euo pipefail
# libjpeg-turbo's headers: Debian and Ubuntu name them differently.
jpeg=libjpeg62-turbo-dev
apt-cache show "$jpeg" >/dev/null 2>&1 || jpeg=libjpeg-turbo8-dev
packages=(g++ cmake ninja-build "$jpeg" libpng-dev libssl-dev nlohmann-json3-dev libcli11-dev libcpp-httplib-dev libgtest-dev libgmock-dev pkgconf
  debian-archive-keyring "$@")
missing=()
for package in "${packages[@]}"; do
  [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0
sudo=""
[ "$(id -u)" -eq 0 ] || sudo=sudo
$sudo apt-get update -qq
$sudo apt-get install -y -qq --no-install-recommends "${missing[@]}"
