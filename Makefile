# make em      from nothing to the main job's output: EM on the embedded generator
# make test    the tests                 make check   format, lint, types and tests, as CI runs them
# make bench   the ops beside torch      make build   environment and extension only
# Needs python3 (>= 3.10, with venv), a C++20 compiler and make; everything else goes to .venv.
PYTHON ?= python3
TORCH  ?= $(shell sed -n 's/^torch==//p' constraints.txt)
BIN    := .venv/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
# idle OpenMP threads sleep, so that two jobs on few cores do not slow each other down
export OMP_WAIT_POLICY ?= passive

.PHONY: em test check bench build clean
em: build
	$(BIN)/python -m oneshot_fast.em

test: build
	$(BIN)/python -m pytest

check: build
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	find csrc -name '*.h' -o -name '*.cpp' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy
	$(BIN)/python -m pytest

bench: build
	$(BIN)/python benchmarks/bench_ops.py

build: .venv/.built

.venv/.built: setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f) .venv/.ready
	$(PIP) install --no-build-isolation --constraint constraints.txt --editable '.[dev]'
	@touch $@

.venv/.ready: tools/get_torch.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python tools/get_torch.py $(TORCH)
	$(PIP) install --constraint constraints.txt setuptools cmake ninja pybind11
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info oneshot_fast/_C*.so
