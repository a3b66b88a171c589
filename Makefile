# Needs Python 3.11, make and a package index; everything else is installed into .venv.
PYTHON ?= python3.11
BIN := .venv/bin
# Where the ledger is kept; empty means the demo's own SQLite file.
DATABASE_URL ?=
# Processes that run the tests: as many as cores, or a number. EXAMPLES_FACTOR=10 draws ten times as many examples.
WORKERS ?= auto
# Options of `python -m bench`, like --quick or --only 1,3.
BENCH ?=

.PHONY: help setup run test lint gen bench clean

help: ## Shows what there is to make.
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## /	/'

setup: .venv/installed ## Installs everything into .venv.

.venv/installed: pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable '.[dev]'
	touch .venv/installed

run: setup ## Serves demo data on port 8080 (REST and gRPC) and 50051 (gRPC), until Ctrl-C.
	@$(BIN)/daybook up --demo $(if $(DATABASE_URL),--database-url '$(DATABASE_URL)')

test: setup ## Runs every test and every check.
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

lint: setup ## Formats the code and runs the linters.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/mypy
	$(BIN)/lint-imports

gen: setup ## Regenerates gen/, envoy.yaml and the tables of docs/; ALLOW_BREAKING=1 lets a change break clients.
	$(BIN)/python protos/generate.py $(if $(ALLOW_BREAKING),--allow-breaking)
	$(BIN)/python -m server.gateway.configuration
	$(BIN)/python -m docs.generate

bench: setup .venv/installed-bench ## Measures speed and memory; BENCH='--quick' only tries it. Needs h2load and wrk.
	$(BIN)/python -m bench $(BENCH)

.venv/installed-bench: .venv/installed .ci/constraints-bench.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --constraint .ci/constraints-bench.txt --editable '.[bench]'
	touch .venv/installed-bench

clean: ## Removes what was installed, cached and stored for the demo.
	rm -rf .venv .daybook .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
