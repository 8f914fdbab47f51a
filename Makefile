# Every target sets .venv up by itself first; a second call finds it ready. `make` alone lists the targets.
SHELL := bash
VENV ?= .venv
TE ?= .te
SERVE_VENV ?= .venv-serve
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup setup-serve demo demo-convert demo-sft demo-serve test test-fast test-te test-gpu test-slurm test-serve check bench bench-gpu bench-serve study clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 20
	@echo
	@echo "  PYTHON=/path/to/python3.12      the interpreter to build $(VENV) with (3.12 or 3.13)"
	@echo "  EMOE_TORCH_INDEX=https://...    the package index to take torch from (CPU-only wheels)"

setup: ## create .venv and install the package with its development tools
	@VENV="$(VENV)" bash tools/setup_env.sh

demo: setup ## the whole path on a small model: data, training, sweep over k, figure
	@$(BIN)/python examples/demo.py

demo-convert: setup ## a tiny Hugging Face model into Megatron, verified, trained elastically, and back
	@$(BIN)/python examples/demo_convert.py

demo-sft: setup ## instruction tuning of a tiny model on chats: top-k, EMoE and the recipe, at every k'
	@$(BIN)/python examples/demo_sft.py

demo-serve: setup setup-serve ## a tiny model trained elastically and served by vLLM at every k', by request and by load
	@$(BIN)/python examples/demo_serve.py --serve-python $(SERVE_VENV)/bin/python

test: setup ## all tests (those that need a GPU skip themselves without one)
	@$(BIN)/python -m pytest -q -n 3 --dist loadfile $(PYTEST_ARGS)

test-fast: setup ## the tests that are not marked slow: about two minutes
	@$(BIN)/python -m pytest -q -n 3 --dist loadfile -m "not slow" $(PYTEST_ARGS)

test-te: setup ## build Transformer Engine (20 to 40 minutes, once), and test its modules, names and keys without a GPU
	@VENV="$(VENV)" TE="$(TE)" bash tools/setup_te.sh
	@source $(TE)/env.sh && $(BIN)/python -m pytest -q -m te tests/te $(PYTEST_ARGS)

test-gpu: setup ## tests that need a CUDA device (on one GPU; skipped, with the reason, where there is none)
	@$(BIN)/python -m pytest -v -rs --tb=short --durations=15 -m gpu tests/gpu $(PYTEST_ARGS)

setup-serve: ## create .venv-serve: vLLM's CPU build and the plugin in serving/ (Python 3.11 to 3.13)
	@SERVE_VENV="$(SERVE_VENV)" bash tools/setup_serve.sh

test-serve: setup setup-serve ## the vLLM plugin on the real vLLM, on CPU, with a checkpoint that Megatron trained
	@EMOE_PYTHON="$(abspath $(BIN))/python" $(SERVE_VENV)/bin/python -m pytest -q -c serving/pyproject.toml serving/tests $(PYTEST_ARGS)

test-slurm: setup ## jobs on a real Slurm of two nodes on this machine (as root on Debian or Ubuntu; about 20 minutes)
	@tests/slurm/cluster.sh with $(BIN)/python -m pytest -q -rs -m slurm tests/slurm $(PYTEST_ARGS)

check: setup ## lint, formatting, types, and which part imports which
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@PYTHONPATH=serving $(BIN)/lint-imports --no-cache

bench: setup ## what elastic training costs against plain top-k, and conversion against copying
	@$(BIN)/python benchmarks/bench.py $(BENCH_ARGS)

bench-gpu: setup ## stock top-k against elastic on one GPU: step, memory, sweep, router kernel; writes docs/gpu.md
	@$(BIN)/python benchmarks/bench_gpu.py $(BENCH_ARGS)

bench-serve: setup-serve ## the vLLM plugin against stock vLLM on CPU: steps at every k', mixed batches, a ramp of load
	@$(SERVE_VENV)/bin/python benchmarks/bench_serve.py $(BENCH_ARGS)

study: setup ## the regret of each method at every budget: some hours, goes on where it was stopped; writes docs/study.md
	@$(BIN)/python benchmarks/study.py $(STUDY_ARGS)

clean: ## remove .venv, caches and what the demo wrote
	rm -rf $(VENV) $(SERVE_VENV) demo demo-convert demo-sft demo-serve build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
