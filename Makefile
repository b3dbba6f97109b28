# What a developer runs; "make help" explains. Each vLLM version has a virtual environment of its own
# below .venv, made when first needed.
NEWEST := 0.32.0
OLDEST := 0.27.1
VLLM := $(NEWEST)
PYTHON := $(shell command -v python3.11 || echo python3)
SIZE := small
PYTEST_ARGS :=

VENV := .venv/vllm-$(VLLM)
BIN := $(VENV)/bin

.PHONY: help venv demo test test-ut test-e2e lint docs bench bench-serving clean

help:
	@echo "make demo      three vllm serve, each fed by the one before (SIZE=small, medium or large)"
	@echo "make test      lint, docs, unit and end-to-end tests, on vLLM $(NEWEST) and $(OLDEST)"
	@echo "make test-ut   unit tests"
	@echo "make test-e2e  end-to-end tests with real vllm serve processes"
	@echo "make lint      ruff and mypy"
	@echo "make docs      both languages of the documentation, warnings as errors"
	@echo "make bench     the data plane beside what it is measured against (BENCH_JSON=FILE)"
	@echo "make bench-serving  tokens of an instance while others pull from it (BENCH_JSON=FILE)"
	@echo "make venv      only install"
	@echo "make clean     remove everything that make made"
	@echo
	@echo "VLLM=$(VLLM) chooses the version, PYTHON=$(PYTHON) the interpreter (3.11 or newer),"
	@echo "PYTEST_ARGS='-k name' the tests."

venv: $(VENV)/installed

$(VENV)/installed: setup.py tools/install.sh
	tools/install.sh $(VENV) $(VLLM) $(PYTHON)

demo: venv
	$(BIN)/python -m demo.demo --size $(SIZE)

test-ut: venv
	$(BIN)/python -m pytest tests/ut $(PYTEST_ARGS)

test-e2e: venv
	$(BIN)/python -m pytest tests/e2e $(PYTEST_ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs:
	$(MAKE) -C docs PYTHON=$(PYTHON)

# NetLoader does not need the Run:ai Model Streamer and is only measured beside it: without a package
# index, or where there is no wheel of it, its row stays empty.
bench: venv
	-$(BIN)/python -m pip install -q --disable-pip-version-check --no-input runai-model-streamer
	$(BIN)/python -m benchmarks $(if $(BENCH_JSON),--json $(BENCH_JSON))

bench-serving: venv
	$(BIN)/python -m benchmarks.serving $(if $(BENCH_JSON),--json $(BENCH_JSON))

# The older version gets the unit tests and the end-to-end tests that matter most.
test:
	$(MAKE) lint docs test-ut test-e2e VLLM=$(NEWEST)
	$(MAKE) test-ut VLLM=$(OLDEST)
	$(MAKE) test-e2e VLLM=$(OLDEST) PYTEST_ARGS="-m core $(PYTEST_ARGS)"

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info build
	find . -name __pycache__ -prune -exec rm -rf {} +
