# Two commands do everything: `make report` and `make test`. Each makes .venv first, from requirements.txt.

PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
NBVAL  := FWDLIB_QUICK=1 $(RUN) -m pytest -n 2 --dist loadfile -o addopts=--nbval-cell-timeout=120 --nbval-lax

.DEFAULT_GOAL := help
.PHONY: help report page publish site evidence bench test test-all test-browser lint format notebooks wheel lab clean

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	@echo "Setting up $(VENV): about two minutes and 6 GB, once."
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

report: $(STAMP)  ## run the six notebooks and make build/report/report.html and report.pdf (ARGS="--jobs 4 --no-resume", "--scheduler tcp://...")
	@$(RUN) -m report $(ARGS)

page: $(STAMP)  ## draw build/report again from saved results, without running anything
	@$(RUN) -m report --only-render $(ARGS)

publish: $(STAMP)  ## for maintainers: make the committed report again, from real data only (ARGS=--only-render: from the committed results)
	@$(RUN) -m report --publish $(ARGS)

site: $(STAMP)  ## make report/site: the notebooks as pages, to read without running them
	@$(RUN) -m report.site

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

test-browser: $(STAMP)  ## look at the pages, and run a notebook in JupyterLab, in headless Chromium (installed by apt)
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
	@$(RUN) -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .

lab: $(STAMP)  ## open JupyterLab on the notebooks
	@$(RUN) -m jupyter lab notebooks

clean:  ## remove what was built; keep .venv and the committed results
	@rm -rf build dist results report/executed .pytest_cache .ruff_cache .hypothesis *.egg-info
	@find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
