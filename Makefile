# The commands of this repository. All run in .venv, which is made from the lock on first use and remade when it changes.
SHELL := /bin/sh
BIN := .venv/bin
CORES ?= all
MINUTES ?= 9
# The Python that .venv is made with: the tested one first. `PYTHON=path` overrides.
PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
  $$python -c "" >/dev/null 2>&1 && echo $$python && break; done)

.DEFAULT_GOAL := help
.PHONY: help demo pin record restore test lint docs bench lock reproduce verify seeds clean-cache clean venv

help: ## say what each target does
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

demo: venv ## run the embedded default and say where its report is (CORES=all)
	@$(BIN)/snakemake --cores $(CORES) --quiet host reason
	@echo "Report: results/report/index.html"

pin: venv ## find the commits of the sources on the hub, for config/sources.lock.yaml (NAME="gsm8k phi-2": of these)
	@$(BIN)/python tools/pin.py $(foreach name,$(NAME),'$(name)')

record: venv ## put the results as they are into DVC's cache and dvc.lock
	@$(BIN)/python tools/record.py

restore: venv ## bring back the results that dvc.lock holds (DISCARD=1: let go of others)
	@$(BIN)/python tools/restore.py $(if $(DISCARD),--discard)

reproduce: venv ## compute HEAD's results anew and compare (CORES=all, REPRODUCE_IN=a new folder)
	@$(BIN)/python tools/reproduce.py --cores $(CORES) $(if $(REPRODUCE_IN),--folder '$(REPRODUCE_IN)')

verify: venv ## check a run's adapter and its sources against their records (RUN=llama)
	@$(BIN)/python tools/verify.py '$(RUN)'

seeds: venv ## repeat the default with three seeds, and write results/seeds.csv, by which `reproduce` judges
	@$(BIN)/snakemake --cores $(CORES) --quiet host reason --configfile config/experiments/seeds.yaml
	@$(BIN)/python tools/seed_spread.py

test: venv ## run the fast tests
	@$(BIN)/pytest -m "not slow" -n 2 --dist loadgroup

lint: venv ## check the style and types of Python and Snakemake files
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/snakefmt --check Snakefile rules
	@$(BIN)/snakemake --lint
	@$(BIN)/mypy

docs: venv ## write docs/config.md from the schema, and the results table of README.md from the metrics
	@$(BIN)/python tools/config_docs.py
	@$(BIN)/python tools/readme_results.py

bench: venv ## measure what this machine can: planning, tokenising, and training on a GPU (MINUTES=9 of it)
	@$(BIN)/python benchmarks/plan_runs.py --runs 100 --repeats 3
	@$(BIN)/python benchmarks/tokenize_rows.py --rows 5000 --repeats 3
	@if nvidia-smi >/dev/null 2>&1; then $(BIN)/python benchmarks/gpu/run.py --minutes $(MINUTES) --out bench.jsonl; \
	else echo "No NVIDIA GPU answers here (nvidia-smi), so benchmarks/gpu is left out."; fi

lock: ## resolve pyproject.toml into the locks and the conda environments (UPGRADE=1: to newest versions)
	@$(PYTHON) tools/lock.py $(if $(UPGRADE),--upgrade)

clean-cache: ## remove checkpoints and the finished runs that are kept for another time
	rm -rf results/finished results/checkpoints

clean: ## remove .venv and caches, and keep results
	rm -rf .venv .venv-install.log .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

venv:
	@$(if $(PYTHON),,echo "No python3 found: Linux x86-64 (glibc) with CPython 3.11 or 3.12 is needed." >&2; exit 2)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 6))' 2>/dev/null || { echo \
	  "PYTHON=$(PYTHON) does not run: Linux x86-64 (glibc) with CPython 3.11 or 3.12 is needed." >&2; exit 2; }
	@$(PYTHON) tools/bootstrap.py
