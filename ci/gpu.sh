#!/usr/bin/env bash
# Runs the tests that need an NVIDIA GPU: on a machine that has one, with `pip install '.[dev,tensorrt]'` where TensorRT can be had.
set -euo pipefail
cd "$(dirname "$0")/.."
nvidia-smi --query-gpu=name,compute_cap,driver_version --format=csv
make venv
.venv/bin/python -m pytest -m gpu -rs "$@"
