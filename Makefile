# make sample      from nothing to out/triangles.png
# make test        the tests; test-full adds the long ones
# make lint        ruff, mypy, clang-format
# make bench       the CPU benchmarks, into benchmarks/results/
# make gpu OUT=dir everything that needs a GPU, offline, with the python3 and torch already there
PYTHON ?= python3
TORCH ?= torch>=2.10
OUT ?= out/gpu
VENV := .venv
BIN := $(VENV)/bin
# An empty CUDA_HOME would let torch guess; setup.py looks further where this finds nothing.
ifeq ($(strip $(CUDA_HOME)),)
CUDA_HOME := $(wildcard /usr/local/cuda)
endif
export CUDA_HOME
SOURCES := setup.py pyproject.toml $(wildcard csrc/*/*)
CPP := $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.inl csrc/*/*.cu csrc/*/*.cuh)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: sample test test-full lint bench gpu clean

sample: $(VENV)/.package
	$(BIN)/ddpm-fast sample --num 64 --out out/triangles.png

test: $(VENV)/.package $(VENV)/.test
	$(PYTEST)

test-full: $(VENV)/.package $(VENV)/.test
	$(PYTEST) --full

lint: $(VENV)/.package $(VENV)/.lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

bench: $(VENV)/.package $(VENV)/.test
	$(BIN)/python benchmarks/updates.py --device cpu
	$(BIN)/python benchmarks/triangle_quality.py --peer

gpu:
	$(PYTHON) benchmarks/gpu.py --out $(OUT)

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" ninja "pybind11>=2.13"
	$(BIN)/pip install --quiet "$(TORCH)" numpy
	touch $@

# Without build isolation: an isolated build would fetch torch a second time.
$(VENV)/.package: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --editable .
	$(BIN)/python -c "from ddpm_fast import _C; info = _C.build_info(); print('ddpm_fast: built for the CPU' + (' and CUDA ' + info['cuda_architectures'] if info['cuda'] else ' only: see DDPM_FAST_CUDA in setup.py'))"
	touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet --group test
	touch $@

$(VENV)/.lint: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet --group lint
	touch $@

clean:
	rm -rf $(VENV) build out ddpm_fast/*.so ddpm_fast.egg-info
