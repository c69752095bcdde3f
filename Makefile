# Each target does its whole set-up on a machine that has Python 3.11+ and make.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
# `make test TORCH=2.14.1` takes that torch, in an environment of its own.
VENV ?= .venv$(addprefix -,$(TORCH))
BIN := $(VENV)/bin
# Ranks share the machine's cores: one thread each halves the time of a step.
export OMP_NUM_THREADS := 1
# A start of torchrun that takes no fixed port.
TORCHRUN := $(BIN)/torchrun --rdzv-backend c10d --rdzv-endpoint localhost:0

.PHONY: help demo test test-all test-clients test-gpu bench package docs fuzz lint clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

# torch is installed first and alone, so that its constrained version is the one
# that everything else is resolved against.
CONSTRAINTS := $(VENV)/constraints.txt
$(CONSTRAINTS): constraints.txt
	mkdir -p $(VENV)
	sed '$(if $(TORCH),s/^torch==.*/torch==$(TORCH)/)' constraints.txt > $@

$(VENV)/.torch: $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' $(CONSTRAINTS))"
	touch $@

$(VENV)/.train: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[train]'
	touch $@

$(VENV)/.test: $(VENV)/.train
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[train,test,bench]'
	# Of torchtitan its losses alone are tested here: what its trainer needs besides is left out.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c $(CONSTRAINTS) torchtitan spmd-types
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) ruff mypy
	touch $@

$(VENV)/.package: $(VENV)/.test
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) build twine
	touch $@

$(VENV)/.docs: $(VENV)/.test
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[docs]'
	touch $@

demo: $(VENV)/.train  ## train a small Qwen3 on real text, 2 x 2 ranks, and check it against one process
	$(TORCHRUN) --nproc-per-node 4 -m launch.train --pipeline 2 --vocab 2 --check --out runs/demo

test: $(VENV)/.test  ## the tests that CI runs (about 12 minutes on 2 cores); TORCH=2.14.1: with that one
	$(BIN)/pytest -n 2 -m 'not gpu and not slow'

test-all: $(VENV)/.test  ## the larger matrices too
	$(BIN)/pytest -n 2 -m 'not gpu'

# What torchtitan asks for is older than some of constraints.txt.
CLIENTS := .venv-clients
$(CLIENTS)/.clients: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --disable-pip-version-check torch==2.14.1
	grep '^torchtitan==' constraints.txt | xargs $(CLIENTS)/bin/pip install --quiet \
	  --disable-pip-version-check torch==2.14.1 -e '.[test]' transformers expecttest
	touch $@

test-clients: $(CLIENTS)/.clients  ## inside torchtitan's whole trainer, and peers' tests with ours (half an hour, 7 GB)
	@echo "peers' clones: CUT_CROSS_ENTROPY_SOURCE=$(CUT_CROSS_ENTROPY_SOURCE) LIGER_KERNEL_SOURCE=$(LIGER_KERNEL_SOURCE)"
	$(CLIENTS)/bin/pytest -rsP tests/clients

# On a GPU machine the torch that is there is used: PYTHON names its interpreter.
# pytest-benchmark, where it is installed, warns of several workers, and a warning is an error.
test-gpu:  ## kernels and NCCL ranks, on a machine with a CUDA device (about 7 minutes on an H200)
	PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m pytest -n 8 -p no:cacheprovider -p no:benchmark -rP tests/gpu

bench: $(VENV)/.test  ## what can be measured on this machine (about 10 minutes)
	@echo 'about 10 minutes on 2 cores, half an hour on GPUs; the last line of each benchmark is JSON'
	@$(BIN)/python -m benchmarks.loss
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(BIN)/python -m benchmarks.memory; fi
	@if $(BIN)/python -c 'import sys, torch; sys.exit(torch.cuda.device_count() < 2)'; then \
	  $(TORCHRUN) --nproc-per-node gpu -m benchmarks.several_gpus; fi

package: $(VENV)/.package  ## the wheel and the sdist in dist/, checked and tried
	rm -rf dist
	$(BIN)/python -m build --quiet .
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m tests.package dist

docs: $(VENV)/.docs  ## the tables that are made from what passes, and the site in site/
	WRITE_DOCS=1 $(BIN)/pytest -q tests/test_options_table.py tests/test_precision.py tests/test_schedules.py \
	  tests/test_causal_families.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

fuzz: $(VENV)/.test  ## 5,000 drawn combinations of options, fresh ones each time
	$(BIN)/python -m tests.fuzz

lint: $(VENV)/.lint  ## formatting, lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove the virtual environment and what runs left
	rm -rf $(VENV) .venv-* runs build dist site *.egg-info
