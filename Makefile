# Everything runs in .venv, which the first target makes and later ones reuse, with the releases that .ci/constraints/ locks.
# `make help` lists the targets.
PYTHON ?= python3
# torch goes in first and pinned: unpinned, it would be the newest CUDA build with several GB of libraries. On a machine with a GPU,
# or for another version, set it: make demo TORCH="torch==2.9.1"
TORCH ?= torch==2.13.0
# What follows `reco demo`: make demo ARGS="--quick --videos ~/clips"
ARGS ?=

# Processes that share the tests
WORKERS ?= 2

# torch of the newest environment: torch==2.13.0 takes a local build where there is one, and not the newest with its CUDA libraries
TORCH_NEWEST ?= torch

# The Python of the oldest environment: the oldest that pyproject.toml allows. The variable has a meaning for pyenv alone.
PYTHON_OLDEST ?= PYENV_VERSION=3.10 python3.10

VENV := .venv
BIN := $(VENV)/bin
NEWEST := .venv-newest
OLDEST := .venv-oldest
DEV_EXTRAS := demo,study,hf,metrics,tokenizers,docs,dev
LOCKED_PYTHONS := 3.10 3.11 3.12 3.13
LOCKS := $(LOCKED_PYTHONS:%=.ci/constraints/%.txt)

INSTALL = env $$(.ci/locked $(BIN)/python) $(BIN)/python -m pip install --quiet
# bytecode is kept: each process that a test starts would compile the package anew; a file's tests stay in one process, which
# makes what they share once
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(1)/bin/python -m pytest --numprocesses $(WORKERS) --dist loadscope --durations 15 $(ARGS)

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-newest test-oldest lint docs lock gpu clean

help:  ## List the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 8

demo: $(VENV)/demo.stamp  ## Train plainly and with ReCo on real clips; the result is outputs/demo/index.html
	$(BIN)/reco demo $(ARGS)

test: $(VENV)/dev.stamp  ## Run the tests, doctests and every block of the documentation
	$(call PYTEST,$(VENV))

test-fast: $(VENV)/dev.stamp  ## Run the tests that are neither slow nor distributed, in two minutes
	$(call PYTEST,$(VENV)) -m "not slow and not distributed"

test-newest:  ## Run the tests with the newest release of every dependency, in .venv-newest
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager "$(TORCH_NEWEST)" -e ".[$(DEV_EXTRAS)]"
	$(NEWEST)/bin/python -m pip check
	$(call PYTEST,$(NEWEST))

# What old releases say about newer ones of their own dependencies is no fault of ours, nor are the sockets that wandb 0.18 leaves
# to the garbage collector in whatever test it runs, and the oldest hypothesis looks for who refers to its random
# generator, which a frozen heap does not tell (tests/conftest.py), and torch 2.9 looks at gradients of what it compiles; every
# other warning is an error.
test-oldest: $(VENV)/dev.stamp  ## Run the tests with the oldest releases that pyproject.toml allows, in .venv-oldest
	$(PYTHON_OLDEST) -m venv $(OLDEST)
	$(BIN)/python .ci/oldest.py litdata,$(DEV_EXTRAS) >$(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet -c $(OLDEST)/constraints.txt -e ".[$(DEV_EXTRAS)]"
	$(call PYTEST,$(OLDEST)) -W ignore::DeprecationWarning -W ignore::FutureWarning -W "ignore:unclosed <socket:ResourceWarning" \
		-W 'ignore:It looks like `register_random`' -W "ignore:The .grad attribute of a Tensor that is not a leaf"
	PIP_CONSTRAINT=$(OLDEST)/constraints.txt tests/litdata/run.sh $(OLDEST)/bin/python -W ignore::DeprecationWarning

lint: $(VENV)/dev.stamp  ## Check format, style, types and the layers of the package
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: $(VENV)/dev.stamp  ## Build the documentation into docs/_build/html; a warning is an error
	rm -rf docs/generated  # a page of a module that is gone is an error
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

lock:  ## Lock the newest releases for every Python in .ci/constraints; wants each Python, on Linux
	$(PYTHON) .ci/lock.py "$(TORCH)" litdata,$(DEV_EXTRAS) $(LOCKED_PYTHONS)

gpu:  ## Check and measure on a CUDA device, with the Python that is there and without installing anything
	PYTHONPATH=.$$($(PYTHON) -c "import lazy_loader" 2>/dev/null || echo :tests/cuda/stand_ins) $(PYTHON) -m tests.cuda $(ARGS)

clean:  ## Remove the environments and everything built
	rm -rf $(VENV) $(NEWEST) $(OLDEST) build dist docs/_build docs/generated outputs .mypy_cache .pytest_cache .ruff_cache

$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) "$(TORCH)"
	touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml $(LOCKS)
	$(INSTALL) -e ".[demo]"
	touch $@

# the larger set satisfies the demo as well
$(VENV)/dev.stamp: $(VENV)/torch.stamp pyproject.toml $(LOCKS)
	$(INSTALL) -e ".[$(DEV_EXTRAS)]"
	touch $(VENV)/demo.stamp $@
