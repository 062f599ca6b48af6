# Each target makes its own virtual environment in .venv when there is none.
PYTHON ?= python3.11
VENV = .venv
BIN = $(VENV)/bin
ONE = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: bench bench-gpu demo faults fuzz test test-slow check lint types install

demo: install  ## pre-train, decompose, recombine, transfer, sample: 10 to 20 minutes on two cores, about 40 where they have no bf16
	$(BIN)/kindiff demo runs/demo

test: install  ## the tests, two processes of one thread each
	$(ONE) $(BIN)/python -m pytest -n 2

test-slow: install  ## the tests that take more than some seconds each
	$(ONE) $(BIN)/python -m pytest -n 2 -m slow

bench: install  ## component matrices against dense ones; needs a quiet machine
	for part in blocks products classes sweep; do $(BIN)/python benchmarks/speed.py $$part || exit 1; done
	for part in steps sampling; do $(BIN)/python benchmarks/models.py $$part || exit 1; done
	$(BIN)/python benchmarks/strategies.py
	$(BIN)/python benchmarks/operations.py
	$(BIN)/python benchmarks/parts_on_disk.py

bench-gpu: install  ## the same on a GPU, and training throughput of DiT-B/2 and L/2, bf16, compiled
	for part in blocks products classes sweep; do $(BIN)/python benchmarks/speed.py $$part --device cuda || exit 1; done
	for part in steps sampling gpu; do $(BIN)/python benchmarks/models.py $$part --device cuda || exit 1; done
	$(BIN)/python benchmarks/strategies.py --device cuda
	for part in layers tiles; do $(BIN)/python benchmarks/fused.py $$part || exit 1; done

faults: install  ## the fault campaign in its long form: an hour or more; run again to go on (docs/reliability.md)
	$(ONE) $(BIN)/python benchmarks/faults.py

fuzz: install  ## a million inputs guided by coverage; run again to go on
	$(ONE) nice $(BIN)/python benchmarks/guided_fuzzing.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

check: lint types test test-slow  ## all that CI runs

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
