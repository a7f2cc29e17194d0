# The environment lives in .venv and is made when it is missing or older than pyproject.toml or constraints.txt.
PYTHON ?= $(shell python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null || echo python3)
BIN := .venv/bin
READY := .venv/ready
RUN := $(BIN)/python notebooks/run.py

.PHONY: help notebooks refresh figures table tiny lab test test-browser lint clean

help: ## Say what there is to make
	@echo 'Usage: make TARGET'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

notebooks: $(READY) ## Execute copies of all notebooks into build/ (ONLY=00: that one; FRESH=1: measure all anew)
	@$(if $(FRESH),rm -rf build/results)
	@$(if $(FRESH),SCLIP_RESULTS=build/results )$(RUN) notebooks/$(ONLY)*.ipynb

refresh: $(READY) ## Execute the notebooks and renew the committed ones (FRESH=1: and the stored results of theirs)
	@$(if $(FRESH),rm -rf $(foreach kind,parquet safetensors pieces,data/results/$(or $(ONLY),[0-9])*.$(kind)))
	@$(RUN) --refresh notebooks/$(ONLY)*.ipynb

figures: notebooks ## Draw figures/ anew, which the notebooks do, and list them
	@ls -l figures

table: $(READY) ## Print the table of README, measured on the bundled model
	@$(BIN)/python benchmarks/bundled.py

# glibc gives large blocks back to the system after every step, and taking them again costs as much as the arithmetic
tiny: $(READY) ## Train the bundled model again (an hour and a half on two cores; resumes when interrupted)
	@MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 $(BIN)/python -m sclip_lab.train_tiny

lab: $(READY) ## Open the notebooks in JupyterLab
	$(BIN)/python -m jupyterlab notebooks

test: $(READY) ## Run the tests (ARGS='-k attention' selects)
	@$(BIN)/python -m pytest -q --durations=10 --numprocesses 2 --dist loadfile $(ARGS)

test-browser: $(READY) ## Click through the explorer in Chromium (installs it and Playwright, where it may)
	@$(BIN)/python -c 'import playwright' 2>/dev/null || $(BIN)/python -m uv pip install --quiet \
	  --python $(BIN)/python --constraint constraints.txt --editable '.[browser]'
	@command -v chromium || command -v chromium-browser || command -v google-chrome \
	  || { apt-get update -qq && apt-get install --yes -qq chromium >/dev/null; } 2>/dev/null \
	  || { echo 'No chromium or google-chrome on the PATH: install one (as root: apt-get install chromium)'; exit 1; }
	@$(BIN)/python -m pytest -q -s -m browser tests/test_browser.py

lint: $(READY) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## Remove build/ and the tools' caches (the environment stays)
	rm -rf build .pytest_cache .ruff_cache .mypy_cache
	find sclip_lab notebooks tests -name __pycache__ -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit( \
	  f"$(PYTHON) is Python {v[0]}.{v[1]}, expected 3.11 or newer: make PYTHON=/path/to/python3.11")'
	@echo 'Making the environment in .venv (about half a minute) ...'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	@$(BIN)/python -m uv pip install --quiet --python $(BIN)/python --compile-bytecode \
	  --constraint constraints.txt --editable '.[dev]'
	@touch $@
