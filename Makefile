# Everything happens in .venv, made with pip from constraints.txt; nothing else is needed beforehand.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile --max-worker-restart 0
export ELEGANS_CACHE ?= $(CURDIR)/.cache/jax

.PHONY: demo test test-all lint bench clean

demo: .venv/demo
	$(BIN)/elegans run carry --store runs/carry

test: .venv/dev
	JAX_PLATFORMS=cpu $(PYTEST)

test-all: .venv/dev .venv/bench
	JAX_PLATFORMS=cpu XLA_FLAGS= $(PYTEST) -m "slow or not slow" --timeout 1800 -o faulthandler_timeout=1790 --durations 15

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/bench
	$(BIN)/python benchmarks/peers.py --preset auto

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "elegans needs Python 3.11 or newer: make PYTHON=python3.12 demo")'
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

.venv/dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@ .venv/demo

.venv/bench: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench]'
	touch $@

clean:
	rm -rf .venv .cache
