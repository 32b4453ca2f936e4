# make demo: set up, train DiT4SR on this machine for a few minutes, restore photos it never saw.
# make test, make lint: as CI runs them.  make tiny: how the weights in the package were made.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint format tiny

demo: $(VENV)/.done
	$(BIN)/python -m dit4sr_pl.train experiment=demo
	$(BIN)/python -m dit4sr_pl.demo

test: $(VENV)/.done
	$(BIN)/python -m pytest

lint: $(VENV)/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@
