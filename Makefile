PYTHON ?= python3
BIN := .venv/bin
URL := $(or $(DATABASE_URL),$(shell sed -n "s/^[[:space:]]*\(export[[:space:]]*\)*DATABASE_URL[[:space:]]*=[[:space:]]*//p" .env 2>/dev/null))
POSTGRES := $(filter postgres% "postgres% 'postgres%,$(firstword $(URL)))

.PHONY: install run test test-fast lint bench

install: .venv/.installed

.venv/.installed: requirements.txt requirements-postgres.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

run: .venv/.run $(if $(POSTGRES),.venv/.postgres)
	$(BIN)/python manage.py migrate up
	exec $(BIN)/python app.py

.venv/.run: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/.postgres: .venv/.run requirements-postgres.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-postgres.txt
	touch $@

test: install
	$(BIN)/python -m pytest -n auto --dist worksteal --cov --cov-report=term

test-fast: install  # what needs no PostgreSQL and breaks nothing: in half a minute
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not postgres and not faults"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python -m benchmarks
