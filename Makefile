# Every target sets up what it needs on a fresh clone; a second run finds the stamps in .venv and starts at once.

PYTHON ?= python3
ARGS   ?=
STEPS  ?=
PAIRS  ?=
# Two cores are busy while one process compiles; each one takes about 3 GB.
WORKERS ?= 2
# torch's threads would wait for one another by spinning, for the cores that the other process needs.
ASLEEP := OMP_WAIT_POLICY=PASSIVE

VENV     := .venv
BIN      := $(VENV)/bin
READY    := $(VENV)/.stamp-venv
PACKAGES := $(VENV)/.stamp-packages
DOCS     := $(VENV)/.stamp-docs
BUILT    := $(VENV)/.stamp-built

# The cheap part of the suite that a forgotten file or a wrong binary would fail.
DIST_TESTS := $(addprefix tests/test_,build_contract.py command_line.py edge_rows.py family.py modules.py patch_torch.py)

# What a user's build with another toolkit would only warn of.
export FASTDIV_NVCC_FLAGS ?= -Xptxas=--warn-on-spills,--warn-on-local-memory-usage,--warning-as-error

# Folders are listed too: their time changes when a file is added or removed.
NATIVE := $(shell find csrc 2>/dev/null)
CPP     = $(shell find csrc fastdiv tests \( -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null)

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help build demo test test-all matrix docs dist lint format check bench gpu-kit gpu-check clean distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo '  PYTHON=python3.12   the interpreter that .venv is made with (3.10 or newer; now: $(PYTHON))'
	@echo '  ARGS="-k kl -x"     passed on by demo, test, check, bench and gpu-check'
	@echo '  WORKERS=2           processes of the tests'
	@echo '  PAIRS="py3.12-torch2.11 py3.10-torch2.13" or all    what matrix runs (default: four pairs)'
	@echo '  STEPS="build tests" DRY_RUN=1 OUT=folder    some steps of gpu-check; on the CPU; its files'
	@echo '  ARCHS="90;100"      the GPUs that gpu-kit is for (90); PAIRS there: one pair, py3.12-torch2.11'

build: $(BUILT)  ## .venv, pinned packages, compiled extension (rebuilt when setup.py or csrc changes)

demo: $(BUILT)  ## train a small language model with the fused loss
	$(BIN)/python examples/train_lm.py $(ARGS)

test: $(BUILT)  ## the test suite, doctests included, in WORKERS processes
	$(ASLEEP) $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=worksteal -m 'not nightly' $(ARGS)

test-all: $(BUILT)  ## and the tests that take long and tell little more
	$(ASLEEP) $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=worksteal $(ARGS)

# Pyenv's commands run only the versions that are chosen; elsewhere the variable means nothing.
matrix: export PYENV_VERSION ?= 3.13:3.12:3.11:3.10
matrix: $(PACKAGES)  ## build and test with other Pythons and torches (PAIRS=py3.12-torch2.11: that pair; PAIRS=all: each)
	$(BIN)/nox $(if $(filter all,$(PAIRS)),--tags all,$(if $(PAIRS),--sessions $(PAIRS))) $(if $(ARGS),-- $(ARGS))

docs: $(BUILT) $(DOCS)  ## the documentation, into docs/_build/index.html; a warning is an error
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs docs/_build

# The sdist is unpacked without the package, so that its tests find the one of the wheel.
dist: $(PACKAGES)  ## sdist and wheel in dist, the wheel tested outside of the checkout (ARGS=tests/: by all of the suite)
	rm -rf dist build/dist && mkdir -p build/dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*
	tar -xzf dist/*.tar.gz -C build/dist --strip-components=1 --exclude='*/fastdiv'
	$(PYTHON) -m venv build/dist/venv
	build/dist/venv/bin/pip install --quiet --constraint requirements-dev.txt "$$(ls $(CURDIR)/dist/*.whl)[bench,test]"
	cd build/dist && $(ASLEEP) venv/bin/python -m pytest --pyargs fastdiv $(or $(ARGS),$(DIST_TESTS))

lint: $(PACKAGES)  ## ruff, mypy, import-linter, clang-format; changes nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	@echo '$(BIN)/clang-format --dry-run --Werror' && $(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(PACKAGES)  ## fix imports and formatting of Python and C++
	$(BIN)/ruff check --fix --exit-zero
	$(BIN)/ruff format
	@echo '$(BIN)/clang-format -i' && $(BIN)/clang-format -i $(CPP)

check: $(BUILT)  ## compare every loss with its reference on this machine
	$(BIN)/python -m fastdiv check $(ARGS)

bench: $(BUILT)  ## measure everything on this machine, into benchmarks/results (ARGS=--quick: less)
	$(BIN)/python -m fastdiv bench $(or $(ARGS),--all --json --plot)

# With the Python and the torch that the other machine has, in the environment of matrix.
gpu-kit: export PYENV_VERSION ?= 3.13:3.12:3.11:3.10
gpu-kit: $(PACKAGES)  ## build/gpu-kit: the extension and its variants for the GPU of a machine without network
	$(BIN)/nox --sessions $(or $(PAIRS),py3.12-torch2.11) -- kit $(or $(ARCHS),90)

gpu-check:  ## build, test, profile and measure on a GPU, with the packages of PYTHON (no .venv, no network)
	$(PYTHON) tests/gpu_check.py $(STEPS) $(if $(DRY_RUN),--dry-run) $(ARGS)

clean:  ## remove what was built and all caches; keep .venv, .nox and their packages
	rm -rf build dist *.egg-info fastdiv/*.so $(BUILT) .pytest_cache .mypy_cache .ruff_cache .hypothesis docs/_build
	find . \( -path ./$(VENV) -o -path ./.nox \) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv and .nox
	rm -rf $(VENV) .nox

$(READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo 'fastdiv needs Python 3.10 or newer; choose one with: make PYTHON=/path/to/python3 ...' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo '$(PYTHON) cannot make a virtual environment: its venv or ensurepip module is missing.' >&2; \
	  echo 'On Debian or Ubuntu: apt-get install python3-venv. Or choose another one: make PYTHON=...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(PACKAGES): requirements-dev.txt $(READY)
	@echo 'installing the pinned packages; torch is a large one'
	$(BIN)/python -m pip install -qq -r requirements-dev.txt
	@touch $@

$(DOCS): requirements-docs.txt $(PACKAGES)
	$(BIN)/python -m pip install -qq -r requirements-docs.txt
	@touch $@

$(BUILT): setup.py pyproject.toml $(NATIVE) $(PACKAGES)
	@command -v "$${CXX:-c++}" >/dev/null || { \
	  echo 'no C++ compiler found; install g++ (or clang and set CXX)' >&2; exit 1; }
	@echo 'compiling the extension: minutes the first time, then only what changed'
	@touch $@.started # so that a file saved during the build counts as changed after it
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@mv $@.started $@
