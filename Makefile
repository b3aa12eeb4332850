# `make` prints the targets. Everything is installed into .venv; nothing else is touched.
# Another Python: make test PYTHON=python3.13 VENV=.venv-3.13

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TRIED := $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11)

# What builds the package is pinned like everything else.
export PIP_BUILD_CONSTRAINT := constraints.txt
# Pyright would ask the network for a newer version of itself at every run.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help install fmt lint test test-quick shop demo screenshot bench bench-smoke bench-http clean

help: ## Print this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1	/' | expand -t 12

install: $(STAMP) ## Make .venv with everything for development

$(STAMP): pyproject.toml constraints.txt
	@if [ ! -x $(BIN)/python ]; then \
	  for python in $(TRIED); do \
	    if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	    then echo "making $(VENV) with $$python ($$("$$python" -V 2>&1))"; \
	      exec "$$python" -m venv $(VENV); fi; \
	  done; \
	  echo "No Python 3.11 or newer with venv found (tried: $(TRIED))." >&2; \
	  echo "Install one, or name it: make install PYTHON=/path/to/python" >&2; exit 1; fi
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip
	$(BIN)/python -m pip install --constraint constraints.txt --group dev --editable '.[fastapi,testing]'
	@touch $@

fmt: $(STAMP) ## Format the code and repair what ruff can repair
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

lint: $(STAMP) ## Check style, types, layers and spelling
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	PYTHONPATH=src $(BIN)/pyright --pythonpath $(BIN)/python --verifytypes kafka_broker --ignoreexternal
	$(BIN)/lint-imports
	$(BIN)/codespell

test: $(STAMP) ## Run every test, on memory and on a real Kafka (ARGS="-k ..." to choose)
	$(BIN)/python -m pytest $(ARGS)

test-quick: $(STAMP) ## Run the tests that need no Kafka
	$(BIN)/python -m pytest -m "not integration" $(ARGS)

shop: $(STAMP) ## Open a shop of three services and a page, on a real Kafka, until Ctrl-C
	@exec $(BIN)/python -u examples/shop/run.py

demo: $(STAMP) ## Place some orders in that shop, print replies and times, and end
	@exec $(BIN)/python -u examples/shop/run.py --demo

screenshot: $(STAMP) ## Renew the picture of the page in docs/images (needs Chromium and pdftocairo)
	$(BIN)/python -m tests.integration.screenshot docs/images/shop.svg

bench: $(STAMP) ## Measure ours and others on a real Kafka (ARGS="--only requests --rounds 5")
	$(BIN)/python benchmarks/bench.py $(ARGS)

bench-smoke: $(STAMP) ## Run every benchmark once, tiny, to see that it works
	$(BIN)/python benchmarks/bench.py --smoke $(ARGS)

bench-http: $(STAMP) ## Measure what HTTP costs on top of a request
	$(BIN)/python benchmarks/over_http.py

clean: ## Remove .venv, caches and build results
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
