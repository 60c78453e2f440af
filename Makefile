# Everything runs from a virtual environment in .venv, made on first use and updated when pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart test slow soak lint format bench study-small study-gpu clean

# A mixture and a single model on two data sets where randomising can gain, and on one where it cannot.
quickstart: $(STAMP)
	$(BIN)/python run.py -m experiment=triangle,averaged_digits,quickstart name=quickstart logger=none
	$(BIN)/python run.py task=report runs=outputs/sweeps/quickstart

# One thread for each process: two that share the cores would wait for each other.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# Kills and signals at random moments, checkpoints half written, thousands of cycles: about half an hour.
soak: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py
	$(BIN)/python -m pytest -m slow tests/test_ddp.py tests/test_sweeps.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Most of an hour on two cores; more with the benchmarks' own settings (see benchmarks/README.md).
bench: $(STAMP)
	$(BIN)/python benchmarks/pgd.py --models preact_resnet20 small_resnet --batches 64 --repeats 3
	$(BIN)/python benchmarks/apgd.py
	$(BIN)/python benchmarks/epoch.py --models small_resnet --batch-sizes 64
	$(BIN)/python benchmarks/scaling.py --quick
	$(BIN)/python benchmarks/data_path.py --quick
	$(BIN)/python benchmarks/ddp.py --quick
	$(BIN)/python benchmarks/startup.py --repeats 3
	$(BIN)/python benchmarks/variants.py --models small_resnet
	$(BIN)/python benchmarks/gpu.py
	$(BIN)/python benchmarks/games.py --repeats 1 --full-limit 20
	$(BIN)/python benchmarks/attacks.py
	$(BIN)/python benchmarks/many_members.py
	$(BIN)/python benchmarks/wandb_overhead.py --epochs 10 --repeats 2

# Does the mixture pay? One command each, continued by the same command; tables and figures end in results/.
# make study-small WITH=data=cifar10_jpeg
study-small: $(STAMP)
	PYTHON=$(BIN)/python WORKERS=$${WORKERS:-2} studies/small.sh $(WITH)

study-gpu: $(STAMP)
	PYTHON=$(BIN)/python studies/gpu.sh $(WITH)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo 'mixadv needs Python 3.10 or newer: make PYTHON=python3.11 ...' >&2; exit 1; }
	@echo 'Installing into $(VENV): PyTorch with CUDA, several GB, minutes'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev,parallel,slurm]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
