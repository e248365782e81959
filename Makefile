# Every target sets up what it needs by itself: `.venv` is built from the pinned constraints when it is missing or stale.
PYTHON ?= python3
BIN := .venv/bin

# Benchmarks with bars for a CPU: of the command line, and scripts. One alone: make bench-dense.
COMMANDS := $(addprefix bench-,depthwise mixture memory deform deploy)
SCRIPTS := $(addprefix bench-,startup serving verification dense loading masked pose segmentation detection whole_models)

.PHONY: install demo test slow lint docs package bench $(COMMANDS) $(SCRIPTS) clean

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

# A benchmark that fails does not keep the others from running.
bench: install
	@$(MAKE) --keep-going --no-print-directory $(COMMANDS) $(SCRIPTS); status=$$?; \
	$(BIN)/python benchmarks/bars.py && exit $$status

$(COMMANDS): bench-%: install
	$(BIN)/widefield bench $* --out benchmarks/results

$(SCRIPTS): bench-%: install
	$(BIN)/python benchmarks/$*.py --out benchmarks/results

clean:
	rm -rf .venv site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
