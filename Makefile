# make demo       set up, then make the shipped digits model forget the 0 (two CPU cores: two to eight minutes)
# make test       set up, then linter, type checker and all fast tests (a quarter of an hour to twenty minutes on two cores, two to five of them set-up and checks)
# make test-all   everything, what only repeats and the slow training tests, the matrix over ranks, the tables of digits and shapes (about two hours and a half)
# make storm      kills, signals, full disks, flipped bits and hostile folders in rounds: MINUTES=60, SEED=7 for the same rounds again
# make bench      benchmark suites beside their peers, results and tables (about half an hour)
# make gpu-check  nine minutes on the GPU of this machine, in stages, with the interpreter and torch of PYTHON: STAGES=smoke,step for some
# make gpu-report the results of it as tables in docs/performance.md, and which goals they reach
# make hub-kernel the folder from which kernel-builder makes a kernel for the Hugging Face hub, in build/hub
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

.PHONY: demo test test-all storm bench gpu-check gpu-report hub-kernel lint setup clean
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

# A GPU machine brings its own torch, built for its driver: no environment is made here. Its suites and whole runs need pytest,
# hypothesis, expecttest, pydantic, pyyaml and diffusers beside torch and triton; a stage without what it needs fails and the others go on.
STAGES ?=
GPU_RESULTS ?= bench/results/gpu

gpu-check:
	@$(PYTHON) bench/gpu/check.py --stages "$(STAGES)" --output $(GPU_RESULTS)

gpu-report:
	@$(PYTHON) bench/gpu/report.py --input $(GPU_RESULTS) --write docs/performance.md

HUB_KERNEL ?= build/hub

hub-kernel:
	@$(PYTHON) kernels/hub/make.py $(HUB_KERNEL)

clean:
	rm -rf $(VENV) build
