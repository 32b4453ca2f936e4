# make demo: set up, train DiT4SR on this machine for a few minutes, restore photos it never saw.
# make ablation: the paper's Table 3 in miniature, hours.  make tiny: how the weights in the package were made.
# make test, make lint: as CI runs them.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo ablation test lint format tiny

demo: $(VENV)/.done
	$(BIN)/python -m dit4sr_pl.train experiment=demo
	$(BIN)/python -m dit4sr_pl.demo

# Given again, it goes on where it was stopped.
VARIANTS := full,no_lr_integration,no_lr_residual,no_lr_injection,linear_lr_injection
ablation: $(VENV)/.done
	$(BIN)/python -m dit4sr_pl.train -m experiment=ablation +ablation=$(VARIANTS) seed=0,1,2
	$(BIN)/python -m dit4sr_pl.train -m experiment=ablation model=tiny_sd3_controlnet seed=0,1,2
	$(BIN)/python -m dit4sr_pl.compare outputs/ablation output=outputs/ablation/compare strip.hr=outputs/demo/photos/crops

# One thread in each of several processes: two threads that wait for one another cost more than they give.
test: $(VENV)/.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile

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

# The weights in src/dit4sr_pl/weights, from nothing; days. Scripts resume where they were stopped. See docs/tiny.md.
TINY := outputs/tiny
NEW := $(TINY)/base/tiny-sd3
BASE = --photos $(TINY)/photos --pipeline $(SHIPPED)/tiny-sd3 --state $(TINY)/base
MINUTES ?= 600 # of each of the base's two phases
SHIPPED := src/dit4sr_pl/weights
tiny: $(VENV)/.done
	test -d $(TINY)/photos || $(BIN)/python scripts/tiny_photos.py --output $(TINY)/photos
	$(BIN)/python scripts/tiny_vae.py --photos $(TINY)/photos/train --output $(TINY)/vae
	$(BIN)/python scripts/tiny_pipeline.py --vae $(TINY)/vae --output $(SHIPPED)/tiny-sd3
	$(BIN)/python scripts/tiny_base.py $(BASE) --minutes $(MINUTES)
	$(BIN)/python scripts/tiny_base.py $(BASE) --minutes $(MINUTES) --phase decay
	$(BIN)/python scripts/tiny_pairs.py --photos $(TINY)/photos/train --pipeline $(NEW) --output $(TINY)/pairs
	$(BIN)/python -m dit4sr_pl.train experiment=tiny_dit4sr model.backbone.name=$(NEW)
	$(BIN)/python scripts/tiny_release.py --base $(NEW) --trained outputs/tiny_dit4sr/full/seed0/lr_stream.safetensors
	$(BIN)/python benchmarks/tiny.py
