# make demo     the small Llama that ships with the project continues a Python function
# make test     lint, types and tests, on CPU
# make lint     lint and types alone
# make clean    remove all that make made
#
# The first run installs into .venv (install.sh, where PYTHON and EXTRA are told). Where packages come from
# is pip's own setting; on Linux the usual torch, which only the tests need, is a CUDA build of several GB:
# with the index of PyTorch's CPU wheels in PIP_EXTRA_INDEX_URL, pip prefers the small one.

VENV = .venv
RUN = $(VENV)/bin/python -m
PINS = install.sh pyproject.toml constraints/py311.txt constraints/py312.txt

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(VENV)/core
	@echo "A Llama of 4.3M parameters, trained on Python's own documentation and library, continues two lines:" >&2
	@$(RUN) infer.generate </dev/null

test: lint
	$(RUN) pytest -n 2 --dist worksteal

lint: $(VENV)/test
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) pyright --pythonpath $(VENV)/bin/python

clean:
	rm -rf .venv* build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/core: $(PINS)
	@sh install.sh $(VENV)

$(VENV)/test: $(PINS)
	@sh install.sh $(VENV) test

.PHONY: help demo test lint clean
