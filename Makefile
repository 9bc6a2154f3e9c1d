# make demo       set up, then make the shipped digits model forget the 0 (two CPU cores: two to eight minutes)
# make test       set up, then linter, type checker and all fast tests (a quarter of an hour to twenty minutes on two cores, two to five of them set-up and checks)
# make test-all   everything, what only repeats and the slow training tests, the matrix over ranks, the tables of digits and shapes (about two hours and a half)
# make storm      kills, signals, full disks, flipped bits and hostile folders in rounds: MINUTES=60, SEED=7 for the same rounds again
# make bench      benchmark suites beside their peers, results and tables (about half an hour)
# make gpu-check  all kernel tests and GPU benchmarks on the GPU of this machine, with the interpreter and torch of PYTHON
# make clean      remove the environment and build output (runs/ is kept)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# a thread each: see tests/conftest.py
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(8, os.cpu_count() or 1))')
SUITES ?= adam threshold saliency bits zero
NATIVE := $(wildcard csrc/*) CMakeLists.txt
# an editable install knows the modules that were there when it was made: a new one changes its folder, and so sets up again
FOLDERS := $(shell find pecker_fast kernels -type d -not -name __pycache__)

# What an image of a container may have set: without bytecode on disk every process compiles all of its libraries again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-all storm bench gpu-check lint setup clean
.DEFAULT_GOAL := demo

setup: $(READY)

# --no-compile: of what is installed few modules are ever imported, and those are compiled then
$(READY): pyproject.toml constraints.txt $(NATIVE) $(FOLDERS)
	@echo "== setting up $(VENV): pinned packages, native kernels (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: Python 3.11 or newer is needed, $(PYTHON) is older; run make PYTHON=python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@CMAKE_BUILD_PARALLEL_LEVEL=$(WORKERS) PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=$(CURDIR)/constraints.txt \
		$(BIN)/python -m pip install --quiet --no-compile --editable ".[test,track,eval,deepspeed]"
	@$(BIN)/python -m compileall -q pecker_fast kernels
	@touch $@

demo: setup
	@echo "== pecker-fast train digits: forget the 0, draw a 1 in its place"
	@$(BIN)/pecker-fast train digits

lint: setup
	@echo "== ruff, mypy"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

test: lint
	@echo "== pytest"
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 15 -m "not slow"

test-all: lint
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 30
	@$(BIN)/python bench/digits_table.py
	@$(BIN)/python bench/shapes_table.py

MINUTES ?= 60
SEED ?=

storm: setup
	@$(BIN)/python tests/storm.py --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

bench: setup
	@$(BIN)/python bench/deepspeed_adam.py
	@for suite in $(SUITES); do echo "== bench $$suite"; \
		$(BIN)/python -m pytest bench/test_bench_$$suite.py --benchmark-json=bench/results/$$suite.json || exit 1; done
	@echo "== bench iteration"
	@$(BIN)/python -m pytest bench/test_bench_iteration.py --benchmark-json=bench/results/iteration.json
	@echo "== bench account, floor"
	@$(BIN)/pecker-fast bench digits_plain --iterations 30 --json bench/results/account_digits.json
	@$(BIN)/python bench/floor.py
	@$(BIN)/python bench/tables.py --write docs/performance.md

# A GPU machine brings its own torch, built for its driver: no environment is made here. It needs pytest, pytest-benchmark,
# hypothesis, expecttest and diffusers beside torch and triton.
gpu-check:
	@$(PYTHON) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "gpu-check: torch finds no CUDA device here")' || exit 2
	@PYTHONPATH=kernels:.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m pytest -o addopts=-q tests/kernels
	@if $(PYTHON) -c 'import diffusers, pydantic, yaml' 2>/dev/null; \
		then PYTHONPATH=kernels:.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m pytest -o addopts=-q tests/engine/test_loop_gpu.py; \
		else echo "gpu-check: the loop's own tests are left out, they need diffusers, pydantic and pyyaml"; fi
	@PYTHONPATH=kernels:.$${PYTHONPATH:+:$$PYTHONPATH} sh -ec 'for suite in bench/test_gpu_*.py; do test -f $$suite || continue; \
		$(PYTHON) -m pytest -o addopts=-q $$suite --benchmark-json=bench/results/$$(basename $$suite .py | cut -c 6-).json; done'
	@if $(PYTHON) -c 'import diffusers, pydantic, yaml' 2>/dev/null; then PYTHONPATH=kernels:.$${PYTHONPATH:+:$$PYTHONPATH} sh -ec ' \
		for arch in sd15 sdxl; do $(PYTHON) bench/full_size.py --arch $$arch --batch 1 --output bench/results/full_size_$$arch.json; done; \
		$(PYTHON) bench/full_size.py --arch sd15 --batch 8 --output bench/results/full_size_sd15_batch8.json'; fi

clean:
	rm -rf $(VENV) build
