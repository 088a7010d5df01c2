.DEFAULT_GOAL := help
.PHONY: help train test test-fast faults bench cluster docs lint format clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Workers of pytest-xdist: one per core, because the tests pin torch to one thread.
TEST_WORKERS ?= 2

help: ## Show this help.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

train: $(VENV)/run.stamp ## Train the default model on the text of the standard library (about two minutes).
	$(BIN)/lunaris train

test: lint ## Run all checks and tests; those that need SLURM skip where `make cluster` was not run.
	OMP_NUM_THREADS=1 $(BIN)/pytest -m cluster
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not cluster" -n $(TEST_WORKERS) --dist loadfile

test-fast: $(VENV)/dev.stamp ## Run the unit tests only, in under two minutes.
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow and not cluster" --ignore tests/e2e \
		-n $(TEST_WORKERS) --dist loadfile

faults: $(VENV)/dev.stamp ## Run the long form of the fault tests and print how many tries each made (hours).
	LUNARIS_FAULTS=long OMP_NUM_THREADS=1 $(BIN)/pytest tests/faults tests/slurm/test_preemptions.py --timeout 0 \
		-n $(TEST_WORKERS)

bench: $(VENV)/dev.stamp ## Print ratios of speed to references, in a few minutes on a quiet machine.
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/against.py --rounds 3
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/experts.py --experts 64 --tokens 2048 --rounds 3
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/guard.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/loader.py

cluster: ## Install SLURM from Debian's packages for the cluster tests (root).
	bash tests/slurm/install.sh

docs: $(VENV)/docs.stamp ## Build the site of the documentation into build/site, links checked.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict -f docs/site/mkdocs.yml

lint: $(VENV)/dev.stamp ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp ## Format the code.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the virtual environment and caches.
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache *.egg-info

$(VENV)/run.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing torch and what else lunaris needs into $(VENV): minutes, without a word"
	$(BIN)/pip install --disable-pip-version-check --progress-bar off -q -e .
	touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(BIN)/pip install --disable-pip-version-check --progress-bar off -q -e '.[dev,hf]'
	touch $@

$(VENV)/docs.stamp: $(VENV)/run.stamp
	$(BIN)/pip install --disable-pip-version-check --progress-bar off -q -e '.[docs]'
	touch $@
