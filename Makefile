# `make demo` runs the main job, `make test` checks the code; each sets up what it needs in .venv, once.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
READY := .venv/.ready
DEMO := .venv/.demo
SLURM := .venv/.slurm
LIBRARIES := lowest newest
BROWSER := .venv/.browser
LOADERS := .venv/.loaders
# pytest's workers; each one starts trainings of its own. The slow tests mostly wait.
WORKERS ?= $(if $(CI),3,2)
TESTS := $(BIN)/python -m tests.harness.classify -n $(WORKERS) --dist worksteal
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Our own modules are compiled once, not in each of the thousands of processes that the tests start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-all test-apart $(LIBRARIES:%=test-%) check one search campaign lint format types docs bench clean
help:
	@echo "make demo       train once undisturbed and once under fire, and compare the bits (RUN=gs://bucket/demo: there)"
	@echo "make test       lint, types and the tests (with CI=true also the slow ones)"
	@echo "make test-all   the slow tests too"
	@echo "make test-apart those that take longest and have a neighbour there, and the versions between"
	@echo "make test-slurm-24.11, make test-slurm-26.05"
	@echo "                what a version of SLURM can change, on a newer one"
	@echo "make test-lowest, make test-newest"
	@echo "                training, storage and the example on the lowest libraries allowed and on the newest"
	@echo "make check      lint, types and the tests that start no training (SEED=7: other examples)"
	@echo "make one T=name the tests whose name holds that, one after the other and with every word"
	@echo "make search     search for two minutes for what breaks a property (SEED=7, FOR=600)"
	@echo "make campaign   faults put into runs of several machines that share nothing but a bucket (SEED=7, FAULTS=500)"
	@echo "make lint, make types, make format"
	@echo "                ruff and mypy; format mends what ruff can"
	@echo "make docs       the documentation as pages, in build/docs"
	@echo "make bench      every speed that is claimed, against a named peer (QUICK=1: in minutes)"
	@echo "make clean      remove .venv and everything generated"

# The training and report extras are enough; where everything is set up, nothing more is.
demo: $(or $(wildcard $(READY)),$(DEMO))
	$(BIN)/jobkit demo $(if $(RUN),--run '$(subst ','\'',$(RUN))')

ifdef CI
test: test-all
else
test: lint types $(SLURM) $(BROWSER)
	$(TESTS) -m "not slow" @tests/apart.txt
endif

check: lint types
	$(BIN)/python -m pytest -q -n 2 --dist worksteal $(if $(SEED),--hypothesis-profile=search --hypothesis-seed=$(SEED)) -m "not slow" tests/unit

one: $(READY) $(SLURM) $(BROWSER)
	@test -n "$(T)" || { echo "which tests? make one T=sigkill" >&2; exit 2; }
	$(BIN)/python -m pytest -v -k '$(subst ','\'',$(T))'

# Other examples of the property tests, apart from the tests: a seed that finds something finds it again.
search: $(READY)
	$(BIN)/python -m tests.harness.search $(SEED) $(if $(FOR),--for $(FOR))

# Hours; each life of a run prints a line for each fault. A seed that finds something finds it again.
campaign: $(READY)
	$(BIN)/python -m tests.harness.campaign $(if $(FAULTS),--faults $(FAULTS)) $(if $(SEED),--seed $(SEED))

# With a container engine: CI installs and starts one where none answers (tests/harness/engine.py). Tests about time come
# first and alone, and what fails is run once more, to tell a race from a fault (tests/harness/classify.py).
test-all: $(READY)
	$(MAKE) -s -j3 lint types docs $(SLURM) $(BROWSER) $(LOADERS) .venv/.slurm-26.05 .venv/.libraries-newest
	$(BIN)/python -m tests.harness.engine $(TESTS) --durations=60 @tests/apart.txt
	$(MAKE) -s test-slurm-26.05 test-newest

# What takes minutes and has a neighbour in test-all that differs in little, and the versions between: before a release.
test-apart: $(READY) $(SLURM) $(BROWSER) $(LOADERS)
	mkdir -p .pytest_cache && sed 's/^--deselect=//' tests/apart.txt >.pytest_cache/apart.txt
	$(BIN)/python -m tests.harness.engine $(TESTS) --durations=30 @.pytest_cache/apart.txt
	$(MAKE) -s test-slurm-24.11 test-lowest

# On the SLURM of a later Debian: the tests that its version can change.
test-slurm-%: .venv/.slurm-%
	@echo "on SLURM $*:"
	JOBKIT_SLURM=.venv/slurm-$* $(TESTS) @tests/slurm_versions.txt

# On another set of libraries: what a version of them can change, and the example.
$(LIBRARIES:%=test-%): test-%: .venv/.libraries-%
	@echo "on the $* libraries:"
	$(TESTS:$(BIN)/%=.venv/$*/bin/%) -m "not slow" @tests/libraries.txt
	place=$$(mktemp -d) && .venv/$*/bin/python -m jobkit.examples.text --steps 20 --run "$$place/run" && rm -r "$$place"

lint: $(READY)
	$(BIN)/ruff check -q .
	$(BIN)/ruff format -q --check .

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check -q --fix .
	$(BIN)/ruff format -q .

# Warnings are errors: a link that leads nowhere, a docstring that is not what it should be.
docs: $(READY)
	$(BIN)/sphinx-build -q -W --keep-going -c docs -d build/docs/.doctrees . build/docs
	@echo "open build/docs/docs/index.html"

bench: $(READY)
	$(BIN)/python -m tests.benchmarks $(if $(QUICK),--quick)

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find jobkit launch tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): EXTRAS = all
$(DEMO): EXTRAS = train,report
$(READY) $(DEMO): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "jobkit needs Python 3.11 or newer; install one (apt-get install python3.11) and run make again" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(MAKE) -s .venv-make
	@echo "setting up .venv from constraints.txt (the first time takes a few minutes) ..."
	@$(BIN)/python -m pip install -q -e '.[$(EXTRAS)]' -c constraints.txt
	@touch $@

# SLURM for the tests, unpacked below .venv where it is not installed; made again while there is none.
$(SLURM): $(READY) tests/harness/slurm_packages.py tests/harness/debian.py
	@$(BIN)/python -m tests.harness.slurm_packages $@

.venv/.slurm-%: $(READY) tests/harness/slurm_packages.py tests/harness/debian.py
	@$(BIN)/python -m tests.harness.slurm_packages $@ $*

.venv/.libraries-%: $(READY) constraints-%.txt tests/harness/libraries.py tests/harness/debian.py
	@$(BIN)/python -m tests.harness.libraries $* $@

# Chromium for the tests that look at the report; on CI it is installed where it is missing.
$(BROWSER): $(READY) tests/harness/browser.py
	@$(BIN)/python -m tests.harness.browser $@

# TensorFlow, PyTorch, datasets and haiku for programs of the tests, below .venv and not in it: 500 MB to download.
$(LOADERS): $(READY) tests/harness/loaders.py tests/harness/debian.py
	@$(BIN)/python -m tests.harness.loaders $@

# Debian and Ubuntu ship python3 without ensurepip; it comes with the package pythonX.Y-venv.
.PHONY: .venv-make
.venv-make:
	@rm -rf .venv
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
		package=$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo "installing $$package ..."; \
			apt-get install -qq -y $$package >/dev/null || { apt-get update -qq && apt-get install -qq -y $$package >/dev/null; }; \
		else \
			echo "python3 lacks the venv module here; run: sudo apt-get install $$package, then make again" >&2; exit 1; \
		fi; }
	@$(PYTHON) -m venv .venv
