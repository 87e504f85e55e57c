# Every target sets the environment up by itself, and does so again when the requirements change.
#   make demo      train on the embedded corpus, translate, show the result
#   make test      lint, then every test that takes seconds, also those that compile for TPUs, without one
#   make test-slow the tests that take minutes
#   make lint      ruff and the import contract
#   make setup     the environment alone; PYTHON=python3.12 chooses the interpreter, EXTRAS=cuda (or tpu) the accelerator;
#                  VENV=.venv-3.12, with any target, is another environment beside the first

PYTHON ?= python3
EXTRAS ?=
VENV ?= .venv
# Whole files, in the order that tests/conftest.py gives them: the longest first.
PYTEST_FLAGS ?= -n 2 --dist loadfile --no-loadscope-reorder
BIN = $(VENV)/bin
# The compiler for TPUs lies beside the environment, where the tests alone see it: with it installed, JAX looks for a TPU
# at each start, and complains of having found none.
LIBTPU = $(VENV)/libtpu
PYTEST = PYTHONPATH="$$(cd $(LIBTPU) && pwd)$${PYTHONPATH:+:$$PYTHONPATH}" $(BIN)/python -m pytest
STAMP = $(VENV)/.requirements-installed$(addprefix -,$(EXTRAS))

.PHONY: interpreter setup demo test test-slow lint clean
.DELETE_ON_ERROR:

setup: $(STAMP)

# The stamp is taken away first and set last: an installation that fails leaves none, and is begun again.
$(STAMP): requirements.txt requirements-dev.txt pyproject.toml | interpreter
	@rm -f $(STAMP)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "tfm needs Python 3.11 to 3.13; this is %s: make setup PYTHON=python3.12" % sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.$(if $(EXTRAS),[$(EXTRAS)])'
	@touch $(STAMP)

# An environment keeps the interpreter that it was made with, and one that is asked for must not be passed over.
interpreter:
ifneq ($(origin PYTHON),file)
	@! test -x $(BIN)/python || test "$$($(PYTHON) -V)" = "$$($(BIN)/python -V)" || { \
	  echo "$(VENV) was made with $$($(BIN)/python -V), not with $(PYTHON): add VENV=$(VENV)-$(notdir $(PYTHON))" >&2; exit 2; }
endif

demo: $(STAMP)
	$(BIN)/python -m tfm demo --workdir=runs/demo

test: lint $(LIBTPU)/.installed
	$(PYTEST) $(PYTEST_FLAGS)

test-slow: $(STAMP) $(LIBTPU)/.installed
	$(PYTEST) -m slow --timeout=1800

# The version that JAX asks for. Other machines than Linux on x86-64 have none, and skip what takes it.
$(LIBTPU)/.installed: $(STAMP)
	@rm -rf $(LIBTPU) && mkdir $(LIBTPU)
	@test "$$(uname -sm)" != "Linux x86_64" || $(BIN)/python -c 'from importlib.metadata import requires; \
	  print(*(r.partition(";")[0] for r in requires("jax") if r.startswith("libtpu")))' > $(LIBTPU)/requirements.txt
	@test ! -e $(LIBTPU)/requirements.txt || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  --target $(LIBTPU) -r $(LIBTPU)/requirements.txt || echo "no libtpu: tests that compile for TPUs are skipped" >&2
	@test -e $(LIBTPU)/requirements.txt -a ! -d $(LIBTPU)/libtpu || touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
