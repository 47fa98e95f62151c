# `make quickstart` clones a small teacher; `make test` runs the tests. Both set up everything they
# need in .venv. The second time, they start quickly.

PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: quickstart test test-gguf gpu-proof check docs setup clean

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

# Goes on filling the folder of results of one comparison for some minutes on a CUDA card. The folder is
# small enough for git; with OUT=FOLDER, a copy of it goes there as one archive, with what the processes printed, also
# if runs fail. On a machine that has torch and the rest already: make gpu-proof LRC="python -m lrc". COMPARE holds more options, such as
# "--set train.evaluate=null" without lm-eval. proof-2m needs one or two calls; COMPARISON=proof, with 25 million
# tokens, needs many.
COMPARISON ?= proof-2m
MINUTES ?= 9
PARALLEL ?= 4
LRC ?= $(BIN)/lrc
COMPARE ?=
RESULTS := benchmarks/comparisons/$(COMPARISON)
ARCHIVE = ; status=$$?; grep -vxF '*.log' $(RESULTS)/.gitignore | \
	tar -czf $(OUT)/$(COMPARISON).tar.gz --exclude-from - $(RESULTS) && exit $$status

gpu-proof: $(if $(filter $(BIN)/lrc,$(LRC)),.venv/ready-dev)
	$(LRC) compare $(COMPARISON) --minutes $(MINUTES) --parallel $(PARALLEL) --results-only --out $(RESULTS) $(COMPARE) $(if $(OUT),$(ARCHIVE))

# Builds the documentation's site in site/.
docs: .venv/ready
	$(BIN)/python -c "import mkdocs" 2>/dev/null || scripts/setup.sh .venv docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

setup: .venv/ready

.venv/ready: pyproject.toml scripts/setup.sh
	PYTHON=$(PYTHON) scripts/setup.sh .venv
	touch $@

.venv/ready-dev: .venv/ready
	PYTHON=$(PYTHON) scripts/setup.sh .venv dev,eval,cuda
	touch $@

clean:
	rm -rf .venv
