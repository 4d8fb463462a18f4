# make run    train, tune, benchmark and report: run-recipe recipes/wit_dpo.yaml
# make test   the tests, or some: make test tests=tests/stages/sft; make test-quick the quick ones of them, an area in
#             less than a minute; make test-slow those that run the default recipe
# make bench  the README's figures, or some of them: make bench BENCH='loss prepare'
# make schema what editors and readers know of recipes: recipes/recipe.schema.json, docs/reference.md
PYTHON ?= python3
tests ?= tests
BIN := .venv/bin
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

.PHONY: run test test-quick test-slow lint types check bench schema lock
run: .venv/installed
	$(BIN)/run-recipe recipes/wit_dpo.yaml

test: .venv/installed
	$(PYTEST) $(tests)

test-quick: .venv/installed
	$(PYTEST) -m "not (gpu or slow or long)" $(tests)

test-slow: .venv/installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

check: lint types test

BENCH ?= loss throughput prepare posix overhead scale estimate
bench: .venv/installed
	@for each in $(BENCH); do echo "python -m benchmarks.$$each"; $(BIN)/python -m benchmarks.$$each || exit 1; done

schema: .venv/installed
	$(BIN)/python -m docs.generator.json_schema
	$(BIN)/python -m docs.generator.reference_page

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	  { echo "Python 3.11 or later is needed (TRL 1.16 needs it); name one: make PYTHON=python3.12 run"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# torch's own CUDA packages are left to torch: on a machine whose torch is a CPU build there is nothing to install
lock:
	uv pip compile --universal --python-version 3.11 --extra dev --no-annotate --no-header \
	  --constraint constraints.txt pyproject.toml | grep -vE '^(nvidia-|cuda-|triton)' > requirements.lock
