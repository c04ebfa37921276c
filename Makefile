# Each target makes $(VENV) and installs the project with all its extras for developers when that is missing or out of date.
#   PYTHON=python3.12       the interpreter (3.10 or newer) that $(VENV) is made with
#   VENV=.venv              where the environment is
#   JOBS=2                  test processes
#   PYTEST_ARGS='-k seta'   more arguments for pytest (a later -m replaces the one below)
#   DEMO_ARGS='--epochs 3'  more arguments for the demo
#   SAMPLEWISE_NATIVE=0     without the native kernels (see setup.py)
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PARTS := cuda_ext loaders plugins callbacks recipes
KERNELS := setup.py $(wildcard cuda_ext/csrc/*)
# plugins' tests that use none of the ops
NO_OPS := $(wildcard tests/plugins/test_*token*.py tests/plugins/test_*bit*.py) \
  $(patsubst %,tests/plugins/test_%.py,adore correction exchange hard_negatives pools quantize refresh search star)
NATIVE := $(VENV)/.native-$(or $(SAMPLEWISE_NATIVE),auto)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test sanitize bench lint format typecheck install clean FORCE

help:  ## list the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1	\2/p' Makefile | expand -t 18

demo: $(NATIVE)  ## run the curriculum pruning recipe on real data; ends with a table and a report
	$(BIN)/samplewise run prune $(DEMO_ARGS)

test: lint $(NATIVE)  ## lint, then all tests but the slow ones and those that need a GPU; those that use ops without kernels too
	$(PYTEST) -m "not slow and not cuda" $(PYTEST_ARGS)
	SAMPLEWISE_NATIVE=0 $(PYTEST) -m "not slow and not cuda" $(addprefix --ignore=,tests/cuda_ext/test_phases.py $(NO_OPS)) tests/cuda_ext tests/plugins $(PYTEST_ARGS) || [ $$? -eq 5 ]

sanitize: $(NATIVE)  ## the tests of the ops on CPU kernels built with AddressSanitizer and UndefinedBehaviorSanitizer
	SAMPLEWISE_NATIVE=cpu CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined" \
	  $(BIN)/python setup.py -q build_ext --force --build-lib build/sanitized --build-temp build/sanitized
	SAMPLEWISE_NATIVE=$(CURDIR)/build/sanitized/samplewise/cuda_ext/_cpu.so ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  $(BIN)/python -m pytest -m "not slow and not cuda" tests/cuda_ext $(PYTEST_ARGS)

bench: $(NATIVE)  ## run every benchmark
	@set -e; for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script; done
	$(BIN)/python benchmarks/scale.py --quick

lint: $(STAMP)  ## ruff, then mypy on the installed package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory typecheck

format: $(STAMP)  ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# On an installed copy, as a user's mypy sees it: without py.typed or with a module left out of the wheel this fails.
typecheck: $(STAMP)  ## mypy --strict on the installed package
	@rm -rf build/typecheck build/lib build/bdist.*
	@SAMPLEWISE_NATIVE=0 $(BIN)/python -m pip install --quiet --no-deps --no-index --no-build-isolation --target build/typecheck .
	PYTHONPATH=build/typecheck $(BIN)/mypy $(PARTS:%=-p samplewise.%)

install: $(NATIVE)  ## make $(VENV) and install everything

clean:  ## remove what was built (not $(VENV), not results)
	rm -rf build dist *.egg-info cuda_ext/_cpu.so cuda_ext/_cuda.so $(VENV)/.native* .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Where there is a compiler, the kernels; they are built again when their sources change.
$(NATIVE): $(STAMP) $(KERNELS)
	@echo "Building the native kernels (SAMPLEWISE_NATIVE=$${SAMPLEWISE_NATIVE:-auto})"
	@rm -f cuda_ext/_cpu.so cuda_ext/_cuda.so $(VENV)/.native*
	@$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

# $(VENV).partial lies beside an environment that is being made: one that an interruption left half-made starts afresh.
$(STAMP): pyproject.toml constraints.txt $(shell test -x $(BIN)/python || echo FORCE)
	@command -v "$(PYTHON)" >/dev/null || { echo "error: no '$(PYTHON)' on the path: install Python 3.10 or newer, or run: make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: samplewise needs Python 3.10 or newer and '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1): run make PYTHON=python3.12, for example" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "error: '$(PYTHON)' cannot make virtual environments: install its venv module (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@rm -f $@
	@if [ -e $(VENV).partial ] || [ ! -x $(BIN)/python ]; then \
	  touch $(VENV).partial && "$(PYTHON)" -m venv --clear $(VENV); fi
	@touch $(VENV).partial
	@echo "Installing samplewise and its tools into $(VENV): some minutes the first time"
	SAMPLEWISE_NATIVE=0 $(BIN)/python -m pip install $(if $(CI),--quiet) -c constraints.txt -e '.[dev]' || { rm $(VENV).partial; exit 1; }
	@rm $(VENV).partial
	@touch $@
