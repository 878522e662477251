# Two commands to know: `make train` and `make test`. Both install what they need into .venv.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
CONFIG ?= configs/tiny.yaml
ARGS   ?=

.PHONY: help train test test-slow test-cuda test-ascend lint clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'
	@echo 'Arguments go into ARGS: make train ARGS="train.steps=20 name=short"'
	@echo 'Go on with a run: make train ARGS=--resume'

train: $(VENV)/.installed ## train configs/tiny.yaml on this machine and sample from it
	@$(BIN)/moebius train --config $(CONFIG) --sample $(ARGS)

test: $(VENV)/.installed-test ## run the tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

# pytest exits with 5 when it finds no test.
test-slow: $(VENV)/.installed-test ## run the long matrix
	@$(BIN)/python -m pytest -m slow $(ARGS) || test $$? -eq 5

test-cuda: $(VENV)/.installed-test ## check every operation on this machine's NVIDIA GPU
	@MOEBIUS_TEST_BACKEND=cuda $(BIN)/python -m pytest tests/backends/conformance -m "slow or not slow" $(ARGS)

test-ascend: $(VENV)/.installed-test ## the same on this machine's Ascend NPU
	@MOEBIUS_TEST_BACKEND=ascend $(BIN)/python -m pytest tests/backends/conformance -m "slow or not slow" $(ARGS)

lint: $(VENV)/.installed-test ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean: ## remove the virtual environment; runs stay
	rm -rf $(VENV)

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "moebius needs Python 3.10 or newer; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Installing into $(VENV) (once; a minute or more) ..."
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "Installing what the tests need ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@
