# Every command that a person types. Each sets up its own .venv, from constraints.txt, on first use.
#
#   PYTHON=python3.12         which Python the .venv is made of (3.11 or later)
#   PARTUNE_CUDA=0            build the CPU part alone
#   TORCH_CUDA_ARCH_LIST=9.0  build for these GPUs
#   ARGS="..."                more arguments: of pytest for test, test-all and bench, of the script for demo

PYTHON ?= python3
ARGS ?=
RUN := .venv/bin/python
export PATH := $(CURDIR)/.venv/bin:$(PATH)
PIP := $(RUN) -m pip --disable-pip-version-check -q
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
TIDY := $(filter-out $(if $(filter 0,$(PARTUNE_CUDA)),csrc/cuda/%),$(filter %.cpp,$(SOURCES)))
LINTED := python tests examples benchmarks setup.py .ci

.PHONY: help build demo test test-all bench lint format wheel clean FORCE
.DELETE_ON_ERROR:

help:
	@echo "make demo      fine-tune SmolLM2-135M-Instruct with LiftAdamW (minutes; downloads 100 MB once)"
	@echo "make test      the tests, on this machine's best instruction set"
	@echo "make test-all  all tests, the slow ones too, on every instruction set of this machine"
	@echo "make bench     every figure beside its peer and its limit"
	@echo "make lint      ruff, mypy, clang-format, clang-tidy"
	@echo "make format    ruff and clang-format, applied"
	@echo "make wheel     dist/*.whl and the source archive, built as a user's pip would"
	@echo "make build     the native core, in place, into .venv"
	@echo "make clean     remove what was built; .venv and downloads stay"

demo: .venv/.demo
	model=$$($(RUN) examples/offline_models.py smollm2-135m-instruct) && \
	  $(RUN) examples/finetune_arithmetic.py --model "$$model" $(ARGS)

test: .venv/.test
	$(RUN) -m pytest -m "not slow" $(ARGS)

test-all: .venv/.test
	set -e; isas=$$($(RUN) -c "from partune.cli import collect_info; print(*collect_info()['cpu']['available'])"); \
	for isa in $$isas; do \
	  echo "PARTUNE_CPU_ISA=$$isa"; \
	  PARTUNE_CPU_ISA=$$isa $(RUN) -m pytest $(ARGS); \
	done

bench: .venv/.bench
	$(RUN) -m pytest benchmarks $(ARGS)

lint: .venv/.lint
	$(RUN) -m ruff check $(LINTED)
	$(RUN) -m ruff format --check $(LINTED)
	$(RUN) -m mypy
	.venv/bin/clang-format --dry-run -Werror $(SOURCES)
	$(MAKE) --no-print-directory -j $$(nproc) $(addprefix build/tidy/,$(TIDY))

format: .venv/.lint
	$(RUN) -m ruff check --fix-only $(LINTED)
	$(RUN) -m ruff format $(LINTED)
	.venv/bin/clang-format -i $(SOURCES)

# One run of clang-tidy for each source, again when it or a header has changed.
build/tidy/%.cpp: %.cpp $(filter %.h,$(SOURCES)) .clang-tidy csrc/kernels/.clang-tidy .venv/.lint
	.venv/bin/clang-tidy --quiet -p build/native $<
	@mkdir -p $(@D) && touch $@

wheel: .venv/.requirements
	$(PIP) install -c constraints.txt build
	rm -rf dist
	$(RUN) -m build --outdir dist

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
	@echo '$(PARTUNE_CUDA) $(TORCH_CUDA_ARCH_LIST) $(CUDA_HOME)' > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@
FORCE:

INSTALL := $(PIP) install --no-build-isolation -c constraints.txt
.venv/.build: .venv/.requirements build/.options setup.py CMakeLists.txt $(SOURCES)
	$(INSTALL) -e .
	@touch $@

.venv/.test .venv/.bench .venv/.lint .venv/.demo: .venv/.%: .venv/.requirements | .venv/.build
	$(INSTALL) -e '.[$*]'
	@touch $@
