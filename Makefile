# Each target does its own set-up in .venv, from pinned constraints.
PYTHON ?= $(shell command -v python3.11 >/dev/null 2>&1 && python3.11 --version >/dev/null 2>&1 && echo python3.11 || echo python3)
BIN := .venv/bin
STAMP := .venv/.installed
export HF_HUB_OFFLINE = 1

.PHONY: venv demo test lint bench accuracy clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m qpass demo

# Two processes: most of a test is one thread of Python. Threads that wait do so asleep, not to take the other's core.
test: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# ARGS=--write keeps the results and puts the table into the README.
bench: $(STAMP)
	$(BIN)/python -m tests.benchmarks.native_kernels
	$(BIN)/python tests/benchmarks/memory.py
	$(BIN)/python tests/benchmarks/peak.py
	$(BIN)/python tests/benchmarks/decode.py $(ARGS)
	$(BIN)/python tests/benchmarks/compile_time.py --minilm
	$(BIN)/python tests/benchmarks/minilm.py $(ARGS)
	$(BIN)/python -m tests.benchmarks.native_conv
	$(BIN)/python tests/benchmarks/images.py $(ARGS)
	$(BIN)/python tests/benchmarks/training_cost.py
	$(BIN)/python -m tests.benchmarks.report_page
	$(BIN)/python -m tests.benchmarks.inspecting

accuracy: $(STAMP)
	$(BIN)/python tests/benchmarks/minilm.py --accuracy
	$(BIN)/python tests/benchmarks/digits.py
	$(BIN)/python tests/benchmarks/language.py
	$(BIN)/python -m tests.benchmarks.searching
	$(BIN)/python tests/benchmarks/training.py

clean:
	rm -rf .venv build dist *.egg-info
