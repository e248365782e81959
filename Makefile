# Every target sets up what it needs by itself: `.venv` is built from the pinned constraints when it is missing or stale.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test slow lint docs package bench clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,docs]"
	touch $@

demo: install
	$(BIN)/widefield demo

test: install
	$(BIN)/python -m pytest -m "not slow"

slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	$(BIN)/mkdocs build --strict

package: install
	$(BIN)/python -m pytest tests/test_package.py

bench: install
	$(BIN)/widefield bench depthwise --out benchmarks/results
	$(BIN)/widefield bench mixture --out benchmarks/results
	$(BIN)/widefield bench memory --out benchmarks/results

clean:
	rm -rf .venv site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
