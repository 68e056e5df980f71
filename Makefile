# Works from a fresh clone with python3 (>= 3.11, with venv and pip) and make; everything is installed into .venv.
#
#   make demo PYTHON=python3.12            another interpreter
#   make demo TORCH="torch --index-url U"  another build of torch: U is what pytorch.org shows for your CUDA version
#
# A virtual environment that you made yourself in .venv is used as it is; a torch 2.13.0 found there is kept.

PYTHON ?= python3
TORCH ?= torch

BIN := .venv/bin
# The files of tests are shared out, in their order: tests/examples, which has the longest, comes first. Three processes
# keep two cores busy, because tests of several ranks wait for each other.
SHARED := --numprocesses 3 --dist loadfile --no-loadscope-reorder
INSTALLED := .venv/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast gpu coverage lint format docs clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv and install everything (the other commands do it by themselves)

demo: $(INSTALLED) ## pretrain with DINO and DINO-vMF on photographs, evaluate, write runs/demo/report.html
	@$(BIN)/python examples/vit_ssl/demo.py --output runs/demo

test: $(INSTALLED) ## run all tests
	@$(BIN)/python -m pytest $(SHARED)

test-fast: $(INSTALLED) ## run the tests that take less than ten seconds each
	@$(BIN)/python -m pytest $(SHARED) -m "not slow"

gpu: $(INSTALLED) ## test and measure on a GPU, ten minutes at most: results, figures and tables of the documentation
	@$(BIN)/python -m benchmarks gpu

coverage: $(INSTALLED) ## run the tests of the library, and list the lines of src/ that none of them reaches
	@$(BIN)/coverage erase
	@$(BIN)/coverage run -m pytest @tests/library.txt
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report

lint: $(INSTALLED) ## check style, formatting and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: $(INSTALLED) ## correct what `make lint` would complain about, as far as a tool can
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

docs: $(INSTALLED) ## build the documentation in site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "The documentation is in site/index.html; its search works when served: $(BIN)/mkdocs serve"

clean: ## remove what was built and cached, but not .venv and runs/
	@rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
	@find benchmarks examples src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and by itself: it is the one package of which people want a particular build.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing torch (1 of 2); about a minute, longer on a slow network."
	@$(PIP) $(TORCH)
	@echo "Installing vmf_heads and what its examples, tests and docs need (2 of 2); about two minutes."
	@$(PIP) --editable '.[examples,dev,docs]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "PYTHON (=$(PYTHON)) must be 3.11 or newer: the versions in constraints.txt are. It is " + sys.version.split()[0])'
	@echo "Making a virtual environment in .venv with $(PYTHON)."
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
