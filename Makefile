# Two commands to know: `make train` and `make test`. Both install what they need into .venv.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ASCEND ?= .venv-ascend
CONFIG ?= configs/tiny.yaml
ARGS   ?=
# Files of tests run side by side; ARGS=-n0 runs them one after the other, as a debugger wants it.
PYTEST := -m pytest -n auto --maxprocesses 4 --dist loadfile

.PHONY: help train test test-slow test-cuda test-ascend test-ascend-sim lint clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'
	@echo 'Arguments go into ARGS: make train ARGS="train.steps=20 name=short"'
	@echo 'Go on with a run: make train ARGS=--resume'

train: $(VENV)/.installed ## train configs/tiny.yaml on this machine and sample from it
	@$(BIN)/moebius train --config $(CONFIG) --sample $(ARGS)

test: $(VENV)/.installed-test ## run the tests
	@OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) $(ARGS)

# pytest exits with 5 when it finds no test.
test-slow: $(VENV)/.installed-test ## run the long matrix
	@OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m slow $(ARGS) || test $$? -eq 5

test-cuda: $(VENV)/.installed-test ## check every operation on this machine's NVIDIA GPU
	@MOEBIUS_TEST_BACKEND=cuda $(BIN)/python -m pytest tests/backends/conformance -m "slow or not slow" $(ARGS)

test-ascend: $(VENV)/.installed-test ## the same on this machine's Ascend NPU
	@MOEBIUS_TEST_BACKEND=ascend $(BIN)/python -m pytest tests/backends/conformance -m "slow or not slow" $(ARGS)

# torch_npu sees the packages of $(VENV) and stays out of it; the libraries of CANN that it asks for are stand-ins.
test-ascend-sim: $(ASCEND)/.installed ## check the Ascend backend on a simulated NPU
	@ASCEND_HOME_PATH=$(abspath $(ASCEND)/cann) ASCEND_OPP_PATH=$(abspath $(ASCEND)/cann/opp) \
		LD_LIBRARY_PATH=$(abspath $(ASCEND)/cann) PYTORCH_NPU_ALLOC_CONF=expandable_segments:False \
		MOEBIUS_SIMULATED_NPU=1 OMP_NUM_THREADS=1 $(ASCEND)/bin/python $(PYTEST) tests/ascend $(ARGS)

lint: $(VENV)/.installed-test ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean: ## remove the virtual environments; runs stay
	rm -rf $(VENV) $(ASCEND)

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

$(ASCEND)/.installed: $(VENV)/.installed-test tests/ascend/cann/build.py tests/ascend/cann/runtime.c
	@echo "Installing torch_npu into $(ASCEND) ..."
	@$(BIN)/python -m venv --without-pip --clear $(ASCEND)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $(ASCEND)/packages
	@cp $(ASCEND)/packages "$$($(ASCEND)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--target "$$($(ASCEND)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
		"$$(sed -n 's/^ascend = \["\([^"]*\)".*/\1/p' pyproject.toml)"
	@$(ASCEND)/bin/python tests/ascend/cann/build.py $(ASCEND)/cann
	@touch $@
