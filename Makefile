# make demo: set up, train DiT4SR on this machine for a few minutes, restore photos it never saw.
# make ablation: the paper's Table 3 in miniature, hours.  make tiny: how the weights in the package were made.
# make quick: the tests of the inner loop.  make test, make lint: as CI runs them.  make lock: newer dependencies.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
unexport PYTHONDONTWRITEBYTECODE# without compiled files the tests take a third longer

.PHONY: demo announce ablation test quick lint format lock tiny

demo: announce $(VENV)/.done
	$(BIN)/python -m dit4sr_pl.train experiment=demo
	$(BIN)/python -m dit4sr_pl.demo

announce:
	@echo "1. Set-up of $(VENV), the first time only: minutes, most of them downloads."
	@echo "2. Training of an LR stream on 8 photos: 5 to 8 minutes on two cores. Stopped, the same command resumes it."
	@echo "3. Restoring of 6 other photos with it and with the LR stream in the package: about a minute."
	@echo "Then outputs/demo/ holds comparison.png, scores.md, and the run with its TensorBoard log in full/seed0/."

# Photos are fetched and encoded the first time only. Given again, it resumes where it was stopped.
VARIANTS := full,no_lr_integration,no_lr_residual,no_lr_injection,linear_lr_injection
CROPS := outputs/demo/photos/crops
SQUARES := --side 128 --degradations light:0.75 medium:0.25
ablation: $(VENV)/.done
	test -d $(TINY)/photos || $(BIN)/python scripts/tiny_photos.py --output $(TINY)/photos
	$(BIN)/python scripts/tiny_pairs.py $(SQUARES) --photos $(TINY)/photos/train --pipeline $(SHIPPED)/tiny-sd3 \
		--output $(TINY)/squares
	$(BIN)/python -c "from dit4sr_pl.data.demo_photos import write_crops; write_crops('$(CROPS)')"
	$(BIN)/python -m dit4sr_pl.train -m experiment=ablation +ablation=$(VARIANTS) seed=0,1,2
	$(BIN)/python -m dit4sr_pl.train -m experiment=ablation model=tiny_sd3_controlnet seed=0,1,2
	$(BIN)/python -m dit4sr_pl.compare outputs/ablation output=outputs/ablation/compare strip.hr=$(CROPS)
	$(BIN)/python scripts/ablation_figures.py outputs/ablation

# One thread in each of several processes: two threads that wait for one another cost more than they give. The files keep
# the order of tests/conftest.py, long ones first.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# One process more than cores, since tests of SLURM, of browsers and of killed runs mostly wait.
PROCESSES := $(shell echo $$(( $$(getconf _NPROCESSORS_ONLN) + 1 )))
test: $(VENV)/.done
	$(PYTEST) --numprocesses $(PROCESSES)

quick: $(VENV)/.done
	$(PYTEST) --numprocesses logical -m "not slow"

lint: $(VENV)/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Every package in the version of requirements.lock, with which the tests have passed.
$(VENV)/.done: pyproject.toml requirements.lock
	@echo "Installing packages into $(VENV); nothing more is shown until that is done."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable ".[dev]"
	touch $@

# The newest versions that pyproject.toml allows, installed in a new environment and written down; then run the tests.
lock:
	rm -rf $(VENV)-lock
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-lock/bin/python -m pip install --quiet --editable ".[dev]"
	$(VENV)-lock/bin/python -m pip freeze --exclude-editable > requirements.lock
	rm -rf $(VENV)-lock

# The weights in src/dit4sr_pl/assets, from nothing; takes days on two cores. Scripts resume where they were stopped.
# docs/tiny.md explains the steps, and how to take them on a GPU.
TINY := outputs/tiny
SHIPPED := src/dit4sr_pl/assets
NEW := $(TINY)/base/tiny-sd3
STUDENT := student/seed0/lr_stream.safetensors
BASE = --photos $(TINY)/photos --pipeline $(SHIPPED)/tiny-sd3 --state $(TINY)/base --minutes $(MINUTES)
MINUTES ?= 600# of each of the base's two phases
tiny: $(VENV)/.done
	test -d $(TINY)/photos || $(BIN)/python scripts/tiny_photos.py --output $(TINY)/photos
	$(BIN)/python scripts/tiny_vae.py --photos $(TINY)/photos/train --output $(TINY)/vae
	$(BIN)/python scripts/tiny_pipeline.py --vae $(TINY)/vae --output $(SHIPPED)/tiny-sd3
	$(BIN)/python scripts/tiny_base.py $(BASE)
	$(BIN)/python scripts/tiny_base.py $(BASE) --phase decay
	$(BIN)/python scripts/tiny_pairs.py --photos $(TINY)/photos/train --pipeline $(NEW) --output $(TINY)/pairs
	$(BIN)/python -m dit4sr_pl.train experiment=tiny_dit4sr model.backbone.name=$(NEW)
	$(BIN)/python scripts/tiny_release.py --base $(NEW) --trained outputs/tiny_dit4sr/full/seed0/lr_stream.safetensors
	$(BIN)/python -m dit4sr_pl.train experiment=tiny_student_4
	$(BIN)/python scripts/tiny_release.py --trained outputs/tiny_student_4/$(STUDENT) --output $(SHIPPED)/tiny-student-4
	$(BIN)/python -m dit4sr_pl.train experiment=tiny_student_1
	$(BIN)/python scripts/tiny_release.py --trained outputs/tiny_student_1/$(STUDENT) --output $(SHIPPED)/tiny-student-1
	$(BIN)/python benchmarks/tiny.py
	$(BIN)/python benchmarks/students.py --students tiny-student-4 tiny-student-1
