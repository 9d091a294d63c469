# Each of test, slow, lint, zoo and demo does all its own set-up on a fresh machine and is quick when repeated.
#   make test | make slow | make lint | make zoo | make demo        PYTHON=/path/to/python3.12  WORKERS=4

SHELL   := /bin/bash
comma   := ,
VENV    ?= .venv
PY      := $(VENV)/bin/python
PIP     := $(PY) -m pip --disable-pip-version-check install --quiet
CORES   := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
WORKERS ?= $(shell echo $$(( $(CORES) < 8 ? $(CORES) : 8 )))
# One thread a worker: on a small machine the workers already fill the cores.
PYTEST  := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) --dist worksteal
CODE    := $(wildcard mhc_compile tests examples benchmarks)

.PHONY: test slow lint zoo demo setup clean
.DEFAULT_GOAL := test

test: $(VENV)/.stamp-dev
	$(PYTEST) -m "not slow and not gpu"

# What takes more than a few seconds and is left out by `test`; the models of tests/zoo are a target of their own.
slow: $(VENV)/.stamp-dev
	$(PYTEST) -m "slow and not gpu" --ignore=tests/zoo

zoo: $(VENV)/.stamp-dev
	$(PYTEST) -m "not gpu" tests/zoo

lint: $(VENV)/.stamp-dev
	$(PY) -m ruff check $(CODE)
	$(PY) -m mypy

demo: $(VENV)/.stamp-demo
	$(PY) examples/demo.py

setup: $(VENV)/.stamp-dev $(VENV)/.stamp-demo

clean:
	rm -rf build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis $(VENV)/.stamp-*

# ---------------------------------------------------------------------------------------------------------------- set-up
# The stamps live in the environment, so that they go with it.
# torch-mlir and IREE have wheels for x86-64 Linux (172 MB, Python 3.11 and later): there the tests of MLIR run as well.
MLIR := $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),$(comma)mlir)

$(VENV)/.stamp-dev: pyproject.toml $(VENV)/.stamp-torch
	$(PIP) -e '.[dev,hf$(MLIR)]' \
	    || { echo "the wheels of MLIR cannot be had here: its tests will be skipped"; $(PIP) -e '.[dev,hf]'; }
	@touch $@

$(VENV)/.stamp-demo: pyproject.toml $(VENV)/.stamp-torch
	$(PIP) -e '.[hf,report]'
	@touch $@

# An environment that already has torch keeps it. Without an NVIDIA driver the CPU build is installed before anything can
# ask for torch, because the default build for Linux brings gigabytes of CUDA libraries; Triton (for the tests of the kernels
# under its interpreter) is then pinned to the version that torch 2.11 is built for. With a driver the default build is right.
$(VENV)/.stamp-torch: | $(PY)
	@if $(PY) -c 'import torch' 2>/dev/null; then \
	    echo "torch: keeping the one in $(VENV)"; \
	elif nvidia-smi -L >/dev/null 2>&1 || ldconfig -p 2>/dev/null | grep -q 'libcuda\.so'; then \
	    echo "torch: an NVIDIA driver is here, the default build will be installed"; \
	else \
	    echo "torch: no NVIDIA driver, installing the CPU build"; \
	    $(PIP) 'torch==2.13.0+cpu' 2>/dev/null \
	        || $(PIP) 'torch==2.13.0'; \
	    if [ "$$(uname -sm)" = "Linux x86_64" ]; then $(PIP) --no-deps 'triton==3.6.0'; fi; \
	fi
	@touch $@

$(PY):
	@for python in $(PYTHON) python3 python3.12 python3.13 python3.11; do \
	    if "$$python" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "environment: $(VENV) with $$("$$python" --version)"; exec "$$python" -m venv $(VENV); \
	    fi; \
	done; \
	echo "Python 3.11 or later is needed; name it with: make PYTHON=/path/to/python" >&2; exit 1
