# make sample      install into .venv, then draw 64 images: out/triangles.png
# make test        run the tests; make test-full runs the slow ones too
# make lint        run ruff, mypy and clang-format
# make docs        build the documentation: site/index.html
# make bench       run the CPU benchmarks; results go to benchmarks/results/
# make wheels      build wheels for the CPU and for CUDA, and verify them without a compiler: dist/
# make quality     measure the share of triangles among samples, also with diffusers' pipeline
# make gpu OUT=dir [PART=first|base|cifar32|ddpm256|pipelines|training|triangles] [WHEELS=dir]
#                  run what needs a GPU, offline, with the installed torch: the first part in five
#                  minutes, each other one in nine
# make gpu-wheels  gather the wheels of optional packages for that machine: out/gpu-wheels
PYTHON ?= python3
TORCH ?= torch>=2.10
OUT ?= out/gpu
PART ?= first
WHEELS ?=
GPU_PYTHON ?= 3.12
# With those of their requirements that an environment with torch may lack.
GPU_PACKAGES := nvidia-cudnn-frontend apache-tvm-ffi diffusers importlib_metadata lazy-importer matplotlib
GPU_PLATFORMS := $(foreach glibc,17 24 27 28 31 34,--platform manylinux_2_$(glibc)_x86_64)
RESULTS := benchmarks/results
VENV := .venv
BIN := $(VENV)/bin
# torch guesses where CUDA_HOME is empty; setup.py searches where this finds nothing.
ifeq ($(strip $(CUDA_HOME)),)
CUDA_HOME := $(wildcard /usr/local/cuda)
endif
export CUDA_HOME
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
CPP := $(shell find csrc tests/cpp -type f)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: sample test test-full lint docs bench quality wheels gpu gpu-wheels clean

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

docs: $(VENV)/.package $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

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

wheels: $(VENV)/.torch
	$(BIN)/pip install --quiet --group wheels
	$(BIN)/python tests/build/wheels.py

gpu:
	$(PYTHON) benchmarks/run_gpu.py --out $(OUT) --part $(PART) $(if $(WHEELS),--wheels $(WHEELS))

gpu-wheels:
	rm -rf out/gpu-wheels
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --dest out/gpu-wheels \
		--python-version $(GPU_PYTHON) --implementation cp $(GPU_PLATFORMS) $(GPU_PACKAGES)

$(VENV)/.torch:
	@$(PYTHON) setup.py --check
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" ninja
	$(BIN)/pip install --quiet "$(TORCH)" numpy
	touch $@

# An isolated build would download torch a second time.
$(VENV)/.package: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --editable .
	$(BIN)/python -c "from ddpm_fast import _C; info = _C.build_info(); print('ddpm_fast: built for the CPU' + (' and CUDA ' + info['cuda_architectures'] if info['cuda'] else ' only: see DDPM_FAST_CUDA in setup.py'))"
	touch $@

# torchvision requires one version of torch; naming TORCH again keeps the installed one.
$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet --group test "$(TORCH)"
	touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet --group docs
	touch $@

$(VENV)/.lint: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet --group lint
	touch $@

clean:
	rm -rf $(VENV) build dist out site ddpm_fast/*.so ddpm_fast.egg-info
