# Requires Python 3.11, make and a package index; installs everything else into .venv.
PYTHON ?= python3.11
BIN := .venv/bin
# The URL of the demo's database; if empty, a SQLite file.
DATABASE_URL ?=
# The number of processes that run tests and simulations; `auto` is the number of cores. EXAMPLES_FACTOR=10
# generates ten times as many examples.
WORKERS ?= auto
# Options of `python -m bench`, such as --quick or --only 1,3.
BENCH ?=
# Options of `python -m tests.chaos`, such as --only postgresql or --ends 10.
CHAOS ?=
# The number of simulations, the first seed, and a fault to plant, or `each`.
SEEDS ?= 1000
START ?= 0
FAULT ?=
# The number of hostile inputs, and their seed.
INPUTS ?= 20000
SEED ?= 0

.PHONY: help setup run test simulate chaos fuzz lint gen bench clean

help: ## Lists the targets.
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## /	/'

setup: .venv/installed ## Installs everything into .venv.

.venv/installed: pyproject.toml clients/python/pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable clients/python --editable '.[dev]'
	touch .venv/installed

run: setup ## Serves demo data on port 8080 (REST and gRPC) and 50051 (gRPC), until Ctrl-C.
	@$(BIN)/daybook up --demo $(if $(DATABASE_URL),--database-url '$(DATABASE_URL)')

test: setup ## Runs all tests and checks.
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

simulate: setup ## Simulates servers with seeded schedules and faults; SEEDS=1 START=7 shows one simulation.
	$(BIN)/python -m tests.simulation --seeds $(SEEDS) --start $(START) $(if $(FAULT),--fault $(FAULT)) $(if $(filter-out auto,$(WORKERS)),--processes $(WORKERS))

lint: setup ## Formats the code and runs the linters.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/mypy
	$(BIN)/lint-imports

gen: setup ## Regenerates gen/, the OpenAPI documents, envoy.yaml and the tables of docs/; ALLOW_BREAKING=1 accepts changes that break clients.
	$(BIN)/python protos/generate.py $(if $(ALLOW_BREAKING),--allow-breaking)
	$(BIN)/python -m docs.openapi
	$(BIN)/python -m server.gateway.configuration
	$(BIN)/python -m docs.generate

bench: setup .venv/installed-bench ## Measures speed and memory; BENCH='--quick' is a short trial. Requires h2load and wrk.
	$(BIN)/python -m bench $(BENCH)

.venv/installed-bench: .venv/installed .ci/constraints-bench.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --constraint .ci/constraints-bench.txt --editable clients/python --editable '.[bench]'
	touch .venv/installed-bench

chaos: setup ## Kills real processes under load and checks the books; CHAOS='--only postgresql' chooses.
	$(BIN)/python -m tests.chaos $(CHAOS)

fuzz: setup ## Sends hostile input to a server and its gateway; INPUTS=1000000 SEED=1 says how much.
	$(BIN)/python -m tests.fuzz --inputs $(INPUTS) --seed $(SEED)

clean: ## Removes .venv, caches and the demo's data.
	rm -rf .venv .daybook .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
