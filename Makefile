# Every target makes .venv and installs what it needs; nothing but Python 3.11+ and make is presupposed.
#   make quickstart                    the whole story, in minutes
#   make test                          the tests that take minutes; `make test-all` takes those that take longer, too
#   make check                         formatting, lint, types
#   make docs                          the documentation's site, into site/
#   make dist                          a wheel and a source distribution, into dist/
#   make soak SECONDS=1200             fifty clients of one server for a while; fails if anything is wrong or left over
#   make quickstart TORCH_INDEX=URL    take torch from another package index

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
OUT ?= quickstart
SECONDS ?= 1200
RUN := $(VENV)/bin
INSTALL := $(PYTHON) tools/install.py --venv $(VENV) $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))
# Two test processes of one thread each: several threads in several processes slow each other down.
PYTEST := OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n 2 --dist loadscope

.PHONY: quickstart install dev test test-all soak check format docs dist clean

quickstart: install
	$(RUN)/toolkit quickstart $(OUT)

install:
	$(INSTALL) --extras serve

dev:
	$(INSTALL) --extras dev

test: dev
	$(PYTEST)

test-all: dev
	$(PYTEST) -m ""

soak: dev
	OMP_NUM_THREADS=1 $(RUN)/python -m tests.serving.soak --seconds $(SECONDS)

check: dev
	$(RUN)/ruff format --check
	$(RUN)/ruff check
	$(RUN)/pyright --pythonpath $(RUN)/python

format: dev
	$(RUN)/ruff format
	$(RUN)/ruff check --fix

docs: dev
	$(RUN)/mkdocs build --strict

dist: dev
	$(RUN)/python -m build --outdir dist

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache
