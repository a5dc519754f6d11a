# make demo: set up, then diagnose the two packaged models and name the page to open.
# make test: set up, then everything that CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test lint format setup checkpoints clean

help:
	@echo "make demo        set up and diagnose the two packaged models; ends with the page to open"
	@echo "make test        set up and run what CI runs: lint, types, imports, tests, the commands of the docs"
	@echo "make lint        lint, types and imports only"
	@echo "make checkpoints train the two packaged models again (about 40 minutes on 2 cores)"
	@echo "make clean       remove the virtual environment and what the commands above wrote"

demo: $(VENV)/.installed
	@echo "==> Diagnosing the two packaged models, default and polarized Mamba, side by side (1 to 3 minutes)"
	@$(BIN)/ssmlens diagnose --out ssmlens-out/demo

test: $(VENV)/.installed-dev
	@$(MAKE) --no-print-directory lint
	@echo "==> Tests, and the commands of the docs"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

lint: $(VENV)/.installed-dev
	@echo "==> Lint, format, types, imports"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

checkpoints: $(VENV)/.installed
	@sh tools/train_packaged.sh $(BIN)/ssmlens

setup: $(VENV)/.installed-dev

$(VENV)/bin/python:
	@$(PYTHON) tools/make_venv.py $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "==> Installing ssmlens and what it needs into $(VENV) (PyTorch is the largest part)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "==> Installing the tools for development"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) ssmlens-out runs
