# make em      from nothing to the main job's output: EM on the embedded generator
# make test    the tests                 make check   format, lint, types and tests, as CI runs them
# make bench   the ops beside torch      make build   environment and extension only
# make wheel   one for every Python >= 3.10, in dist
# make gpu     on an NVIDIA GPU: gpu-build, gpu-test, gpu-bench and gpu-sdxl, each although one failed
# make sanitize  the CUDA kernels under compute-sanitizer
# Needs python3 (>= 3.10, with venv), a C++20 compiler and make; everything else goes to .venv.
# Flags of gpu and sanitize: SYSTEM=1 uses the torch and the packages that $(PYTHON) has, and adds
# to them in build/system only; WHEELS=folder takes what is missing from there, without a network.
PYTHON ?= python3
TORCH  ?= $(shell sed -n 's/^torch==//p' constraints.txt)
VENV   := $(if $(SYSTEM),build/system,.venv)
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
# idle OpenMP threads sleep, so that two jobs on few cores do not slow each other down
export OMP_WAIT_POLICY ?= passive
# pip compiles every file of the packages, most of which are never imported
export PIP_COMPILE ?= 0
# and who is not to write what was compiled compiles torch again in every process, for 10 s
unexport PYTHONDONTWRITEBYTECODE

.PHONY: em test check bench build gpu sanitize clean
# one thread is faster than several on networks this small
em: build
	OMP_NUM_THREADS=1 $(BIN)/python -m oneshot_fast.em

# one process more than cores, one thread each; the gpu tests are skipped and counted where there is no GPU
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal
test: build
	$(PYTEST)

check: build .venv/.kernels
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | \
	    xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST)

# the GPU kernels, compiled without a GPU for an architecture of each size of shared memory, each
# kernel of Triton's once: which instructions a dtype takes differs more than the architectures do;
# the tools' defaults are all. Repeated only when they change
.venv/.kernels: .venv/.built $(shell find csrc kernels -type f) tools/check_cuda.py tools/check_triton.py
	$(BIN)/python tools/check_triton.py --arch 80 --dtype float32
	$(BIN)/python tools/check_triton.py --arch 90 --dtype bfloat16
	$(BIN)/python tools/check_cuda.py --arch 86 90
	@touch $@

bench: build
	$(BIN)/python -m pytest benchmarks/ops --benchmark-only --benchmark-autosave \
	    --benchmark-max-time 0.3
	$(BIN)/python -m benchmarks.ops.bench

build: .venv/.built

# without any of the second line there is less to see, and no failure
GPU_NEEDS := 'setuptools>=77' cmake ninja pytest \
             pytest-timeout pytest-xdist matplotlib diffusers transformers peft tyro
GPU_TESTS := $(addprefix tests/ops/test_,ops.py gpu.py rotation_step.py triton_kernels.py triton.py)
GPU_JOBS  ?= 8
GPU_BENCH ?= --seconds 0.15 --budget 150
HAVE       = $(BIN)/python -c 'import $(1)' 2> /dev/null
GPU_PYTEST = $(BIN)/python -m pytest -m gpu -p no:cacheprovider \
             $$($(call HAVE,pytest_timeout) && echo --timeout 300)

.PHONY: gpu-build gpu-test gpu-bench gpu-sdxl wheel
gpu:
	$(MAKE) gpu-build
	status=0; for part in test bench sdxl; do $(MAKE) gpu-$$part || status=1; done; exit $$status

gpu-build gpu-test gpu-bench gpu-sdxl sanitize: export OSF_WITH_CUDA ?= on
gpu-build: $(VENV)/.built-cuda

gpu-test: $(VENV)/.built-cuda
	status=0; \
	$(GPU_PYTEST) $$($(call HAVE,xdist) && echo -n $(GPU_JOBS)) -k 'not 2_31' $(GPU_TESTS) || status=1; \
	$(GPU_PYTEST) -k 2_31 tests/ops/test_gpu.py || status=1; exit $$status

gpu-bench: $(VENV)/.built-cuda
	$(BIN)/python -m benchmarks.ops.bench --device cuda $(GPU_BENCH)
	$(call HAVE,matplotlib) || { echo "skipped: no picture without matplotlib"; exit 0; }; \
	$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || exit 0; \
	$(BIN)/python -m benchmarks.ops.plot

gpu-sdxl: $(VENV)/.built-cuda
	for need in diffusers transformers peft tyro; do $(BIN)/python -c "import $$need" 2> /dev/null || \
	    { echo "skipped: $$need is not installed"; exit 0; }; done; \
	$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
	    { echo "skipped: there is no CUDA device"; exit 0; }; \
	$(BIN)/python -m benchmarks.sdxl.turbo --arch full --short

# one for every Python from 3.10 on, and for every torch from the one built with on
wheel: .venv/.ready
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .

SANITIZE = compute-sanitizer --error-exitcode 1 --report-api-errors no --tool $(1) \
           $(BIN)/python -m pytest -m gpu -p no:cacheprovider
sanitize: export PYTORCH_NO_CUDA_MEMORY_CACHING := 1
sanitize: $(VENV)/.built-cuda
	$(call SANITIZE,memcheck) tests/ops/test_ops.py \
	    -k 'value_and_gradients and cuda and float32 and (contiguous or misaligned)'
	$(call SANITIZE,racecheck --kernel-name kns=osf) tests/ops/test_ops.py \
	    -k 'value_and_gradients and cuda and float32 and contiguous'
	$(call SANITIZE,initcheck --kernel-name kns=osf) tests/ops/test_gpu.py \
	    -k 'nothing_waits and cuda'

# CUDA kernels for the GPU at hand, unless OSF_CUDA_ARCHITECTURES says which
ARCHITECTURE := import torch; print("%d%d-real" % torch.cuda.get_device_capability())
$(VENV)/.built-cuda: setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f) $(VENV)/.ready
	for need in $(GPU_NEEDS); do $(PIP) install --retries 1 $(if $(WHEELS),--no-index --find-links $(WHEELS)) \
	    "$$need" || echo "not installed: $$need" >&2; done
	export OSF_CUDA_ARCHITECTURES="$${OSF_CUDA_ARCHITECTURES:-$$($(BIN)/python -c '$(ARCHITECTURE)')}" \
	    PATH="$(abspath $(BIN)):$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$$PATH"; \
	$(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@

# PYTHON may itself be a virtual environment, which the one here would not see without a path file
SHARE := import sys; print(*("import site; site.addsitedir(%r)" % p for p in sys.path if "-packages" in p), sep="\n")
build/system/.ready:
	$(PYTHON) -m venv --without-pip build/system
	$(PYTHON) -c '$(SHARE)' > "$$(echo build/system/lib/python*/site-packages)/shared.pth"
	@touch $@

.venv/.built: setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f) .venv/.ready
	$(PIP) install --no-build-isolation --constraint .venv/constraints.txt --editable '.[dev]'
	@touch $@

.venv/.ready: tools/get_torch.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python tools/get_torch.py $(TORCH)
	sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt > .venv/constraints.txt
	$(PIP) install --constraint .venv/constraints.txt setuptools cmake ninja
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info oneshot_fast/_C*.so
