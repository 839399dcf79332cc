# Needs only Python 3.11 or newer with venv, and make.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
PIP_LOG := $(VENV)/pip.log
EXTRAS := torch,train,eval,serve,docs,test
# The first interpreter that works and is new enough. Set PYTHON to choose another.
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo $$python; break; }; done)
PROMPT ?= The captain looked at the sea and said,
# More arguments for pytest: make test PYTEST="-x -k tokenizer"
PYTEST ?=
# More arguments for benchmarks/gpu_check: make gpu-check GPU_CHECK="--minutes 9"
GPU_CHECK ?=

# $(call stage,TEXT,COMMANDS): prints one line, and pip's output if a command fails.
define stage
printf '%s ... ' "$(1)"; start=$$SECONDS; \
	if { $(2); } > $(PIP_LOG) 2>&1; then echo "done in $$((SECONDS - start)) s"; \
	else echo "failed. The end of $(PIP_LOG):"; tail -n 40 $(PIP_LOG) >&2; exit 1; fi
endef

.PHONY: help
help:  ## Show this list
	@echo "keras_openllama: OpenLLaMA in Keras 3"
	@echo
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

.PHONY: demo
demo: $(VENV)/.base-installed  ## Install, and generate with open_llama_nano (PROMPT="...")
	@$(BIN)/keras-openllama generate "$(PROMPT)" --preset open_llama_nano \
		--max-new-tokens 100 --top-p 0.8 --temperature 0.7 --seed 3
	@echo
	@echo 'Next: $(BIN)/keras-openllama generate "Once upon a time" --preset open_llama_nano'

.PHONY: test
test: $(VENV)/.all-installed $(VENV)/tpu-compiler  ## Install every extra; run the tests on the three backends (20 minutes)
	@$(BIN)/python tests/run_backends.py $(PYTEST)

.PHONY: test-all
test-all: $(VENV)/.all-installed $(VENV)/tpu-compiler  ## Run the tests with the slow ones
	@$(BIN)/python tests/run_backends.py --slow $(PYTEST)

.PHONY: lint
lint: $(VENV)/.all-installed  ## Check style, formatting and the import contract
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-cache

.PHONY: format
format: $(VENV)/.all-installed  ## Fix style and formatting
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

.PHONY: docs
docs: $(VENV)/.all-installed  ## Build the notebooks of examples/, and the documentation into site/
	@$(BIN)/python docs/build_guides.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "The site is in site/: $(BIN)/python -m http.server -d site"

.PHONY: gpu-check
gpu-check: $(VENV)/.all-installed  ## Test and benchmark one GPU, on JAX and PyTorch
	@$(BIN)/python benchmarks/gpu_check $(GPU_CHECK)

# What an environment of JAX, PyTorch and transformers lacks, and its Python.
GPU_WHEELS := keras|keras-hub|namex|optree|kagglehub|kagglesdk|tensorboardX
GPU_PYTHON := 3.12
.PHONY: gpu-wheels
gpu-wheels: $(VENV)/.all-installed  ## Download into wheels/ what gpu-check needs on a machine without a network
	@$(BIN)/python -m pip download --quiet --disable-pip-version-check \
		--no-deps --only-binary=:all: --dest wheels \
		--python-version $(GPU_PYTHON) --implementation cp \
		$(addprefix --platform ,manylinux_2_28_x86_64 manylinux2014_x86_64) \
		$$(grep -E "^($(GPU_WHEELS))==" constraints.txt)
	@ls wheels

.PHONY: install
install: $(VENV)/.all-installed  ## Install every extra except plan (the TPU compiler) into .venv

.PHONY: freeze
freeze: $(VENV)/.all-installed  ## Write the installed versions to constraints.txt
	@# A local suffix (+cpu) names a build, not a version.
	@{ sed -n '/^#/p' constraints.txt; \
		$(BIN)/python -m pip freeze --all --exclude keras-openllama \
		| sed 's/+.*//'; } > $(VENV)/constraints.txt
	@cp $(VENV)/constraints.txt constraints.txt
	@touch $(VENV)/.base-installed $(VENV)/.all-installed

.PHONY: clean
clean:  ## Remove caches and built files, except .venv
	@rm -rf build dist site .pytest_cache .ruff_cache .hypothesis
	@find . -name $(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0r rm -rf

.PHONY: distclean
distclean: clean  ## Remove .venv too
	@rm -rf $(VENV)

# venv installs pip last, so pip marks a complete environment.
$(BIN)/pip:
	@[ -n "$(PYTHON)" ] || { echo "Python 3.11 or newer is needed and was not found." \
		"On Debian: apt-get install python3 python3-venv." \
		"Elsewhere: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
		"PYTHON=$(PYTHON) is not a Python 3.11 or newer." >&2; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo \
		"Python's venv module is missing or incomplete." \
		"On Debian: apt-get install python3-venv" >&2; exit 1; }

# The build backend comes first, in its pinned version: pip would build the package in an
# isolated environment with unpinned versions.
$(VENV)/.base-installed: pyproject.toml constraints.txt | $(BIN)/pip
	@$(call stage,Installing keras_openllama into $(VENV) (a few minutes the first time),\
		$(PIP) pip hatchling editables && $(PIP) --no-build-isolation -e .)
	@touch $@

$(VENV)/.all-installed: $(VENV)/.base-installed
	@$(call stage,Installing the extras (a few minutes the first time),\
		$(PIP) --no-build-isolation -e ".[$(EXTRAS)]")
	@touch $@

# The TPU compiler (the extra `plan`), for tests. It is not installed into .venv, because JAX
# logs a message at each start if it finds it without a TPU. It exists for Linux x86-64 only.
$(VENV)/tpu-compiler: pyproject.toml | $(BIN)/pip
	@rm -rf $@ && mkdir -p $@
	@[ "$$(uname -sm)" != "Linux x86_64" ] || { \
		tpu=$$(sed -n 's/^plan = \["\([^;]*\);.*/\1/p' pyproject.toml); \
		$(call stage,Installing the TPU compiler,\
		$(PIP) --no-deps --target $@ "$$tpu"); }
	@touch $@
