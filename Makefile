# make demo    sets up and runs the main job: encode, train, report
# make study   sets up and runs the study of sampling efficiency, half an hour on two cores
# make test    sets up and runs the fast tests
# make test-parity    the same beside torch, diffusers, transformers, torch-fidelity, clean-fid and lpips, with live
#                     comparisons
#
# All need Python 3.11 or later, make and a package index, and may be run again at any time.
# Another interpreter: make PYTHON=python3.12 VENV=.venv-3.12 test

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test
WORKDIR ?= runs/demo
STUDY ?= runs/efficiency
SLOW ?= slow or full_size
# A file of tests is one worker's, as what it sets up is shared; more than four take too much memory.
PYTEST_FLAGS ?= --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder --durations=10
# Two virtual devices keep two cores busier than one does.
DEMO_FLAGS ?= --xla_force_host_platform_device_count=2

BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed[$(EXTRAS)]
RUN := $(BIN)/python -m
PIP_INSTALL := $(RUN) pip install --quiet --disable-pip-version-check
# tests/parity.py says why.
ASIDE := --no-deps --upgrade --target=$(VENV)/parity

.PHONY: demo study test test-slow test-parity test-all lint install clean
.DELETE_ON_ERROR:

demo: install
	export XLA_FLAGS="$(DEMO_FLAGS)"; $(RUN) ldm_jax.encode --config=configs/demo.py --workdir=$(WORKDIR)
	export XLA_FLAGS="$(DEMO_FLAGS)"; $(RUN) ldm_jax.train --workdir=$(WORKDIR)
	$(RUN) ldm_jax.report --workdir=$(WORKDIR)

study: install
	XLA_FLAGS="$(DEMO_FLAGS)" $(BIN)/python experiments/sampling_efficiency/study.py --workdir=$(STUDY)

test: install
	$(RUN) pytest -q -m "not slow and not full_size" $(PYTEST_FLAGS)

test-slow: install
	$(RUN) pytest -q -m "$(SLOW)" $(PYTEST_FLAGS)

test-parity:
	$(MAKE) EXTRAS=test,parity test

test-all: install
	$(RUN) pytest -q $(PYTEST_FLAGS)

lint: install
	$(RUN) ruff check
	$(RUN) ruff format --check

install: $(INSTALLED)

# `installing` stands while pip works: where it is found, the last install was cut off, and the
# environment is made anew.
ifneq ($(wildcard $(VENV)/installing),)
.PHONY: $(INSTALLED)
endif
$(INSTALLED): setup.cfg pyproject.toml tests/parity.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and \
	  f"ldm_jax needs Python 3.11 or later, and $(PYTHON) is {v}: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@if [ -e $(VENV)/installing ] || ! $(RUN) pip --version >/dev/null 2>&1; then \
	  echo "making the environment $(VENV)"; $(PYTHON) -m venv --clear $(VENV); fi
	@touch $(VENV)/installing
	$(PIP_INSTALL) --editable ".[$(EXTRAS)]"
	$(if $(findstring parity,$(EXTRAS)),$(PIP_INSTALL) $(ASIDE) --requirement tests/parity.txt)
	@rm $(VENV)/installing
	@touch "$@"

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache *.egg-info
