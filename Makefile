# A fresh clone needs only Python 3.10+, make, and a package index that pip can reach.
#   make chat      create the environment, install, chat with the built-in model
#   make serve     the same for the server: a page to talk to, and OpenAI's interface
#   make test      create the environment, install; lint, types and the whole test suite
#   make gpu-test  the tests that need an NVIDIA GPU
#   make slow-test the tests that take minutes and a package index
#   make docs      the documentation as a site in build/site
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet
# A machine with an NVIDIA driver gets the matching CUDA packages; on others, they would be a gigabyte of no use.
CUDA := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\)\..*/\1/p' | head -n 1)
# Each GPU test process takes up to 4 GB of the card.
WORKERS = $(shell nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -n 1 | \
	awk '{n = int($$1 / 4000); print (n < 1 ? 1 : (n > 14 ? 14 : n))}')
EXTRA := $(if $(CUDA),$(if $(filter 12,$(CUDA)),[cuda12],$(if $(filter 11,$(CUDA)),,[cuda13])),)

.PHONY: chat serve test check tree docs env slow-test gpu-test clean

chat: $(VENV)/.installed
	@$(PY) -m bitnet_numba.chat $(CHECKPOINT)

serve: $(VENV)/.serve-installed
	@$(PY) -m bitnet_numba serve $(CHECKPOINT)

env: $(VENV)/.test-installed

# Two workers share the cores already: more threads for each one's matrix products would only wait for each other.
test: export OPENBLAS_NUM_THREADS ?= 1
# Each worker imports all tests, and many tests start processes: from bytecode, that takes a third.
test slow-test gpu-test: export PYTHONDONTWRITEBYTECODE :=
test: env check
	@$(PY) -m pytest -n 2 --dist worksteal -m "not simulated and not slow"
	@NUMBA_ENABLE_CUDASIM=1 $(PY) -m pytest -n 2 --dist worksteal -m simulated

check: env tree
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

# The package as it is installed, kernels/ and reference/ inside: for tools that read source without importing it.
tree:
	@rm -rf build/typecheck && mkdir -p build/typecheck/bitnet_numba
	@for f in bitnet_numba/*; do ln -sfn ../../../$$f build/typecheck/bitnet_numba/; done
	@ln -sfn ../../../kernels ../../../reference build/typecheck/bitnet_numba/

docs: $(VENV)/.docs-installed tree
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict
	@! grep -rE '<(script|link|img)[^>]+//[a-z]' build/site --include='*.html' || (echo "a page fetches from elsewhere"; exit 1)
	@echo "Open build/site/index.html; for its search:  python3 -m http.server -d build/site"

slow-test: env
	@$(PY) -m pytest -m slow

gpu-test: env
	@$(PY) -m pytest -m "gpu and not alone" -n $(or $(WORKERS),1) --maxschedchunk 1
	@$(PY) -m pytest -m "gpu and alone"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "bitnet_numba needs Python 3.10 or newer")'
	@echo "Creating the Python environment in $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	@echo "Installing bitnet-numba$(EXTRA) ..."
	@$(PIP) -e '.$(EXTRA)'
	@touch $@

$(VENV)/.serve-installed: $(VENV)/.installed
	@echo "Installing bitnet-numba[serve] ..."
	@$(PIP) -e '.[serve]'
	@touch $@

$(VENV)/.test-installed: $(VENV)/bin/python pyproject.toml
	@echo "Installing bitnet-numba[test] ..."
	@$(PIP) -e '.[test]'
	@touch $(VENV)/.installed $(VENV)/.serve-installed $@

$(VENV)/.docs-installed: $(VENV)/bin/python pyproject.toml
	@echo "Installing bitnet-numba[docs] ..."
	@$(PIP) -e '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) build
