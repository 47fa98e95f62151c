# `make quickstart` clones a small teacher; `make test` runs the tests. Both set up everything they
# need in .venv. The second time, they start quickly.

PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: quickstart test test-gguf check setup clean

quickstart: .venv/ready
	$(BIN)/lrc train quickstart

test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile

check: .venv/ready-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Builds llama.cpp (minutes; needs a C++ compiler and cmake) and opens our GGUF files in it.
test-gguf: .venv/ready-dev
	$(BIN)/python -c "import llama_cpp" 2>/dev/null || scripts/setup.sh .venv dev,gguf-test
	$(BIN)/pytest -m slow tests/exporting/test_llama_cpp.py tests/test_end_to_end.py

setup: .venv/ready

.venv/ready: pyproject.toml scripts/setup.sh
	PYTHON=$(PYTHON) scripts/setup.sh .venv
	touch $@

.venv/ready-dev: .venv/ready
	PYTHON=$(PYTHON) scripts/setup.sh .venv dev,eval,cuda
	touch $@

clean:
	rm -rf .venv
