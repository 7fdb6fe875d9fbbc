# Two commands do everything: `make demo` and `make test`. Both set up .venv first.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
XVFB := xvfb-run -a -s "-screen 0 1400x900x24"

.PHONY: demo test check setup system screenshots clean

demo: setup
	$(BIN)/brainmvp demo --out demo

test: setup check
	OMP_NUM_THREADS=1 QT_QPA_PLATFORM=xcb $(XVFB) .ci/run-tests $(BIN)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/npe2 validate napari.yaml

screenshots: setup
	QT_QPA_PLATFORM=xcb $(XVFB) $(BIN)/python docs/make_screenshots.py

setup: system $(READY)

# A Python package set that is installed once and again when its description changes.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable ".[dev]"
	touch $(READY)

# The Debian libraries Qt and OpenGL need: installed where missing and we may, else named.
system:
	@bash .ci/system-packages

clean:
	rm -rf .venv demo build dist
