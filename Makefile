# make demo      trains and evaluates on the built-in clips (about 3 minutes on 2 cores)
# make test      runs the tests, in three processes
# make lint      checks style and format
# make figures   runs the notebooks and keeps the key figure of each under assets/
# make pages     writes the notebooks with their outputs as HTML pages into docs/notebooks/
# make docs      builds the site into site/: the documents, the notebooks, the docstrings (environment: .venv-docs)
# make sample    makes assets/tiny_tmass.safetensors, psi and R of the notebooks' model, from the demo's paper run
#
# PYTHON: the first of these that runs; make PYTHON=python3.12 chooses another.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13; do $$p -c '' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

.PHONY: demo demo-paper demo-best test lint figures pages docs sample

demo: .venv/ready
	@echo "1 of 5: mean pooling, the tiny CLIP as it is; the clips are rendered first"
	$(BIN)/python train.py --method clip --epochs 1 --out runs/demo/mean-pooling --resume
	@echo "2 and 3 of 5: X-Pool, the baseline, and T-MASS by the paper's recipe; on another core meanwhile"
	@echo "4 of 5: T-MASS by the best recipe, which tells runs/demo/tmass-best.log how far it is"
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --jobs=2 demo-paper demo-best
	@echo "5 of 5: all four on the test split"
	$(BIN)/python evaluate.py --M 20 --checkpoint $(addprefix runs/demo/,mean-pooling xpool tmass-paper tmass-best)

demo-paper:
	$(BIN)/python train.py --method xpool --out runs/demo/xpool --resume
	$(BIN)/python train.py --out runs/demo/tmass-paper --resume

demo-best: LOG = runs/demo/tmass-best.log
demo-best:
	@$(BIN)/python train.py --recipe best --out runs/demo/tmass-best --resume > $(LOG) 2>&1 || { cat $(LOG); exit 1; }

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

figures: .venv/ready
	TMASS_FIGURES="$(CURDIR)/assets" $(BIN)/python -m jupyter execute notebooks/*.ipynb

pages: .venv/ready
	$(BIN)/python notebooks/pages.py

docs: .venv-docs/ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

sample: .venv/ready
	$(BIN)/python notebooks/sample.py runs/demo/tmass-paper

.venv/ready: requirements.txt requirements-search.txt
	@test -n "$(PYTHON)" || { echo "error: no python3.11, python3.12 or python3.13 found: install one of them."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-search.txt
	touch $@

# The site has an environment of its own: mkdocs imports none of our code, and no plain user needs it.
.venv-docs/ready: requirements-docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $@
