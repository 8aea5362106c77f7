# make demo   trains and evaluates everything on the built-in clips (about 7 minutes on 2 cores)
# make test   runs the tests
# make lint   checks style and format
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test lint notebooks

demo: .venv/ready
	$(BIN)/python train.py --method clip --out runs/shapes-tiny-clip --resume
	$(BIN)/python train.py --method xpool --out runs/shapes-tiny-xpool --resume
	$(BIN)/python train.py --method tmass --out runs/shapes-tiny-tmass --resume
	$(BIN)/python evaluate.py --M 20 --checkpoint runs/shapes-tiny-clip runs/shapes-tiny-xpool runs/shapes-tiny-tmass

test: .venv/ready
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/ready: requirements.txt requirements-search.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-search.txt
	touch $@
