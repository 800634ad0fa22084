# Everything runs in .venv, which these targets make by themselves.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help run test test-unit check docs reference chaos clean

help:  ## What there is to make.
	@sed -n 's/^\([a-z-]*\):.*##/\1:/p' Makefile

run: $(INSTALLED)  ## The quickstart: real text from this installation, seed, experts, baseline, verdict.
	$(BIN)/btm quickstart
	$(BIN)/btm run quickstart.yaml

# Most of a test's time here is waiting for processes to start, so more of them than cores.
TESTS_AT_ONCE ?= 3
test: $(INSTALLED)  ## All tests.
	$(BIN)/python -m pytest -n $(TESTS_AT_ONCE) --dist loadscope --no-loadscope-reorder

test-unit: $(INSTALLED)  ## The pure tests: no process, no pipeline, in about a minute.
	$(BIN)/python -m pytest -n 2 tests/unit

check: $(INSTALLED)  ## Style, types and the direction of imports.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(INSTALLED)  ## The documentation's site, in site/: strict, without a network.
	$(BIN)/python -m zensical build --strict --clean

reference: $(INSTALLED)  ## The pages of docs/reference/ that the code itself says.
	$(BIN)/python tools/reference.py

SEEDS ?= 10
chaos: $(INSTALLED)  ## The long campaign of faults: make chaos SEEDS=100
	$(BIN)/python -m tests.faults.campaign --seeds $(SEEDS)

# pip would compile with one core. Some packages have files for other Pythons, which do not compile.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true
	touch $@

clean:  ## Removes .venv and what was built.
	rm -rf .venv build site *.egg-info
