# Two commands for a fresh machine: `make demo` (the main job) and `make test`. Both set themselves up:
# a virtual environment in .venv with the versions of constraints.txt. With TORCH=version they set up and use
# .venv-torch-version, which has that torch instead.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv$(if $(TORCH),-torch-$(TORCH))
BIN := $(VENV)/bin
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist worksteal
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# What `make quick` tests: the contract on one network, uncompiled and in one thread, and the units that need no second.
QUICK := tests/test_contract.py tests/likelihoods tests/metrics tests/test_graph.py tests/test_splitting.py tests/test_refusals.py
QUICK += --ignore tests/likelihoods/test_centered.py  # trains tables
QUICK += -k "not cnn and not transformer and not compil and not thread and not pickle and not widmann and not gradient and not entropy"

.PHONY: demo docs bench test test-thorough test-slow slowest gpu quick quick-tests check lint types imports format clean

demo: $(VENV)/.ok  ## train, compare and plot the three methods on data that needs no download
	$(BIN)/vbdl demo

bench: $(VENV)/.ok  ## the suite on data that needs no download, and its page; VBDL_DATA and BENCH="--suite quality" for all
	$(BIN)/vbdl bench $(BENCH)
	$(BIN)/vbdl report vbdl-bench

test: $(VENV)/.ok  ## the tests, some 12 minutes on two cores; TORCH=2.11.0 for another torch, TESTS="tests/nn" for some
	$(PYTEST) $(TESTS)

test-thorough: $(VENV)/.ok  ## what is marked thorough: more cases of what `make test` tests; CI runs both
	$(PYTEST) -m "thorough and not slow and not gpu" $(TESTS)

test-slow: $(VENV)/.ok  ## what is marked slow
	$(BIN)/pytest -m "slow and not gpu"

docs: $(VENV)/.ok  ## the site, in site/: runs its code, draws its pictures, checks its links; about a minute
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

slowest: $(VENV)/.ok  ## the tests, and the table of the slowest twenty in docs/testing.md
	$(PYTEST) --slowest docs/testing.md

gpu: $(VENV)/.ok  ## on a machine with one: its tests, then the kernel benchmarks, under ten minutes
	$(BIN)/python benchmarks/gpu.py

quick: $(VENV)/.ok  ## while you work: under a minute; what pre-commit runs
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target --keep-going types quick-tests lint imports

quick-tests: $(VENV)/.ok
	$(PYTEST) -q $(QUICK)

check: lint types imports  ## everything but the tests

lint: $(VENV)/.ok
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ok
	$(BIN)/pyright

imports: $(VENV)/.ok
	$(BIN)/lint-imports

format: $(VENV)/.ok
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.ok: pyproject.toml constraints.txt hatch_build.py kernels/vbdl_kernels/philox.c
	@echo "Setting up $(VENV): 3.2 GB on disk with the CPU build of torch, and some GB more where only the CUDA build is offered."
	$(PYTHON) -m venv $(VENV)
	sed -e '' $(if $(TORCH),-e 's/^torch==.*/torch==$(TORCH)/' -e '/^triton==/d') constraints.txt > $(VENV)/constraints.txt
	$(BIN)/pip install --quiet torch -c $(VENV)/constraints.txt  # first and pinned, before a range can pull another build
	$(BIN)/pip install --quiet -e '.[dev]' -c $(VENV)/constraints.txt
	@touch $@

clean:
	rm -rf site .venv .venv-torch-* vbdl-demo vbdl-bench .pytest_cache .ruff_cache .hypothesis
