#!/bin/sh
# Builds a C program with what pkg-config says, and runs it: check_pkg_config.sh INSTALLED BUNDLE IMAGE.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r "$1" "$work/moved"  # where it was not installed
PKG_CONFIG_PATH=$(dirname "$(find "$work/moved" -name export_zoo.pc)")
export PKG_CONFIG_PATH
# shellcheck disable=SC2046,SC2086
${CC:-cc} ${CFLAGS:-} -std=c99 -Wall -Wextra -Werror "$(dirname "$0")/consumer/classify.c" $(pkg-config --cflags --libs export_zoo) -o "$work/classify"
LD_LIBRARY_PATH=$(pkg-config --variable=libdir export_zoo) "$work/classify" "$2" "$3"
