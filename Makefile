# Everything a reader types. Each target installs what it needs into .venv first; a second call installs nothing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: tutorial real test test-ci lint notebooks site links workshop matrix newest lab clean help

help:
	@echo "make tutorial   run the course on this machine with the tiny model; the result lands in runs/latest"
	@echo "make real       train and use a real language model, SmolLM2-135M: 93 MB once, no account"
	@echo "make lab        open the notebooks in JupyterLab"
	@echo "make test       prove the repository"
	@echo "make test-ci    what CI tests besides: faults at each stage of a run, and two hosts"
	@echo "make matrix     the long test matrices (by hand; minutes to hours)"
	@echo "make lint       ruff over package, tests, notebooks and the extracted script; who may import whom; spelling"
	@echo "make notebooks  execute the notebooks again and refresh their committed outputs"
	@echo "make site       the whole series as a site in site/: search, dark theme, no network"
	@echo "make links      ask every address outside that a text or a notebook names (by hand; wants a network)"
	@echo "make workshop   student edition, solutions and an archive to hand out, in workshop/"
	@echo "make newest     try the newest releases in an environment of their own (by hand; an hour); the report in runs/newest"
	@echo "make clean      remove what runs leave behind (keeps .venv)"

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else "This project needs Python 3.11, 3.12 or 3.13; $(PYTHON) is %d.%d. Name another with: make PYTHON=python3.11 ..." % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $(STAMP)

# PARAMS names another set of parameters, FSDP_VERSION=2 the other FSDP: make tutorial FSDP_VERSION=2
PARAMS ?= configs/params/tiny.yaml
tutorial: $(STAMP)
	$(BIN)/python -m nbutils run --params $(PARAMS) $(if $(FSDP_VERSION),-p fsdp_version $(FSDP_VERSION))

real: $(STAMP)
	$(BIN)/python -m nbutils small-model
	$(BIN)/python -m nbutils run --params configs/params/smollm2_135m.yaml --only 04,05

# It opens with the table of contents beside the first notebook; how you arrange it later is kept in runs/lab.
LAB ?= runs/lab
lab: export JUPYTERLAB_WORKSPACES_DIR = $(abspath $(LAB))
lab: $(STAMP)
	@test -d $(LAB) || $(BIN)/jupyter lab workspaces import configs/lab_workspace.json
	$(BIN)/jupyter lab --notebook-dir=notebooks

test: $(STAMP)
	$(BIN)/python -m pytest

test-ci: $(STAMP)
	$(BIN)/python -m pytest -m 'ci and not matrix'

matrix: $(STAMP)
	$(BIN)/python -m pytest -m matrix -s

lint: $(STAMP)
	$(BIN)/python -m nbutils script runs/lint
	$(BIN)/ruff check . runs/lint/fine_tuning_FSDP_QLoRA.py
	$(BIN)/ruff format --check . runs/lint/fine_tuning_FSDP_QLoRA.py
	$(BIN)/lint-imports
	$(BIN)/codespell -D - -D docs/terms.txt
	for notebook in notebooks/*.ipynb; do $(BIN)/nbstripout -t $$notebook; done > runs/lint/notebooks.txt
	$(BIN)/codespell -D - -D docs/terms.txt runs/lint/notebooks.txt

notebooks: $(STAMP)
	$(BIN)/python -m nbutils refresh

site: $(STAMP)
	$(BIN)/python -m nbutils site

# Links within the repository are tests; whether another host still has a page is not ours to gate commits on.
links: $(STAMP)
	$(BIN)/python -m sphinx -b linkcheck -c docs -d runs/links/doctrees -q . runs/links/report

workshop: $(STAMP)
	$(BIN)/python -m nbutils workshop

# Today's releases beside the tested ones. It ends with 1 if anything differs; what it says is in runs/newest/report.md.
newest: $(STAMP)
	$(BIN)/python -m nbutils newest

clean:
	rm -rf runs site workshop .pytest_cache .ruff_cache
