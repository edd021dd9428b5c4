# Two commands for a fresh machine: `make demo` (the main job) and `make test`. Both set themselves up:
# a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo bench test test-slow gpu check lint types imports format clean

demo: $(VENV)/.ok  ## train, compare and plot the three methods on data that needs no download
	$(BIN)/vbdl demo

bench: $(VENV)/.ok  ## the suite on data that needs no download, and its page; VBDL_DATA and BENCH="--suite quality" for all
	$(BIN)/vbdl bench $(BENCH)
	$(BIN)/vbdl report vbdl-bench

test: $(VENV)/.ok  ## the tests, about fourteen minutes on two cores
	$(BIN)/pytest -n 2 --dist worksteal

test-slow: $(VENV)/.ok  ## what is marked slow
	$(BIN)/pytest -m "slow and not gpu"

gpu: $(VENV)/.ok  ## on a machine with one: its tests, then the kernel benchmarks, under ten minutes
	$(BIN)/python benchmarks/gpu.py

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

$(VENV)/.ok: pyproject.toml constraints.txt
	@echo "Setting up $(VENV): 3.2 GB on disk with the CPU build of torch, and some GB more where only the CUDA build is offered."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch -c constraints.txt  # first and pinned, before a range can pull another build
	$(BIN)/pip install --quiet -e '.[dev]' -c constraints.txt
	@touch $@

clean:
	rm -rf $(VENV) vbdl-demo vbdl-bench .pytest_cache .ruff_cache .hypothesis
