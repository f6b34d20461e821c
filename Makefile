# `make demo` and `make test` set up what they need in .venv and go on from there.
# The interpreter is the newest tested one found (tools/find_python.sh); PYTHON=... overrides it.

PYTHON ?= $(shell sh tools/find_python.sh newest)
PYTHON_FLOOR ?= $(shell sh tools/find_python.sh floor)
VENV := .venv
FLOOR := .venv-floor
AOT := .venv-aot
AOT_TESTS := $(addprefix tests/kernels/,test_tpu_compile.py test_gpu_compile.py test_gpu_registers.py)
PIP := -m pip install --quiet --disable-pip-version-check
TESTS ?= tests
# Installing compiles the CPU kernels; this does it again after their sources have changed, and nothing otherwise.
BUILD_KERNELS = @$(VENV)/bin/python -m lq_kernels.cpu.build --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test test-aot test-floor lint standin clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.installed ## the whole pipeline on the shipped model, a few minutes
	$(BUILD_KERNELS)
	$(VENV)/bin/lq demo

test: $(VENV)/.installed-dev $(if $(filter tests,$(TESTS)),test-aot) ## the tests on the newest tested Python found, those of test-aot too; LONG=1: all
	$(BUILD_KERNELS)
	$(VENV)/bin/python -m pytest -n 2 $(if $(LONG),,-m "not long") $(TESTS)

test-aot: $(AOT)/.installed ## every kernel compiled for TPUs and for Hopper, without either
	JAX_PLATFORMS=cpu JAX_ENABLE_COMPILATION_CACHE=false $(AOT)/bin/python -m pytest -n 2 $(if $(LONG),,-m "not long") $(AOT_TESTS)

test-floor: $(FLOOR)/.installed-dev ## what depends on versions, on Python 3.11 and the oldest JAX, with torch as the oracle; ALL=1: all
	$(FLOOR)/bin/python -m pytest -n 2 $(if $(ALL),,-m "not once and not long") $(TESTS)

lint: $(VENV)/.installed-dev ## ruff and pyrefly
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyrefly check --python-interpreter-path $(VENV)/bin/python

standin: $(VENV)/.installed-dev ## trains the shipped model again: an hour and a half on two cores; resumes when repeated
	$(VENV)/bin/python -m experiments.standin.train --out runs/standin
	$(VENV)/bin/python -m experiments.standin.export --run runs/standin

clean: ## removes the environments
	rm -rf $(VENV) $(FLOOR) $(AOT)

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "no tested Python (3.11, 3.12 or 3.13) was found. Install one, or try another: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.installed

$(FLOOR)/.installed-dev: pyproject.toml
	@test -n "$(PYTHON_FLOOR)" || { echo "make test-floor needs Python 3.11; none was found. Give one: make test-floor PYTHON_FLOOR=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON_FLOOR) -m venv $(FLOOR)
	$(FLOOR)/bin/python $(PIP) 'torch==2.13.0'
	$(FLOOR)/bin/python $(PIP) --editable '.[dev]' --constraint tools/floor.txt
	@touch $@

# The compilers for accelerators that are not here. Apart from the rest: where they are installed, JAX looks for devices.
$(AOT)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "no tested Python (3.11, 3.12 or 3.13) was found. Install one, or try another: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(AOT)
	$(AOT)/bin/python $(PIP) --editable '.[dev,aot]'
	@touch $@
