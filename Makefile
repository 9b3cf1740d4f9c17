# make demo: the main job on real data. make test: linters, type check and tests. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
# tests start many processes: none of them should compile Python's sources anew
export PYTHONDONTWRITEBYTECODE :=
# one thread a test process: two of them share the machine
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test test-all lint clean

$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e ".[examples]"
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) -e ".[examples,test]"
	touch $@

demo: $(VENV)/.base
	$(BIN)/python examples/digits.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadgroup -q

test-all: lint
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadgroup -q -m "slow or not slow"

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
