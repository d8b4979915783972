# make demo       train on real data, export, prove, measure, publish offline, print the table
# make test       run every test
# make test-fast  run what needs no toolchain and no training: what to run before each commit, a minute
# make toolchains install the converters that the tests use
# make lint       run every check of the pre-commit configuration
# make docs       build the site into site/; a warning or a broken link is an error
# make lock       resolve the toolchains anew and write their lock files; CHAINS="onnx tflite" for some
# make bench      measure what the README claims
# make test-newest  the names that we use of other libraries, and the formats that need no toolchain, on newest releases
# make test-zoo   export a model of each architecture family, and write docs/zoo.md; hours, goes on where it was stopped
# make test-matrix  export the models of the tests to every format, and write docs/matrix.md; an hour, goes on likewise
# make test-real  train and export models of real Lightning packages, and write docs/real.md

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NEWEST := .venv-newest
WATCHED := torch lightning onnx onnxscript onnxruntime openvino coremltools wandb

# with it each process of a test would compile our sources anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test toolchains test-fast test-newest lint docs lock bench test-zoo test-matrix test-real clean

demo: $(VENV)/demo
	$(BIN)/python examples/digits.py

# the toolchains first, since the sessions would wait for each other's; then two side by side, since most of a test is one
# process that imports or converts
test: toolchains
	shared=$$(mktemp -d) && trap "rm -rf $$shared" EXIT && \
		$(MAKE) --jobs=2 --output-sync=target SHARED=$$shared session-1 session-2

toolchains: $(VENV)/test
	$(BIN)/polyexport toolchain install c executorch imx500 litert litert_web mnn ncnn nncf onnx_web paddle rknn tensorflow \
		tensorrt_rtx tfjs tflite vela

# idle threads of OpenMP wait actively
session-%: export OMP_NUM_THREADS := 1
session-%:
	$(BIN)/python -m pytest tests --share $(SHARED)

FAST := architecture devices escape folders latency module outcome_table parity pickling private_names records slices

test-fast: $(VENV)/test
	$(BIN)/python -m pytest -q -m "not slow" $(FAST:%=tests/test_%.py)

# an environment of its own without constraints, brought up to date at each call, beyond the bounds of pyproject.toml too
test-newest:
	test -d $(NEWEST) || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade torch
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --editable ".[test]"
	$(NEWEST)/bin/python -m pip install --quiet --upgrade $(WATCHED)
	$(NEWEST)/bin/python -m pip list | grep --extended-regexp --ignore-case "^($(shell echo $(WATCHED) | tr ' ' '|')) "
	$(NEWEST)/bin/python -m pytest tests/test_private_names.py tests/test_formats.py \
		-k "(private and not toolchain) or three_batch_sizes"

# beside what the tests need, whose types mypy reads
lint: $(VENV)/test $(VENV)/lint
	PATH="$(CURDIR)/$(BIN):$$PATH" pre-commit run --all-files

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lock: $(VENV)/test
	$(BIN)/python tests/support/lock_toolchains.py $(CHAINS)

bench: $(VENV)/test $(VENV)/bench
	$(BIN)/python tests/benchmarks/stall.py
	$(BIN)/python tests/benchmarks/overhead.py
	$(BIN)/python tests/benchmarks/overlap.py
	$(BIN)/python tests/benchmarks/servers.py
	$(BIN)/python tests/benchmarks/runtimes.py --page docs/runtimes.md
	$(BIN)/python tests/benchmarks/onnx2tf.py
	$(BIN)/python tests/benchmarks/precisions.py --page docs/precisions.md
	$(BIN)/python tests/benchmarks/growth.py --page docs/growth.md

test-zoo: $(VENV)/test
	$(BIN)/python tests/support/zoo_table.py families --page docs/zoo.md

test-matrix: $(VENV)/test
	$(BIN)/python tests/support/zoo_table.py models --page docs/matrix.md

test-real: $(VENV)/test
	POLYEXPORT_PAGE=docs/real.md $(BIN)/python -m pytest tests/real/packages.py

clean:
	rm -rf $(VENV) $(NEWEST) runs site

# torch first and by pip, so that a build for this machine's accelerator (or a CPU build) is taken where one is offered;
# the rest by uv, which keeps that torch and downloads side by side. Python compiles what is imported
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt torch uv
	touch $@

$(VENV)/demo $(VENV)/test $(VENV)/bench $(VENV)/lint $(VENV)/docs: $(VENV)/%: $(VENV)/torch pyproject.toml
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable ".[$*]"
	touch $@
