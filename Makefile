# `make help` lists the targets. Everything runs in .venv, which is made where it is missing or old.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
UV_VERSION := 0.13.9

SCALE ?= demo
NOTEBOOKS ?= cache
MINUTES ?= 45
GPU_PYTHON ?= 3.12
# What figures, tables and the explorer are made of.
DRAWN_BY := $(filter-out %/__pycache__,$(wildcard scripts/plot.py scripts/tables.py scripts/explorer.py \
	experiments/toy.py pwd/pnorm_decay/*.py pwd/pnorm_decay/figures/*)) $(READY)
DRAWN_FROM = $(wildcard $(foreach scale,demo cpu wide paper,results/$(scale)/*.csv \
	results/$(scale)/weights/*.csv) results/bench/*.csv)
DRAWN := results/figures/.drawn

# Every process of a sweep and of the tests would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup lock data sweep figures explorer verify reproduce-figures gpu gpu-bundle bench bench-optimizer bench-training bench-sweep bench-files bench-compact bench-inference dashboard dashboard-online sync soak test test-slow test-ray test-wheel notebooks run-notebooks docs lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## build .venv from requirements.lock and install the package into it

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	VIRTUAL_ENV=.venv $(BIN)/uv pip install --quiet --compile-bytecode -r requirements.lock
	VIRTUAL_ENV=.venv $(BIN)/uv pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

lock: $(READY) ## pin again what pyproject.toml asks for, into requirements.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --no-header \
		--upgrade --extra experiments --extra dev --extra docs pyproject.toml -o requirements.lock

data: $(READY) ## fetch CIFAR-10 and Tiny Shakespeare into data/
	$(BIN)/python scripts/download_data.py

sweep: $(READY) ## run what is missing of the SCALE sweeps (demo, cpu or paper) and record it
	$(BIN)/python experiments/sweep.py $(SCALE) --record

figures: $(READY) ## draw every figure and table from results/*/*.csv
	$(BIN)/python experiments/toy.py
	$(BIN)/python scripts/plot.py
	$(BIN)/python scripts/tables.py

reproduce-figures: sweep ## the main job: sweep, then what is out of date of the figures (SCALE=demo, cpu or paper)
	@$(MAKE) -s --no-print-directory $(DRAWN) # anew, for the sweep has written what it depends on
	@test -e results/explorer.html || $(MAKE) -s --no-print-directory explorer
	@echo "Figures are in results/figures, tables in results/tables, all runs in results/explorer.html"

$(DRAWN): $(DRAWN_FROM) $(DRAWN_BY)
	@$(MAKE) -s --no-print-directory figures explorer
	@touch $@

explorer: $(READY) ## write results/explorer.html: all recorded runs, to choose from and to look at
	$(BIN)/python scripts/explorer.py

verify: $(READY) ## train one recorded run of each experiment again and compare it with its record
	$(BIN)/python scripts/verify.py

# With the Python that is there: a machine with a GPU often brings torch, and has no network.
gpu: ## spend MINUTES on a GPU: tests, benchmarks, the paper's runs; again, and it goes on
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,python3) scripts/gpu.py --minutes $(MINUTES)

gpu-bundle: $(READY) ## pack wheels (for Python GPU_PYTHON), code and data for a GPU machine without a network
	$(BIN)/python scripts/gpu_bundle.py --python $(GPU_PYTHON)

bench: bench-optimizer bench-training bench-sweep bench-files bench-inference ## run every benchmark that needs no runs, alone on the machine

bench-optimizer: $(READY) ## time the optimizers against fused AdamW, into results/bench/optimizer.csv
	$(BIN)/python scripts/bench_optimizer.py

bench-training: $(READY) ## time the trainer against a straightforward loop, into results/bench/training.csv
	$(BIN)/python scripts/bench_training.py

bench-sweep: $(READY) ## measure a sweep's runs per hour, into results/bench/sweep.csv
	$(BIN)/python scripts/bench_sweep.py

bench-files: $(READY) ## measure sparse networks as files, into results/bench/sparse_files.csv
	$(BIN)/python scripts/bench_files.py

bench-compact: $(READY) ## measure what compact leaves of the sparse networks in runs/, into results/bench/compact.csv
	$(BIN)/python scripts/bench_compact.py


bench-inference: $(READY) ## time inference without the zeros, into results/bench/inference.csv
	$(BIN)/python scripts/bench_inference.py

dashboard: $(READY) ## browse the offline W&B runs in the terminal
	@test -d runs/wandb || { echo "no runs yet: make reproduce-figures makes some"; exit 1; }
	$(BIN)/wandb leet runs/wandb

sync: $(READY) ## upload the offline W&B runs to a W&B server (after .venv/bin/wandb login)
	$(BIN)/wandb sync runs/wandb/offline-run-*

dashboard-online: $(READY) ## save a W&B workspace of the runs (ENTITY=... and PROJECT=..., after make sync)
	$(BIN)/python scripts/dashboard.py $(if $(ENTITY),--entity $(ENTITY)) $(if $(PROJECT),--project $(PROJECT))

soak: $(READY) ## kill and resume a run fifty times, and compare the bits (several minutes)
	$(BIN)/python scripts/soak.py

test: $(READY) ## run the tests
	$(BIN)/python -m pytest

test-slow: $(READY) ## run the tests that take long: killed runs, several processes, notebooks, clusters, scripts/gpu.py
	$(BIN)/python -m pytest -m slow

test-ray: $(READY) ## run the tests of the cluster launchers, with Ray, which .venv then holds as well
	VIRTUAL_ENV=.venv $(BIN)/uv pip install --quiet hydra-ray-launcher
	$(BIN)/python -m pytest -n 0 -m slow tests/end_to_end/test_clusters.py

test-wheel: $(READY) ## build the wheel, try it with the oldest and the newest Python and torch (gigabytes; UV_TORCH_BACKEND=cpu: less)
	$(BIN)/python scripts/try_wheel.py

notebooks: $(READY) ## open the notebooks in JupyterLab, which .venv then holds as well
	VIRTUAL_ENV=.venv $(BIN)/uv pip install --quiet jupyterlab
	$(BIN)/jupyter lab notebooks

run-notebooks: $(READY) ## run the notebooks and keep their outputs in the files
	$(BIN)/python scripts/run_notebooks.py

docs: $(READY) ## build the site into docs/_build/html after running its code (NOTEBOOKS=off: not theirs)
	$(BIN)/python -m pytest -q tests/test_docs.py
	NOTEBOOKS=$(NOTEBOOKS) $(BIN)/sphinx-build -q -W --keep-going -d docs/_build/doctrees docs docs/_build/html
	@echo "The site is in docs/_build/html/index.html"

lint: $(READY) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove .venv and caches; runs/, data/ and results/ stay
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis pwd/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
