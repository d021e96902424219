# `make demo` and `make test` set up all they need on their first run; `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BUILD_REQUIREMENTS := setuptools wheel pybind11 cmake ninja

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
INSTALLED :=
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
endif

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz docs docs-packages lint format wheel compile-all sanitize clean extension python

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20
	@echo
	@echo '  VENV=               use the python3 at hand as it is: nothing is fetched or installed'
	@echo '  PYTHON=python3.12   the interpreter to start from'
	@echo '  ARGS="-k layout"    more arguments for pytest or the demo'

demo: extension ## run the demonstration
	$(PY) -m moda_kernels demo $(ARGS)

test: extension ## run the tests
	$(PY) -m pytest $$($(PY) -c 'import xdist; print("-n 2 --dist worksteal")' 2>/dev/null) $(ARGS)

fuzz: extension ## random calls against the reference: BACKEND=cpu, flex, triton or reference; CALLS=500; SEED=0, of the first
	@$(PY) -m moda_kernels.testing --backend $(or $(BACKEND),cpu) --seed $(or $(SEED),0) --calls $(or $(CALLS),500)

docs: docs-packages ## build the documentation as a site into site/
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

docs-packages: $(INSTALLED)
	@$(PY) -c 'import material, mkdocstrings_handlers.python' 2>/dev/null || \
	    MODA_KERNELS_NO_EXTENSION=1 $(PY) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[docs]'

lint: $(INSTALLED) ## check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(INSTALLED) ## put the code into its style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

wheel: $(INSTALLED) ## build the source distribution and the wheel into dist/
	$(PY) -m build --no-isolation

compile-all: $(INSTALLED) ## compile every Triton kernel in every configuration for every architecture; needs no GPU
	TRITON_INTERPRET=0 $(PY) -m moda_kernels.runtime.aot --all $(ARGS)

sanitize: extension ## run small attention on a GPU under compute-sanitizer's memcheck and racecheck
	for tool in memcheck racecheck; do \
	    compute-sanitizer --tool $$tool --error-exitcode 9 $(PY) -m pytest -q -m gpu tests/test_triton_gpu.py -k small || exit 1; done

clean: ## remove what was built, and the environment
	rm -rf .venv build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f moda_kernels/*.so
	find . -name __pycache__ -prune -exec rm -rf {} +

# Runs every time: the build itself knows best which interpreter and which sources its result is from.
extension: $(INSTALLED) | python
	@$(PY) -c 'import setuptools as s, sys; sys.exit("setuptools is " + s.__version__ + ", 77 is needed" if int(s.__version__.split(".")[0]) < 77 else None)' && \
	$(PY) setup.py --quiet build_ext --inplace || { \
	    test -z "$$MODA_KERNELS_REQUIRE_EXTENSION" || exit 1; \
	    echo 'The native extension did not build, for the reason above. All works without it, some of it more slowly.'; }

python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "moda_kernels needs Python 3.11 or newer; $(PYTHON) is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 ...")'

ifneq ($(INSTALLED),)
$(INSTALLED): pyproject.toml constraints.txt | python
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	    echo '$(PYTHON) makes no virtual environments: install its venv package (Debian: python3-venv), or use what is installed: make VENV= ...' >&2; exit 1; }
	@echo 'Setting up $(VENV), once; this takes a few minutes.'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt $(BUILD_REQUIREMENTS)
	MODA_KERNELS_NO_EXTENSION=1 $(PY) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@
endif
