# make demo   a trained model answers questions about a long video, with its cache outside the device
# make test   the whole test suite; make test-quick   two minutes of it, while editing
# make lint   format, lint and type checks; make constraints   update constraints.txt
# make package   sdist and wheel in dist/, tested in a new environment; make docs   the site in build/site
# make quality   accuracy of each policy, on two trained models; takes hours
# make gpu       everything that needs a card; make test-gpu   only its tests; make gpu-wheels   for a card without an index
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PIP    := $(BIN)/python -m pip --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-quick constraints lint docs format package package-quick train quality gpu gpu-wheels test-gpu clean

help:
	@sed -n '1,6s/^# //p' Makefile

setup: $(READY)

# pip's messages when the index lacks a version of constraints.txt, or other constraints of this machine exclude it.
NOT_SERVED := No matching distribution|ResolutionImpossible|conflicting dependencies

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "tieredkv needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V). Set PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade "pip>=24"
	@$(PIP) install --no-compile -e ".[dev]" -c constraints.txt 2> $(VENV)/pip.log || { \
		grep -qE "$(NOT_SERVED)" $(VENV)/pip.log || { cat $(VENV)/pip.log >&2; exit 2; }; \
		echo "The package index does not serve every version in constraints.txt: installing the newest versions instead." >&2; \
		$(PIP) install --no-compile -e ".[dev]"; }
	@touch $(READY)

demo: $(READY)
	$(BIN)/tieredkv demo

test: $(READY)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-quick: $(READY)
	$(BIN)/python -m pytest -q -m "not (slow or model or subprocess or threads or interpreter or setups or files or browser)"

constraints: $(READY)
	$(BIN)/python .ci/versions.py constraints

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs: $(READY)
	$(BIN)/mkdocs build --strict

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

package: $(READY)  # installs torch again, several GB
	$(BIN)/python .ci/package.py

package-quick: $(READY)
	$(BIN)/python .ci/package.py --quick

train: $(READY)
	$(BIN)/python -m tieredkv.tiny.train

quality: $(READY)
	$(PIP) install -e ".[quality,plot]"
	$(BIN)/python benchmarks/models.py
	$(BIN)/python benchmarks/quality.py

gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py

test-gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py --only tests

# What a machine with torch and transformers may lack. With `av` in WHEELS (36 MB) it can read video files, too.
WHEELS ?= psutil num2words
WHEELS_PYTHON ?= 3.12
PLATFORMS := 2_28 2_27 2_17 2_12 2_5

gpu-wheels: $(READY)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
		--python-version $(WHEELS_PYTHON) --implementation cp $(PLATFORMS:%=--platform manylinux_%_x86_64) \
		-d .gpu-wheels -c constraints.txt $(WHEELS)
	@ls -s --block-size=KiB .gpu-wheels

clean:
	rm -rf $(VENV) build dist *.egg-info
