# The commands of the project; CONTRACTS: serve, test, check, bench. PYTHON picks the interpreter (3.11 or newer),
# TORCH_INDEX another package index for torch (for instance one with CUDA builds).
PYTHON ?= python3
VENV ?= .venv
CONFIG ?= serve_config.yaml
TORCH_INDEX ?=

BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install serve test check format bench bench-peers bench-publish chaos accuracy models tiny-chat tiny-vision clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Rotunda needs Python 3.11 or newer; say which with PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --editable '.[dev]'
	@touch $@

$(VENV)/installed-npm: tests/conformance/package-lock.json $(VENV)/installed-dev
	$(BIN)/python -m tests.conformance.clients
	@touch $@

install: $(VENV)/installed  ## create the virtual environment

serve: $(VENV)/installed  ## run everything on this machine until Ctrl-C
	@exec $(BIN)/python -m deployments.local $(CONFIG)

test: $(VENV)/installed-dev $(VENV)/installed-npm  ## run the whole test suite
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

check: $(VENV)/installed-dev  ## formatter, linter, types, import contracts, docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_docs.py tests/test_architecture.py

format: $(VENV)/installed-dev  ## let the formatter and the linter mend what they can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/installed-bench: $(VENV)/installed-dev
	$(PIP) --editable '.[bench]'
	@touch $@

bench: $(VENV)/installed-bench  ## a short benchmark without peers, at most ten minutes; results are marked quick
	$(BIN)/python -m benchmarks quick

bench-peers: $(VENV)/installed-bench  ## install the peers into environments of their own, and measure against them
	PYTHON=$(abspath $(BIN)/python) benchmarks/peers/install.sh
	$(BIN)/python -m benchmarks peers

bench-publish: $(VENV)/installed-bench  ## what docs/benchmarks.md shows, on an otherwise idle machine
	PYTHON=$(abspath $(BIN)/python) benchmarks/peers/install.sh
	$(BIN)/python -m benchmarks publish

chaos: $(VENV)/installed-dev  ## faults during load, with the invariants checked (minutes)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m chaos tests/chaos

accuracy: $(VENV)/installed-dev  ## the shipped models on all held-out prompts (about ten minutes)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m accuracy tests/models

models: $(VENV)/installed  ## train the two shipped models again, side by side (about 42 and 37 CPU minutes)
	$(MAKE) -j2 tiny-chat tiny-vision

tiny-chat tiny-vision: $(VENV)/installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python models/train.py $(@:tiny-%=%)

clean:  ## remove what was built
	rm -rf $(VENV) tests/conformance/node_modules .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build *.egg-info
