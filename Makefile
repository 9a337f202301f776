# Everything begins from a fresh clone: each target sets up .venv first if it is missing.
#   make serve    a server with the embedded model on 127.0.0.1:8000
#   make chat     talk to the embedded model (prompts may be piped in)
#   make test     the test suite
#   make fuzz     10,000 random completions through the three dialects: nothing may leak
#   make check    format, lint, types, import arrows
#   make bench    speed on this machine, beside transformers (six minutes on two quiet cores)
#   make .venv    only the environment, with the command in .venv/bin/fathom
# Setting up talks on stderr. PYTHON=... chooses the interpreter; if it already has torch, that torch is used, otherwise
# constraints.txt names one.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

.PHONY: .venv serve chat test test-external fuzz check bench
.DEFAULT_GOAL := serve

.venv: .venv/.ready

.venv/.python:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed; name it with PYTHON=..." >&2; exit 2; }
	@if $(PYTHON) -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'; \
		then $(PYTHON) -m venv --system-site-packages .venv; else $(PYTHON) -m venv .venv; fi
	@touch $@

# Whatever torch and Triton the environment can already import are left alone: their lines drop out of the constraints.
.venv/.constraints: constraints.txt .venv/.python
	@$(BIN)/python -c 'from importlib.util import find_spec; \
		there = tuple(name + "==" for name in ("torch", "triton") if find_spec(name)); \
		print(*(line for line in open("constraints.txt") if not line.startswith(there)), sep="", end="")' > $@

.venv/.ready: pyproject.toml .venv/.constraints
	$(BIN)/python -m pip install --disable-pip-version-check -c .venv/.constraints -e . >&2
	@touch $@

.venv/.tools: .venv/.ready
	$(BIN)/python -m pip install --disable-pip-version-check -c .venv/.constraints -e '.[test,dev]' >&2
	@touch $@

serve: .venv/.ready
	@$(BIN)/fathom serve $(ARGS)

chat: .venv/.ready
	@$(BIN)/fathom chat

test: .venv/.tools
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-external: .venv/.tools
	@$(BIN)/python -m pytest -m 'external and not gpu' || { code=$$?; test $$code -eq 5 && echo "no external tests"; }

fuzz: .venv/.tools
	@$(BIN)/python -m tests.encoding.fuzz $(or $(COUNT),10000) $(SEED)

check: .venv/.tools
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py

bench: .venv/.tools
	@$(BIN)/python benchmarks/cpu.py
