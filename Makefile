# Everything runs in .venv, which the first target makes and later ones reuse; `make help` lists the targets.
PYTHON ?= python3
# torch goes in first and pinned: unpinned, it would be the newest CUDA build with several GB of libraries. On a machine with a GPU,
# or for another version, set it: make demo TORCH="torch==2.9.1"
TORCH ?= torch==2.13.0
# What follows `reco demo`: make demo ARGS="--quick --videos ~/clips"
ARGS ?=

# Processes that share the tests
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
DEV_EXTRAS := demo,study,hf,metrics,tokenizers,docs,dev

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs gpu clean

help:  ## List the targets
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 8

demo: $(VENV)/demo.stamp  ## Train plainly and with ReCo on real clips; the result is outputs/demo/index.html
	$(BIN)/reco demo $(ARGS)

test: $(VENV)/dev.stamp  ## Run the tests, doctests and every block of the documentation
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --durations 15 $(ARGS)

lint: $(VENV)/dev.stamp  ## Check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/dev.stamp  ## Build the documentation into docs/_build/html; a warning is an error
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

gpu:  ## Check and measure on a CUDA device, with the Python that is there and without installing anything
	PYTHONPATH=. $(PYTHON) -m tests.cuda $(ARGS)

clean:  ## Remove the environment and everything built
	rm -rf $(VENV) build dist docs/_build docs/generated outputs .mypy_cache .pytest_cache .ruff_cache

$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[demo]"
	touch $@

# the larger set satisfies the demo as well
$(VENV)/dev.stamp: $(VENV)/torch.stamp pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[$(DEV_EXTRAS)]"
	touch $(VENV)/demo.stamp $@
