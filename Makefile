# make demo     the small Llama that ships with the project writes a Python function
# make test     lint, types and tests, on CPU
# make lint     lint and types alone
# make clean    remove all that make made
#
# The first run installs into .venv: the exact versions in constraints/, chosen by the Python found.
# PYTHON names another interpreter. Where packages come from is pip's own setting; on Linux the usual
# torch, which only the tests need, is a CUDA build of several GB: with the index of PyTorch's CPU
# wheels in PIP_EXTRA_INDEX_URL, pip prefers the small one.

VENV = .venv
PYTHON ?= python3.11 python3.12 python3.13 python3.14 python3
RUN = $(VENV)/bin/python -m
PINS = pyproject.toml constraints/py311.txt constraints/py312.txt

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(VENV)/core
	@$(RUN) infer.generate

test: lint
	$(RUN) pytest -n 2

lint: $(VENV)/test
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) pyright --pythonpath $(VENV)/bin/python

clean:
	rm -rf .venv* build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/core: $(PINS)
	@$(OPEN_VENV)
	@$(INSTALL) -e .
	@touch $@

$(VENV)/test: $(PINS)
	@$(OPEN_VENV)
	@$(INSTALL) -e '.[test]'
	@touch $(VENV)/core $@

# The stamps are taken away first and put back last, so an environment without core was interrupted
# and is made anew. A candidate is tried by running it: a pyenv shim may exist and not run.
OPEN_VENV = \
	if [ ! -e $(VENV)/core ]; then \
	    for python in $(PYTHON); do \
	        "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	    done || { echo "error: none of these is Python 3.11 or newer: $(PYTHON)" >&2; exit 1; }; \
	    echo "installing into $(VENV) with $$python, which takes a few minutes the first time"; \
	    "$$python" -m venv --clear $(VENV) || \
	        { echo "error: $$python -m venv failed; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }; \
	fi; \
	rm -f $(VENV)/core $(VENV)/test

INSTALL = $(RUN) pip install -qq --disable-pip-version-check \
	-c constraints/py3$$($(VENV)/bin/python -c 'import sys; print(min(sys.version_info[1], 12))').txt

.PHONY: help demo test lint clean
