# Two commands: `make demo` (or `make demo MODEL=path-or-hub-id`) and `make test`. Each sets up .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TYPED := build/typed
PYTEST := $(BIN)/pytest -q -n auto --maxprocesses 8 --dist worksteal
# torch's idle threads sleep instead of spinning: five times as fast where other work shares two cores.
export OMP_WAIT_POLICY ?= passive
# Where this is set, every process compiles torch and transformers anew: eight seconds for each of the tests' own.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint style types format clean

demo: .venv/stamp .venv/kernels
	@$(BIN)/python benchmarks/demo.py $(if $(MODEL),"$(MODEL)")

# A worker takes about a GiB, and a thread. mypy, which takes a minute of one core, runs beside the first tests.
test: style .venv/kernels
	@$(MAKE) --no-print-directory types >.venv/types.log 2>&1 & types=$$!; \
	echo "$(PYTEST)"; $(PYTEST); tests=$$?; \
	wait $$types; types=$$?; cat .venv/types.log; exit $$((tests + types))

lint: style types

style: .venv/stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy reads an installed wheel, because it cannot follow the mapped folders of an editable install. The old build/ goes
# first: setuptools would pack the deleted modules that it still finds there.
types: .venv/stamp
	@rm -rf build
	@$(PIP) wheel -qq --no-deps --no-build-isolation -w build .
	@$(PIP) install -qq --no-deps --no-compile --target $(TYPED) build/*.whl
	cd $(TYPED) && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p compress

# numba caches compiled loops by the file that defines them, and does not see when a file they call has changed.
.venv/kernels: .venv/stamp $(wildcard compress/*.py formats/*.py kernels/*.py)
	@rm -f */__pycache__/*.nbi */__pycache__/*.nbc
	@touch $@

format: .venv/stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch comes first, at the constrained version, so that no other requirement chooses its version. Python compiles what it
# imports: to compile everything takes longer than installing it.
.venv/stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("compress needs Python 3.10 or newer, and $(PYTHON) is %d.%d: run make PYTHON=/path/to/python3" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(PIP) install -qq --no-compile -c constraints.txt torch
	$(PIP) install -qq --no-compile -c constraints.txt -e '.[dev]'
	@touch $@
