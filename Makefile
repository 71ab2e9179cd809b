# Every target makes .venv and installs what it needs, once; a second call goes straight to work.
# Other Pythons: make lab PYTHON=python3.12. Smaller CPU-only wheels: make lab CPU=1.

PYTHON ?= python3
VENV ?= .venv
PRESET ?= tiny
PORT ?= 8888
WORKERS ?= 2
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet
ifdef CPU
PIP_INSTALL += --extra-index-url https://download.pytorch.org/whl/cpu
endif
# This machine only; the token that JupyterLab makes stays on. Root, as in a container, must be told.
LAB_OPTIONS = --ServerApp.ip=127.0.0.1 --ServerApp.port=$(PORT) \
  --LabApp.default_url=/lab/tree/notebooks/01_pictures.ipynb \
  $(if $(filter 0,$(shell id -u)),--allow-root)
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
LABS := $(filter %_lab.ipynb,$(NOTEBOOKS))
export CAPTION

.PHONY: help lab test book draw notebooks train bench check format clean
.DEFAULT_GOAL := help

help:
	@echo 'make lab                    JupyterLab with chapter 1, on this machine only'
	@echo 'make draw CAPTION="a star"  pictures from words, with the weights that ship'
	@echo 'make test                   lint, types, tests, chapters, book and wheel'
	@echo 'make book                   the book as pages under _build/html'
	@echo 'make notebooks              run every chapter anew and store its outputs'
	@echo 'make train PRESET=tiny      train the first system (PRESET=book: hours)'
	@echo 'make format                 what ruff can mend by itself'
	@echo 'make bench                  measure promised times and memory (TRAIN=1: training; BOOK=1: the book)'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 't2ilearn needs Python 3.11 or newer; name one: make lab PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo 'Python has no venv module here. On Debian or Ubuntu:' >&2; \
	  echo '    sudo apt install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp a set of extras; pip runs again only when pyproject.toml has changed.
$(VENV)/.has-core: pyproject.toml | $(BIN)/python
	@echo 'Installing t2ilearn into $(VENV) (several minutes the first time) ...'
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.has-lab: pyproject.toml | $(BIN)/python
	@echo 'Installing t2ilearn and JupyterLab into $(VENV) (several minutes the first time) ...'
	$(PIP_INSTALL) -e '.[lab]'
	@touch $(VENV)/.has-core $@

$(VENV)/.has-book: pyproject.toml | $(BIN)/python
	@echo 'Installing t2ilearn and Jupyter Book into $(VENV) (several minutes the first time) ...'
	$(PIP_INSTALL) -e '.[book]'
	@touch $(VENV)/.has-core $@

$(VENV)/.has-test: pyproject.toml | $(BIN)/python
	@echo 'Installing t2ilearn, its tests and its peers into $(VENV) (several minutes) ...'
	$(PIP_INSTALL) -e '.[dev]'
	@touch $(VENV)/.has-core $(VENV)/.has-lab $(VENV)/.has-book $@

# Jupyter shows stored widgets and HTML only in notebooks that this user has signed.
$(VENV)/.trusted: $(NOTEBOOKS) | $(VENV)/.has-lab
	@$(if $(NOTEBOOKS),$(BIN)/jupyter trust $(NOTEBOOKS) >/dev/null)
	@touch $@

# JupyterLab asks the network for news and updates unless told not to.
LAB_SETTINGS := $(VENV)/share/jupyter/lab/settings/overrides.json
$(LAB_SETTINGS): | $(VENV)/.has-lab
	@mkdir -p $(@D)
	@echo '{"@jupyterlab/apputils-extension:notification":' \
	  '{"fetchNews": "false", "checkForUpdates": false}}' > $@

# JupyterLab stores what the kernel says of its language, and marks a chapter as unsaved that says
# otherwise. Chapters cannot know the reader's Python version, so the kernel keeps it to itself.
KERNEL_SETTINGS := $(VENV)/etc/ipython/ipython_kernel_config.py
$(KERNEL_SETTINGS): | $(VENV)/.has-lab
	@mkdir -p $(@D)
	@echo 'from ipykernel.ipkernel import IPythonKernel' > $@
	@echo 'IPythonKernel.language_info.pop("version", None)' >> $@

lab: $(VENV)/.has-lab $(VENV)/.trusted $(LAB_SETTINGS) $(KERNEL_SETTINGS)
	$(BIN)/jupyter lab $(LAB_OPTIONS)

check: $(VENV)/.has-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.has-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# tests/test_colab.py executes the reading chapters, by nbval too.
test: check
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations=40 --nbval --nbval-current-env \
	  --nbval-sanitize-with tests/nbval.cfg --nbval-cell-timeout 120 tests $(LABS)

book: $(VENV)/.has-book
	$(BIN)/jupyter-book build . -W -n --keep-going

draw: $(VENV)/.has-core
	@test -n "$$CAPTION" || { echo 'Say what to draw: make draw CAPTION="a small red star"' >&2; exit 2; }
	@$(BIN)/t2ilearn draw "$$CAPTION" --best-of 8

notebooks: $(VENV)/.has-test
	$(BIN)/python tools/run_notebooks.py $(NOTEBOOKS)

train: $(VENV)/.has-core
	$(BIN)/t2ilearn train vqvae --preset $(PRESET)

bench: $(VENV)/.has-test
	$(BIN)/python tests/benchmarks/bench.py $(if $(TRAIN),--train)$(if $(BOOK),--book)

clean:
	rm -rf _build .mypy_cache .pytest_cache .ruff_cache
