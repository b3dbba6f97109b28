# What a developer runs; "make help" explains. Each vLLM version has a virtual environment of its own
# below .venv, made when first needed.
NEWEST := 0.32.0
OLDEST := 0.27.1
ASCEND := 0.23.0
VLLM := $(NEWEST)
PYTHON := $(shell command -v python3.11 || echo python3)
SIZE := small
PYTEST_ARGS :=
FUZZ_N := 100000
FUZZ_SEED := 0

VENV := .venv/vllm-$(VLLM)
BIN := $(VENV)/bin
VENV_NPU := .venv/ascend-$(ASCEND)
BIN_NPU := $(VENV_NPU)/bin

.PHONY: help venv venv-npu overlay-npu demo demo-npu test test-ut test-simulation test-conformance \
	test-e2e fuzz proof proof-npu test-npu lint docs bench bench-serving bench-fleet simulate-fleet \
	clean venv-oldest test-ut-oldest test-newest test-e2e-oldest test-on-cpus

help:
	@echo "make demo      three vllm serve, each fed by the one before (SIZE=small, medium or large)"
	@echo "make demo-npu  the same with vLLM Ascend $(ASCEND) and torch_npu on simulated NPUs"
	@echo "make test      lint, docs, unit and end-to-end tests, on vLLM $(NEWEST) and $(OLDEST),"
	@echo "               and the tests on simulated NPUs"
	@echo "make test-ut   unit tests, in two processes"
	@echo "make test-simulation  2,000 schedules of small fleets in virtual time"
	@echo "make test-conformance  whole loads between real sources and clients, over HTTP and in groups"
	@echo "make fuzz      damaged requests, handshakes, answers, bodies, groups (FUZZ_N=$(FUZZ_N), FUZZ_SEED=$(FUZZ_SEED))"
	@echo "make test-e2e  end-to-end tests with real vllm serve processes"
	@echo "make proof     for each kind of model: what a peer gives is what it has, bit by bit, also to an"
	@echo "               instance that is cut in another way"
	@echo "make proof-npu  the same with vLLM Ascend $(ASCEND) and torch_npu on simulated NPUs"
	@echo "make test-npu  tests with vLLM Ascend $(ASCEND) and torch_npu on simulated NPUs"
	@echo "make lint      ruff and mypy"
	@echo "make docs      both languages of the documentation, warnings as errors"
	@echo "make bench     the data plane, shared storage and vLLM's loaders beside NetLoader (BENCH_JSON=FILE)"
	@echo "make bench-serving  tokens of an instance while others pull from it (BENCH_JSON=FILE)"
	@echo "make bench-fleet  up to 16 clients of one seed, with a network link for each (BENCH_JSON=FILE,"
	@echo "               SVG=FILE: the curve as a picture)"
	@echo "make simulate-fleet  up to 1,000 replicas in virtual time (SEED=0, BENCH_JSON=FILE)"
	@echo "make venv      only install (make venv-npu: vLLM Ascend)"
	@echo "make clean     remove everything that make made"
	@echo
	@echo "VLLM=$(VLLM) chooses the version, PYTHON=$(PYTHON) the interpreter (3.11 or newer),"
	@echo "PYTEST_ARGS='-k name' the tests."

venv: $(VENV)/installed

$(VENV)/installed: setup.py tools/install.sh
	tools/install.sh $(VENV) $(VLLM) $(PYTHON)

venv-npu: $(VENV_NPU)/installed

$(VENV_NPU)/installed: tools/install_ascend.sh tests/npu_sim/requirements.txt
	tools/install_ascend.sh $(VENV_NPU) $(PYTHON)

demo: venv
	$(BIN)/python -m demo.demo --size $(SIZE)

# What vLLM finds out about a model's class is good for one version of it, and costs half a minute.
test-ut test-conformance test-e2e: export VLLM_CACHE_ROOT = $(CURDIR)/$(VENV)/cache

test-ut: venv
	$(BIN)/python -m pytest tests/ut --numprocesses=2 --dist=loadgroup $(PYTEST_ARGS)

test-simulation: venv
	$(BIN)/python -m pytest tests/simulation $(PYTEST_ARGS)

test-conformance: venv
	$(BIN)/python -m pytest tests/conformance $(PYTEST_ARGS)

# Threads of torch wait actively for each other, which takes ten times as long on cores that others
# use as well.
test-e2e: export OMP_NUM_THREADS := 1
test-e2e: venv
	$(BIN)/python -m pytest tests/e2e $(PYTEST_ARGS)

# Its last line says how many were tried and how many accepted. A fault names the command that tries
# its case again.
fuzz: venv
	$(BIN)/python -m tests.fuzz --count $(FUZZ_N) --seed $(FUZZ_SEED)

