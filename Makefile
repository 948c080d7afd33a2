# `make serve`, `make test` and `make test-clients` do all their own set-up on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?=
# Where torch comes from when the default index would bring CUDA: TORCH_INDEX=<URL of PyTorch's CPU wheels>
TORCH_INDEX ?=

# How many of them `make fuzz` sends to a server of its own.
REQUESTS ?= 100000

# Other people's clients, and their pins, stay out of $(VENV).
CLIENTS_VENV ?= .venv-clients

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q
# Where tiktoken looks for cl100k_base, which LangChain's token ids are made with.
VOCABULARY := $(abspath $(VENV))/share/tiktoken

.PHONY: serve test test-clients fuzz clean

serve: $(VENV)/.serve
	TIKTOKEN_CACHE_DIR="$${TIKTOKEN_CACHE_DIR:-$(VOCABULARY)}" \
		$(BIN)/cde-server serve --host $(HOST) --port $(PORT) $(if $(MODEL),--model $(MODEL))

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

test-clients:
	$(MAKE) VENV=$(CLIENTS_VENV) $(CLIENTS_VENV)/.clients
	$(CLIENTS_VENV)/bin/python -m pytest tests/clients

fuzz: $(VENV)/.test
	$(BIN)/python -m tests.fuzz --requests $(REQUESTS)

clean:
	rm -rf $(VENV) $(CLIENTS_VENV) tests/clients/node/node_modules .mypy_cache .ruff_cache .pytest_cache build *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "cde-server needs Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "No venv module: on Debian, apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.serve: pyproject.toml $(wildcard config/requirements-*.txt) config/vocabulary.py | $(BIN)/python
	@echo "Installing into $(VENV) (first time: some minutes)"
	$(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX) torch==2.13.0)
	$(PIP) -e .
	$(PIP) --no-deps --require-hashes -r config/requirements-builtin.txt
	-$(BIN)/python config/vocabulary.py $(VOCABULARY)
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.serve
	$(PIP) -e '.[test]'
	@touch $@

# Node comes with the `clients` extra, so that its packages run on the Node they were tested with.
$(VENV)/.clients: pyproject.toml tests/clients/node/package.json $(VENV)/.serve
	$(PIP) -e '.[test,clients]'
	PATH="$(abspath $(BIN)):$$PATH" npm install --prefix tests/clients/node --no-package-lock --no-audit --no-fund --loglevel=error
	@touch $@
