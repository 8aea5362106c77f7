# make demo   trains and evaluates everything on the built-in clips (about 10 minutes on 2 cores)
# make test   runs the tests, in two processes
# make lint   checks style and format
# make figures   runs the notebooks and keeps the key figure of each under assets/
# make sample    makes assets/tiny.npz, the trained model that the notebooks use, from the paper's T-MASS of make demo
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test lint figures sample

demo: .venv/ready
	$(BIN)/python train.py --method clip --out runs/shapes-tiny-clip --resume
	$(BIN)/python train.py --method xpool --out runs/shapes-tiny-xpool --resume
	$(BIN)/python train.py --recipe paper --out runs/shapes-tiny-tmass-paper --resume
	$(BIN)/python train.py --recipe best --out runs/shapes-tiny-tmass-best --resume
	$(BIN)/python evaluate.py --M 20 --checkpoint $(addprefix runs/shapes-tiny-,clip xpool tmass-paper tmass-best)

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

figures: .venv/ready
	TMASS_FIGURES="$(CURDIR)/assets" $(BIN)/python -m jupyter execute notebooks/*.ipynb

sample: .venv/ready
	$(BIN)/python notebooks/sample.py runs/shapes-tiny-tmass-paper

.venv/ready: requirements.txt requirements-search.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-search.txt
	touch $@
