# make bench: install, build, run the main job.   make test: install, build, run the tests.
# make emulate: build the CUDA kernels for the CPU (FUSED_OPS_EMULATE=1 uses them).
# VENV=none PYTHON=python3 uses the interpreter at hand (it must have torch) and installs nothing.
VENV ?= .venv
PYTHON ?= python3
SHELL := /bin/bash

# The GPUs at hand; without one, Hopper.
export TORCH_CUDA_ARCH_LIST ?= $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sed 's/^9\.0$$/9.0a/' | sort -u | paste -sd';'),9.0a)

SOURCES := setup.py pyproject.toml $(filter-out csrc/emulation/%,$(wildcard csrc/*/*))
INTERPRETER_TESTS = $(wildcard tests/*/test_*interpreter*.py)
EMULATED_TESTS = $(wildcard tests/*/test_*emulated*.py)

ifeq ($(VENV),none)
  PY := $(PYTHON)
  BUILT := build/.built
else
  PY := $(VENV)/bin/python
  BUILT := $(VENV)/.built
endif

# On a GPU machine: where its results go.
OUT ?= build/gpu

.PHONY: bench test emulate sanitize setup lint gate gpu clean

bench: setup
	$(PY) -m bench

test: setup emulate
	$(PY) -m pytest -q -n 2 -m "not slow"
	TRITON_INTERPRET=1 $(PY) -m pytest -q -n 2 $(INTERPRETER_TESTS)
	FUSED_OPS_EMULATE=1 OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 $(EMULATED_TESTS)

emulate: setup
	$(PY) -m tests.emulation.build

# The emulated tests again, the kernels under AddressSanitizer.
sanitize: setup emulate
	$(PY) -m tests.emulation.sanitize

gate: setup
	$(PY) -m tests.gate $(GATE_FLAGS)

# What only a GPU can settle: which kernels are right, how fast they are, what PyTorch does there.
gpu: setup
	mkdir -p $(OUT)
	-$(PY) -m tests.verify --out $(OUT)/verified.json
	-$(PY) -m tests.emulation.calibrate
	-$(PY) -m bench.measure.rnn_gpu --out $(OUT)
	-$(PY) -m bench --out $(OUT)
	$(PY) -m bench baselines --out $(OUT)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

setup: $(BUILT)

ifeq ($(VENV),none)
$(BUILT): $(SOURCES)
	$(PY) setup.py -q build_ext --inplace
	touch $@
else
$(VENV)/.installed: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q torch==2.13.0
	$(PY) -c "import triton" 2>/dev/null || $(PY) -m pip install -q triton==3.6.0
	$(PY) -m pip install -q -r requirements.txt
	grep -h '^#--no-deps' requirements.txt | cut -d' ' -f2- | xargs $(PY) -m pip install -q --no-deps
	touch $@

$(BUILT): $(VENV)/.installed $(SOURCES)
	$(PY) -m pip install -q --no-build-isolation --no-deps -e .
	touch $@
endif

clean:
	rm -rf build dist *.egg-info .venv .pytest_cache .ruff_cache .benchmarks fused_ops/*.so
	find . -name __pycache__ -prune -exec rm -rf {} +
