# Two commands do everything: `make report` and `make test`. Each makes .venv first, from requirements.txt.
# Any command takes PYTHON=python3.12, the Python that .venv is made with, and TORCH_INDEX=URL, the package index that torch
# and torchvision are taken from while .venv is made: their CPU builds need a fifth of the space.

PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
NBVAL  := FWDLIB_QUICK=1 $(RUN) -m pytest -n 2 --dist loadfile -o addopts=--nbval-cell-timeout=120 --nbval-lax
SITE   := build/site
ZOO    := build/zoo
LOWEST := .venv-lowest
PIP    := $(RUN) -m pip --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help report page publish site evidence bench test test-all test-lowest test-zoo test-browser drill lint format notebooks wheel lab clean

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	@echo "Setting up $(VENV), once: about two minutes, and 6 GB with torch's usual build."
	@$(PYTHON) -m venv $(VENV)
ifdef TORCH_INDEX
	@PIP_EXTRA_INDEX_URL=$(TORCH_INDEX) $(PIP) install --no-deps --index-url $(TORCH_INDEX) $$(grep -oE '^torch(vision)?>=[0-9.]+' requirements.txt)
	@$(PIP) freeze | grep -E '^torch(vision)?==' > $(VENV)/torch.txt
	@$(PIP) install --requirement requirements.txt --constraint $(VENV)/torch.txt
else
	@$(PIP) install --requirement requirements.txt
endif
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

report: $(STAMP)  ## run the six notebooks and make build/report/report.html and report.pdf (ARGS="--jobs 4 --no-resume", "--scheduler tcp://...")
	@$(RUN) -m report $(ARGS)

page: $(STAMP)  ## draw build/report again from saved results, without running anything
	@$(RUN) -m report --only-render $(ARGS)

publish: $(STAMP)  ## for maintainers: make the committed report again, from real data only (ARGS=--only-render: from the committed results)
	@$(RUN) -m report --publish $(ARGS)

site: $(STAMP)  ## make build/site: the notebooks as pages, the API reference and the committed report; a warning is an error
	@rm -rf $(SITE) $(dir $(SITE))jupyter_execute
	@$(RUN) -m sphinx --quiet --fail-on-warning --keep-going -d $(SITE)/.doctrees report/site $(SITE)
	@echo $(SITE)/index.html

evidence: $(STAMP)  ## run every study of the report again in a short form, into build/evidence: half an hour (ARGS="--scheduler tcp://...")
	@$(RUN) -m report.evidence $(ARGS)

bench: $(STAMP)  ## measure time and memory of a training step, with nothing else running (ARGS="--quick", "--device cuda")
	@$(RUN) -m fwdlib bench $(ARGS)

test: $(STAMP)  ## run the tests but the slow ones, and the six notebooks in quick mode
	@$(RUN) -m pytest -n 2 --dist loadfile -m "not slow"
	@$(NBVAL) notebooks/*.ipynb

test-all: test  ## run the slow tests and the other notebooks as well
	@$(RUN) -m pytest -n 2 --dist loadfile -m slow
	@$(NBVAL) notebooks/beyond

test-lowest:  ## run the tests but the slow ones with the lowest versions that requirements.txt allows, in an environment of its own
	@$(PYTHON) -m venv $(LOWEST)
	@mkdir -p build && sed -E 's/>=([0-9.]+)/==\1/' requirements.txt > build/lowest.txt
	@$(LOWEST)/bin/python -m pip --quiet --disable-pip-version-check install --requirement build/lowest.txt
	@$(LOWEST)/bin/python -m pip --quiet --disable-pip-version-check install --no-deps --no-build-isolation --editable .
	@$(LOWEST)/bin/python -m pytest -n 2 --dist loadfile -m "not slow"

drill: $(STAMP)  ## break things on purpose, in temporary folders, and see that every promise holds (ARGS=--short: three minutes)
	@$(RUN) -m tests.drill $(ARGS)

test-zoo: $(STAMP)  ## try every engine on 170 models and 96 losses, with packages of its own; writes report/site/zoo.md
	@$(PIP) install --no-build-isolation --editable '.[zoo]' $(if $(wildcard $(VENV)/torch.txt),--constraint $(VENV)/torch.txt)
	@rm -rf $(ZOO)
	@FWDLIB_ZOO=$(ZOO) $(RUN) -m pytest -n 2 tests/zoo
	@$(RUN) -m tests.zoo.table $(ZOO)

test-browser: site  ## look at the pages, and run a notebook in JupyterLab, in headless Chromium (installed by apt)
	@tests/browser.sh $(RUN)

lint: $(STAMP)  ## check style and documentation
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

format: $(STAMP)  ## put code and notebooks into the project's format
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

notebooks: $(STAMP)  ## execute the committed notebooks on real data and write them back, cleaned
	@$(RUN) -m report.notebooks $(ARGS)

wheel: $(STAMP)  ## build dist/fwdlib-*.whl, for Colab
	@$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

lab: $(STAMP)  ## open JupyterLab on the notebooks
	@$(RUN) -m jupyter lab notebooks

clean:  ## remove what these commands made: build/, the wheel, caches; keep .venv, results/ and the committed report
	@rm -rf build/report build/site build/jupyter_execute build/evidence $(ZOO) dist/fwdlib-*.whl .pytest_cache .ruff_cache .hypothesis
	@find fwdlib report tests notebooks -name __pycache__ -prune -exec rm -rf {} +
