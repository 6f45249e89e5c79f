# Start with `make demo` and `make test`. The other targets are for changing the code.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
TWO = -n 2 --dist loadfile  # two test files at a time; each starts its own servers
TWO_TESTS = -n 2 --dist worksteal  # the slow tests are few, and some take minutes
export PREFECT_SERVER_ANALYTICS_ENABLED = false
export DO_NOT_TRACK = 1
export NO_MKDOCS_2_WARNING = 1
export PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS = 180

.PHONY: demo text test test-slow test-server lint docs bench

demo: $(READY)  ## run the image example; its run is kept in runs/images
	$(BIN)/python -m examples.images.run

text: $(READY)  ## run the text example; its run is kept in runs/text
	$(BIN)/python -m examples.text.run

test: $(READY)  ## run the quick tests, and print how much of the package they cover
	$(BIN)/python -m pytest $(TWO) --cov

test-slow: $(READY)  ## run the slow tests: whole examples, real servers
	$(BIN)/python -m pytest $(TWO_TESTS) -m slow

test-server: $(READY)  ## run the tests with a Prefect server, workers, Dask and Ray (minutes)
	$(BIN)/python -m pytest -m server

lint: $(READY)  ## check format, lint, types and the import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)  ## build the documentation site into site/
	$(BIN)/mkdocs build --strict --quiet

bench: $(READY)  ## run the benchmarks behind the numbers in the README
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.fidelity
	$(BIN)/python -m benchmarks.lds
	$(BIN)/python -m benchmarks.cost
	$(BIN)/python -m benchmarks.images
	$(BIN)/python -m benchmarks.pruning
	$(BIN)/python -m benchmarks.windows
	$(BIN)/python -m benchmarks.selection
	$(BIN)/python -m benchmarks.kills
	$(BIN)/python -m benchmarks.ranks
	$(BIN)/python -m benchmarks.faults
	$(BIN)/python -m benchmarks.fuzz
	$(BIN)/python -m benchmarks.rewrite
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.workers
	$(BIN)/python -m benchmarks.load
	$(BIN)/python -m benchmarks.outages

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e ".[examples,bench,dev]"
	touch $@
