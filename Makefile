# What people do with a checkout. Nothing outside of it is changed, but for the demo's cache.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable
INSTALLED_FROM := pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h kernels/cpu/CMakeLists.txt)

.PHONY: help demo test bench bench-peers bench-kernels matrix check-gpu-kernels lint format kernels protos clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

demo: $(VENV)/.installed-demo ## train three adapters, serve them beside the base, compare
	$(BIN)/manylora demo

test: $(VENV)/.installed-dev ## all tests
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal

bench: $(VENV)/.installed-bench ## our own speed ratios, a minute
	$(BIN)/python benchmarks/run.py

bench-peers: $(VENV)/.installed-bench ## every bar, side by side with vLLM, transformers + peft and llama.cpp
	$(BIN)/python benchmarks/run.py --peers

bench-kernels: $(VENV)/.installed-bench ## the C++ kernels: their bars, table and plot, two to four minutes
	$(BIN)/python benchmarks/kernels_bench.py

matrix: $(VENV)/.installed-dev ## every PEFT method on every architecture against peft
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=tests/tools $(BIN)/python -P -m manylora_testing.matrix

check-gpu-kernels: $(VENV)/.installed-dev ## run and compile the Triton kernels without a GPU
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest tests/kernels -k triton
	$(BIN)/python -P -m manylora.kernels.triton.compile_check

lint: $(VENV)/.installed-dev ## what CI checks before the tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python protos/generate.py --check

format: $(VENV)/.installed-dev ## mend what can be mended by itself
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

kernels: $(VENV)/.installed-dev ## build the C++ kernels again
	$(INSTALL) '.[dev]'

protos: $(VENV)/.installed-dev ## generate the stubs again
	$(BIN)/python protos/generate.py

clean: ## remove the virtual environment and what was built
	rm -rf $(VENV) build kernels/cpu/*.so

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "manylora needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: $(INSTALLED_FROM) | $(BIN)/python
	$(INSTALL) '.[train,gguf]'
	touch $@

$(VENV)/.installed-bench: $(INSTALLED_FROM) | $(BIN)/python
	$(INSTALL) '.[bench]'
	touch $@

$(VENV)/.installed-dev: $(INSTALLED_FROM) | $(BIN)/python
	$(INSTALL) '.[dev]'
	touch $(VENV)/.installed-demo $@
