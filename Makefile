# `make demo` and `make test` do all the set-up on a fresh machine: Python 3.10 or newer and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := demo

.PHONY: demo test test-fast check venv clean

venv: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# Train resnet18 on scikit-learn's digits, then run the main job on it, and on resnet50 with real photographs.
demo: $(INSTALLED)
	$(BIN)/python examples/digits.py --model resnet18 --out $(DEMO)/digits
	$(BIN)/python examples/photos.py --out $(DEMO)/photos
	$(BIN)/export-zoo resnet18 --precision fp32 --precision int8 --calib $(DEMO)/digits/images \
	  --weights $(DEMO)/digits/resnet18.safetensors --num-classes 10 --input-size 32 --resize-size 32 \
	  --out $(DEMO)/resnet18-digits.bundle --json $(DEMO)/resnet18-digits.json
	$(BIN)/export-zoo resnet50 --precision fp32 --precision int8 --calib $(DEMO)/photos --weights none \
	  --out $(DEMO)/resnet50.bundle --json $(DEMO)/resnet50.json
	$(BIN)/export-zoo verify $(DEMO)/resnet18-digits.bundle

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Without the tests that export, train, emulate or start processes.
test-fast: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info
