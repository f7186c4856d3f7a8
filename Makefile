# `make help` lists the targets. Nothing is needed beforehand but make and Python 3.11 or newer.

PYTHON ?= python3
VENV ?= .venv
# Package index to take torch from, and nothing else; empty: pip's own. The index of official CPU wheels, say,
# saves gigabytes on Linux: make demo TORCH_INDEX=<its address>
TORCH_INDEX ?=
# Test processes; each computes on one thread.
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test coverage check bench docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH_INDEX=$(TORCH_INDEX) WORKERS=$(WORKERS)"

demo: $(VENV)/demo.stamp  ## train a family of small models on this machine and compare them; writes studies/demo
	$(BIN)/morex compare demo --out studies/demo
	@echo "The report: $(CURDIR)/studies/demo/report.html"

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

test: $(VENV)/dev.stamp  ## run the tests
	$(PYTEST)

coverage: $(VENV)/dev.stamp  ## run the tests, slower, and fail when they cover less than 90 % of src
	$(PYTEST) --cov --cov-report=term:skip-covered --cov-fail-under=90

check: $(VENV)/dev.stamp  ## lint, formatting, types, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layering.py

DECODE := $(BIN)/morex bench decode smollm2-135m --set 'model.schedule={sharing: middle_cycle, layers: 30, recursions: 4}' \
  --depth-mix 1,1,1,1 --threads 2 --precision bf16

