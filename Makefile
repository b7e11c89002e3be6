# make sample      from nothing to out/triangles.png
# make test        the tests; test-full adds the long ones
# make lint        ruff, mypy, clang-format
# make bench       the CPU benchmarks, into benchmarks/results/
# make quality     how many samples of the shipped model are triangles, beside diffusers'
# make gpu OUT=dir [PART=base|cifar32|ddpm256|pipelines|training|triangles]
#                  what needs a GPU, nine minutes each, offline, with the python3 and torch already there
PYTHON ?= python3
TORCH ?= torch>=2.10
OUT ?= out/gpu
PART ?= base
RESULTS := benchmarks/results
VENV := .venv
BIN := $(VENV)/bin
# An empty CUDA_HOME would let torch guess; setup.py looks further where this finds nothing.
ifeq ($(strip $(CUDA_HOME)),)
CUDA_HOME := $(wildcard /usr/local/cuda)
endif
export CUDA_HOME
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
CPP := $(shell find csrc tests/cpp -type f)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: sample test test-full lint bench quality gpu clean

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
	$(BIN)/python benchmarks/reverse_step.py --device cpu
	$(BIN)/ddpm-fast bench kernels --device cpu --network triangles --batch 64 --rounds 9 \
		--out $(RESULTS)/kernels_triangles_cpu.csv --plot docs/images/roofline_triangles_cpu.png
	$(BIN)/ddpm-fast bench network --device cpu --network triangles --batch 1 --batch 64 --rounds 9 \
		--out $(RESULTS)/network_triangles_cpu.csv --plot docs/images/network_triangles_cpu.png
	$(BIN)/ddpm-fast bench network --device cpu --network cifar32 --batch 1 --batch 8 --rounds 9 \
		--out $(RESULTS)/network_cifar32_cpu.csv --plot docs/images/network_cifar32_cpu.png
	$(BIN)/ddpm-fast bench sampling --device cpu --network triangles --batch 16 --steps 50 \
		--out $(RESULTS)/sampling_triangles_cpu.csv --plot docs/images/sampling_triangles_cpu.png
	$(BIN)/python benchmarks/training_step.py --device cpu --network small tiny --batch 32
	$(BIN)/python -m pytest -q benchmarks --benchmark-only --benchmark-columns=median,iqr

quality: $(VENV)/.package $(VENV)/.test
	$(BIN)/python benchmarks/sample_quality.py --peer

gpu:
	$(PYTHON) benchmarks/run_gpu.py --out $(OUT) --part $(PART)

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

# torchvision wants one version of torch: TORCH is named again, so that it does not bring another.
$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet --group test "$(TORCH)"
	touch $@

$(VENV)/.lint: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet --group lint
	touch $@

clean:
	rm -rf $(VENV) build out ddpm_fast/*.so ddpm_fast.egg-info
