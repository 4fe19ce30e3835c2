# Every target does its own set-up: the environment .venv with the tested versions, made again when these change.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Processes for the tests. With more than a few, importing torch in each takes longer than what they save.
TEST_WORKERS ?= logical
PYTEST := $(BIN)/python -m pytest -n $(TEST_WORKERS) --maxprocesses 4 --dist loadfile

.PHONY: demo test test-fast test-oldest check bench wheel clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py --output_dir demo_results

test: $(INSTALLED)
	$(PYTEST)

test-fast: $(INSTALLED)
	$(PYTEST) -m "not slow"

# The oldest versions that pyproject.toml allows, in an environment of their own; torch is the tested one, unless told.
OLDEST := .venv-oldest/bin/python
OLDEST_TORCH ?= $(shell grep '^torch==' constraints.txt)

test-oldest:
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST) -m pip install -c constraints-oldest.txt $(OLDEST_TORCH)
	$(OLDEST) -m pip install -c constraints-oldest.txt -e ".[dev]"
	$(OLDEST) -m pytest -n $(TEST_WORKERS) --maxprocesses 4 --dist loadfile -m "not slow"

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -m "not slow"

bench: $(INSTALLED)
	$(BIN)/python benchmarks/run.py

wheel: $(INSTALLED)
	rm -rf build
	$(BIN)/python -m build --wheel

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch comes first and by itself: it is the one large download.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $@