bench: $(VENV)/demo.stamp  ## measure training and decoding speed against the dense twins, memory, start-up and bf16 flips; writes benchmarks/results
	@mkdir -p benchmarks/results
	$(BIN)/morex bench train recursive mor-expert mor-token mor-threshold mor-random --rounds 5 \
	  --json benchmarks/results/train.json
	$(BIN)/morex bench train more more-tuned moe --rounds 11 --json benchmarks/results/train-experts.json
	$(BIN)/morex bench train more more-tuned moe --expert-loads 0.4,0.4,0.1,0.1 --rounds 11 --no-memory \
	  --json benchmarks/results/train-experts-uneven.json
	$(BIN)/morex bench train moe --batch-size 32 --seq-len 128 --rounds 11 --no-memory \
	  --json benchmarks/results/train-experts-moe.json
	$(BIN)/morex bench train more-a more-b more-c mor-act --rounds 5 --no-memory --json benchmarks/results/train-recurrent.json
	$(BIN)/morex bench train more-a more-b more-c moe-one-layer more-a-one-layer more-b-one-layer more-c-one-layer \
	  --batch-size 32 --seq-len 128 --rounds 5 --no-memory --json benchmarks/results/train-recurrent-wide.json
	$(BIN)/morex bench train huginn ouro more-small sandbox-expert sandbox-token --rounds 3 --no-memory \
	  --json benchmarks/results/train-family.json
	$(BIN)/morex bench train more-small --batch-size 16 --rounds 5 --no-memory --json benchmarks/results/train-more-small.json
	$(BIN)/morex bench train more-small --batch-size 32 --rounds 3 --no-memory --json benchmarks/results/train-more-small-wide.json
	$(BIN)/morex bench train moe-base more-a-base more-b-base more-c-base --batch-size 1 --seq-len 512 --steps 1 --rounds 2 \
	  --no-memory --json benchmarks/results/train-base.json
	$(BIN)/morex bench train moe-base more-c-base --batch-size 8 --seq-len 512 --steps 1 --rounds 1 --no-memory \
	  --json benchmarks/results/train-base-wide.json
	$(BIN)/morex bench train more-c-base --batch-size 8 --seq-len 512 --steps 1 --rounds 3 --no-memory \
	  --json benchmarks/results/train-more-c-base.json
	$(BIN)/morex bench train more-a-base --batch-size 8 --seq-len 512 --steps 1 --rounds 2 --no-memory \
	  --json benchmarks/results/train-more-a-base.json
	$(BIN)/morex bench train paper-360m-mor-2 paper-360m-mor-3 paper-360m-mor-4 paper-360m-recursive-3 --batch-size 1 \
	  --seq-len 512 --steps 1 --rounds 2 --no-memory --json benchmarks/results/train-paper-fp32.json
	$(BIN)/morex bench train paper-360m-mor-3 --batch-size 1 --seq-len 512 --steps 1 --rounds 3 --no-memory \
	  --json benchmarks/results/train-paper-mor-3.json
	$(BIN)/morex bench train mor-llm-small --threads 2 --precision bf16 --steps 1 --rounds 3 --no-memory \
	  --json benchmarks/results/train-llm.json
	$(BIN)/morex bench train mor-llm-small --steps 1 --rounds 3 --no-memory --json benchmarks/results/train-llm-fp32.json
	$(BIN)/morex bench train vanilla recursive mor-expert mor-token mor-threshold mor-random mor-llm-small \
	  --threads 2 --precision fp32 --precision bf16 --rounds 3 --no-twins --no-memory \
	  --json benchmarks/results/train-bf16.json
	$(DECODE) --mode depthwise --mode lockstep --mode uniform --concurrency 8 --requests 48 --rounds 3 \
	  --json benchmarks/results/decode-8.json
	$(DECODE) --mode depthwise --mode lockstep --mode uniform --concurrency 32 --requests 96 --rounds 3 \
	  --json benchmarks/results/decode-32.json
	$(DECODE) --mode depthwise --mode lockstep --mode uniform --concurrency 128 --requests 256 --rounds 2 \
	  --json benchmarks/results/decode-128.json
	$(DECODE) --cache-requests 8 --requests 72 --rounds 3 \
	  --json benchmarks/results/decode-memory-8.json
	$(DECODE) --cache-requests 32 --requests 152 --rounds 3 \
	  --json benchmarks/results/decode-memory-32.json
	$(DECODE) --cache-requests 128 --requests 300 --rounds 1 \
	  --json benchmarks/results/decode-memory-128.json
	$(BIN)/python benchmarks/generate_speed.py benchmarks/results/generate-speed.json
	$(BIN)/python benchmarks/recompute.py benchmarks/results/recompute.json
	$(BIN)/python benchmarks/compiled.py benchmarks/results/compiled.json vanilla mor-expert mor-token
	$(BIN)/python benchmarks/loader.py benchmarks/results/loader.json
	$(BIN)/python benchmarks/plan.py benchmarks/results/plan.json
	$(BIN)/python benchmarks/plan.py benchmarks/results/plan-selective.json selective
	$(BIN)/python benchmarks/width_transfer.py --widths 128
	$(BIN)/python benchmarks/width_transfer.py benchmarks/results/width-transfer-small-init.json --widths 128 --init-std 0.02
	$(BIN)/python benchmarks/against_recompute.py benchmarks/results/decode-recompute.json
	$(BIN)/python benchmarks/against_transformers.py benchmarks/results/decode-transformers.json --precision bf16
	$(BIN)/python benchmarks/engine_flips.py benchmarks/results/engine-flips.json
	$(BIN)/python benchmarks/engine_memory.py benchmarks/results/engine-memory.json
	$(BIN)/python benchmarks/startup.py benchmarks/results/startup.json
	$(BIN)/python benchmarks/bf16_flips.py benchmarks/results/bf16-flips.json

docs: $(VENV)/dev.stamp  ## regenerate docs/configuration.md and the figures
	$(BIN)/python docs/generate_configuration.py
	$(BIN)/python docs/figures/one_idea.py
	$(BIN)/python docs/figures/schedules.py
	$(BIN)/python docs/figures/routers.py
	$(BIN)/python docs/figures/experts.py
	$(BIN)/python docs/figures/batching.py

clean:  ## remove the virtual environment and every cache; runs and studies stay
	if [ -f $(VENV)/torch.stamp ]; then rm -rf $(VENV); fi
	rm -rf build dist src/*.egg-info .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and from its own index, so that the second install finds it in place.
$(VENV)/torch.stamp: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "morex needs Python 3.11 or newer; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing torch into $(VENV) ..."
	$(PIP) install --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@touch $@

$(VENV)/%.stamp: pyproject.toml $(VENV)/torch.stamp
	@echo "Installing morex[$*] into $(VENV) ..."
	$(PIP) install --constraint constraints.txt --editable '.[$*]'
	@touch $@ $(if $(filter dev,$*),$(VENV)/demo.stamp)
