# `make serve` and `make test` do all their own set-up on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?=
# Where torch comes from when the default index would bring CUDA: TORCH_INDEX=<URL of PyTorch's CPU wheels>
TORCH_INDEX ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q

.PHONY: serve test clean

serve: $(VENV)/.serve
	$(BIN)/cde-server serve --host $(HOST) --port $(PORT) $(if $(MODEL),--model $(MODEL))

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "cde-server needs Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "No venv module: on Debian, apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.serve: pyproject.toml config/requirements-builtin.txt | $(BIN)/python
	@echo "Installing into $(VENV) (first time: some minutes)"
	$(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX) torch==2.13.0)
	$(PIP) -e .
	$(PIP) --no-deps --require-hashes -r config/requirements-builtin.txt
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.serve
	$(PIP) -e '.[test]'
	@touch $@
