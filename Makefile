# make demo | test | lint | bench | bench-smoke | evidence | data | mutants | clean; make PYTHON=python3.12 ... builds .venv with another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint bench bench-smoke evidence data mutants clean

demo: $(INSTALLED)
	$(BIN)/python -m hf_distill.demo

# two processes, a test file in one of them; one process: make test WORKERS=0
WORKERS ?= 2
test: $(INSTALLED)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# one thread, on a quiet machine; the figures go to benchmarks/results, docs/performance.md and docs/teachers.md
bench bench-smoke: export OMP_NUM_THREADS = 1
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.bench_loss
	$(BIN)/python -m benchmarks.bench_loss --system_allocator
	$(BIN)/python -m benchmarks.bench_loss --large
	$(BIN)/python -m benchmarks.bench_loss --large --system_allocator
	$(BIN)/python -m benchmarks.bench_memory
	$(BIN)/python -m benchmarks.bench_trainer
	$(BIN)/python -m benchmarks.bench_packing
	$(BIN)/python -m benchmarks.bench_moe
	$(BIN)/python -m benchmarks.bench_teacher
	$(BIN)/python -m benchmarks.bench_vision
	$(BIN)/python -m benchmarks.report

bench-smoke: $(INSTALLED)
	$(BIN)/python -m benchmarks.smoke

# make evidence METHOD=pld DATA=DIR: measure a method again and rewrite its card; DRY=1 only says what would run
evidence: export OMP_NUM_THREADS = 1
evidence: $(INSTALLED)
	$(BIN)/python -m benchmarks.evidence $(METHOD) --data $(DATA) $(if $(DRY),--dry)

# make data DATA=DIR: fetch the public sets that evidence is measured on, with checksums; SETS="sst2 trec" only these
data: $(INSTALLED)
	$(BIN)/python -m benchmarks.fetch_data $(DATA) $(if $(SETS),--sets $(SETS))

# make mutants MODULE=hf_distill/losses/divergences.py: how many small faults its tests catch
mutants: $(INSTALLED)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[mutants]'
	$(BIN)/python -m benchmarks.mutants $(MODULE)

clean:
	rm -rf $(VENV) build dist runs *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "hf-distill needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1 | head -n 1);" \
	       "give another one: make PYTHON=python3.12 $(or $(MAKECMDGOALS),demo)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test,report]'
	@touch $@
