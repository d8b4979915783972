# make demo       train on real data, export, prove, measure, publish offline, print the table
# make test       run every test
# make test-fast  run what needs no toolchain and no training: what to run before each commit, a minute
# make lint       run every check of the pre-commit configuration
# make bench      measure what the README claims
# make test-zoo   export a model of each architecture family, and write docs/zoo.md; hours, goes on where it was stopped
# make test-real  train and export models of real Lightning packages, and write docs/real.md

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-one-half test-other-half test-fast lint bench test-zoo test-real clean

demo: $(VENV)/demo
	$(BIN)/python examples/digits.py

# the toolchains first, since the halves would wait for each other's; then side by side, since most of a test is one
# process that imports or converts
test: $(VENV)/test
	$(BIN)/polyexport toolchain install executorch litert mnn paddle tensorflow tfjs tflite
	$(MAKE) --jobs=2 --output-sync=target test-one-half test-other-half

test-one-half:
	$(BIN)/python -m pytest tests/test_[a-el]*.py

test-other-half:
	$(BIN)/python -m pytest tests/test_[f-km-z]*.py

FAST := architecture devices escape folders latency module outcome_table parity pickling records slices

test-fast: $(VENV)/test
	$(BIN)/python -m pytest -q $(FAST:%=tests/test_%.py)

lint: $(VENV)/lint
	PATH="$(CURDIR)/$(BIN):$$PATH" pre-commit run --all-files

bench: $(VENV)/test
	$(BIN)/python tests/benchmarks/stall.py
	$(BIN)/python tests/benchmarks/overhead.py
	$(BIN)/python tests/benchmarks/overlap.py
	$(BIN)/python tests/benchmarks/servers.py
	$(BIN)/python tests/benchmarks/onnx2tf.py

test-zoo: $(VENV)/test
	$(BIN)/python tests/support/zoo_table.py --page docs/zoo.md

test-real: $(VENV)/test
	POLYEXPORT_PAGE=docs/real.md $(BIN)/python -m pytest tests/real/packages.py

clean:
	rm -rf $(VENV) runs

# torch first and by pip, so that a build for this machine's accelerator (or a CPU build) is taken where one is offered
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	touch $@

$(VENV)/demo $(VENV)/test $(VENV)/lint: $(VENV)/%: $(VENV)/torch pyproject.toml
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	touch $@