# The first is part of the end-to-end tests, too.
proof: venv
	$(BIN)/python -m tests.proof
	$(BIN)/python -m tests.proof.cuts

# The first is part of the tests on simulated NPUs, too.
proof-npu: overlay-npu
	NPUSIM_LIB=$$($(BIN_NPU)/python -m tests.npu_sim.simulator) OMP_NUM_THREADS=1 \
		$(BIN_NPU)/python tests/npu_sim/children/proof.py
	NPUSIM_LIB=$$($(BIN_NPU)/python -m tests.npu_sim.simulator) OMP_NUM_THREADS=1 \
		$(BIN_NPU)/python tests/npu_sim/children/cuts.py

demo-npu: overlay-npu
	NPUSIM_LIB=$$($(BIN_NPU)/python -m tests.npu_sim.simulator) \
		$(BIN_NPU)/python -m demo.demo --npu --size $(SIZE)

# What runs there imports the installed vllm_ascend, so NetLoader's present files go over it first.
overlay-npu: venv-npu
	rm -rf $(VENV_NPU)/overlay
	NETLOADER_OVERLAY=1 $(BIN_NPU)/python -m pip wheel -q --disable-pip-version-check --no-deps \
		--no-build-isolation -w $(VENV_NPU)/overlay .
	$(BIN_NPU)/python -m pip install -q --disable-pip-version-check --no-deps --force-reinstall \
		$(VENV_NPU)/overlay/*.whl

# The simulator is built before pytest, whose time limit is for tests.
test-npu: overlay-npu
	$(BIN_NPU)/python -m tests.npu_sim.simulator
	$(BIN_NPU)/python -m pytest tests/npu_sim $(PYTEST_ARGS)

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

# Needs root, or "unshare -rn make bench-fleet": it says so, and does nothing, where that is missing.
bench-fleet: venv
	$(BIN)/python -m benchmarks.fleet $(if $(BENCH_JSON),--json $(BENCH_JSON)) \
		$(if $(SVG),--svg $(SVG))

simulate-fleet: venv
	$(BIN)/python -m benchmarks.fleet_simulation $(if $(SEED),--seed $(SEED)) \
		$(if $(BENCH_JSON),--json $(BENCH_JSON))

# $(call step,NAME,COMMAND) also says what it was and how long it took.
step = @start=$$(date +%s); $(2); code=$$?; \
	echo "$(1): exit status $$code after $$(($$(date +%s) - start)) s"; exit $$code

# Unit tests and conformance have deadlines of a second or two, so nothing but their like runs beside
# them. The rest has longer ones: two at once, each printed whole when it ends.
test:
	$(call step,vLLM $(NEWEST),$(MAKE) venv VLLM=$(NEWEST))
	$(call step,lint and documentation,$(MAKE) --jobs=2 --output-sync=target lint docs venv-oldest venv-npu)
	$(call step,unit tests,$(MAKE) test-ut VLLM=$(NEWEST))
	$(call step,unit tests on vLLM $(OLDEST),$(MAKE) test-ut-oldest)
	$(call step,conformance,$(MAKE) test-conformance VLLM=$(NEWEST))
	$(call step,fuzz and end-to-end tests,$(MAKE) --jobs=2 --output-sync=target test-npu test-on-cpus)

WITHOUT_VLLM := test_matrix.py test_patch_set.py \
	$(patsubst %,model_loader/netloader/test_netloader_%.py,http overload scheduler source_queue tls)

venv-oldest:
	$(MAKE) venv VLLM=$(OLDEST)

# Not those that run no code of vLLM, as both versions have the same torch.
test-ut-oldest:
	$(MAKE) test-ut VLLM=$(OLDEST) \
		PYTEST_ARGS="$(addprefix --ignore=tests/ut/,$(WITHOUT_VLLM)) $(PYTEST_ARGS)"

# One after the other, as the tests on simulated NPUs take as long as these together.
test-on-cpus:
	$(MAKE) test-newest
	$(MAKE) test-e2e-oldest

test-newest:
	$(call step,fuzz,$(MAKE) fuzz VLLM=$(NEWEST))
	$(call step,simulation,$(MAKE) test-simulation VLLM=$(NEWEST))
	$(call step,end-to-end tests,$(MAKE) test-e2e VLLM=$(NEWEST))

# The older version gets the end-to-end tests that matter most.
test-e2e-oldest:
	$(call step,end-to-end tests on vLLM $(OLDEST),$(MAKE) test-e2e VLLM=$(OLDEST) PYTEST_ARGS="-m core $(PYTEST_ARGS)")

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info build
	find . -name __pycache__ -prune -exec rm -rf {} +
