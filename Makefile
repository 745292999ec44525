# `make train` and `make test` each work on a fresh machine with nothing but Python >= 3.11 and make.
# A setting may be given on the command line: make train ARGS="model=unet_small data.image_size=96"

# The first interpreter that pyproject.toml's requires-python accepts.
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11 python; do \
	$$name -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$name && break; done)
VENV   ?= .venv
ARGS   ?=
# One process per core with one thread each: two processes with two threads each slow one another 10 to 60 times.
WORKERS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1)
STAMP  := $(VENV)/.installed-detseg
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup train test check format bench notebooks wheel clean

help: ## show what can be made
	@grep -hE '^[a-z]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## create .venv and install the package with every pinned dependency

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { python="$(PYTHON)"; test -n "$$python" && $$python -m venv $(VENV); } || \
		{ echo "detseg needs Python 3.11, 3.12 or 3.13 with venv. Try: make setup PYTHON=/path/to/python3.12"; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	@touch $@

train: $(STAMP) ## train the default experiment; ARGS="model=... data=..." changes it
	$(BIN)/detseg train $(ARGS)

test: $(STAMP) ## run every test that needs no GPU, on all cores; ARGS="-k anchors" chooses
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n $(WORKERS) --dist worksteal $(ARGS)

check: $(STAMP) ## format, lint and types, without changing a file
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP) ## format the code and mend what the linter can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## print the speed tables of benchmarks/ (minutes; leave the machine alone meanwhile)
	@for script in $(sort $(filter-out benchmarks/learning.py,$(wildcard benchmarks/*.py))); do \
		echo "== $$script"; $(BIN)/python $$script || exit 1; done
	@echo "benchmarks/learning.py trains every experiment (hours): $(BIN)/python benchmarks/learning.py"

notebooks: $(STAMP) ## execute every notebook in place
	@for notebook in $(wildcard notebooks/*.ipynb); do \
		$(BIN)/jupyter execute --inplace $$notebook || exit 1; done

wheel: $(STAMP) ## build the wheel into dist/
	$(BIN)/python -m build --wheel --no-isolation

clean: ## remove what was built and cached; runs/ and .venv stay
	rm -rf build dist src/*.egg-info *.egg-info .mypy_cache .ruff_cache .pytest_cache .cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
