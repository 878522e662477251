# Two commands to know: `make train` and `make test`. Both install what they need into .venv.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
CONFIG ?= configs/tiny.yaml
ARGS   ?=

.PHONY: train test test-slow lint clean help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

train: $(VENV)/.installed ## train configs/tiny.yaml on this machine and sample from it
	@$(BIN)/moebius train --config $(CONFIG) --sample $(ARGS)

test: $(VENV)/.installed-test ## run the tests
	@$(BIN)/python -m pytest $(ARGS)

test-slow: $(VENV)/.installed-test ## run the long matrix
	@$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(VENV)/.installed-test ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean: ## remove the virtual environment and the runs
	rm -rf $(VENV) runs

$(VENV)/.installed: pyproject.toml
	@echo "Installing into $(VENV) (once; a minute or more) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@
