# Every target sets up what it needs: `git clone`, then one command.
#   PYTHON=python3.12   which interpreter .venv is made from, the first time
#   ARGS="..."          passed on to the demo, the tests or the benchmarks
#   SLOW=1              test-tpu and test-gpu compile their whole grids

PYTHON ?= python3
ARGS ?=
SLOW ?=
BIN := .venv/bin

.PHONY: help demo demo-nnx train-float8 generate sentence-encoder test test-all test-tpu test-gpu \
  test-sanitized lint bench bench-tpu

.NOTPARALLEL:  # two targets would make .venv at once

help:
	@echo "make demo | demo-nnx | train-float8 | generate | sentence-encoder | test | test-all |" \
	  "test-tpu | test-gpu | test-sanitized | lint | bench | bench-tpu  [PYTHON=...] [ARGS=...]"

demo: .venv/demo.stamp
	$(BIN)/python examples/byte_lm.py $(ARGS)

demo-nnx: .venv/demo.stamp
	$(BIN)/python examples/byte_lm.py --nnx $(ARGS)

# A run that was stopped is continued: ARGS=--resume.
train-float8: .venv/demo.stamp
	$(BIN)/python examples/train_float8.py $(ARGS)

# ARGS='--prompt "class Path" --temperature 0.8'; with --weights FILE it trains only once.
generate: .venv/demo.stamp
	$(BIN)/python examples/generate.py $(ARGS)

# Fetches the weights once, 83 MB, into the user's cache folder.
sentence-encoder: .venv/encoder.stamp
	$(BIN)/python examples/quantize_sentence_encoder.py $(ARGS)

# LLVM takes long for programs that run once: here it optimizes them less. The tests of a file share
# programs, which one worker traces and compiles.
test: .venv/dev.stamp
	XLA_FLAGS="$$XLA_FLAGS --xla_backend_optimization_level=1" \
	  $(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

# Everything, as users compile it.
test-all: .venv/dev.stamp
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not gpu_compile and not tpu_compile" $(ARGS)
	$(if $(ARGS),,$(MAKE) test-tpu test-gpu SLOW=1)

# The native kernels under AddressSanitizer and UBSan, or with ARGS=thread ThreadSanitizer. The build hook
# imports hatchling.
test-sanitized: .venv/dev.stamp
	$(BIN)/python -m pip install --quiet hatchling
	JAX_PLATFORMS=cpu $(BIN)/python kernels/sanitize.py $(ARGS)

# What the TPU compiler makes of our kernels. It needs no TPU, so JAX is not to look for one.
test-tpu: .venv/dev,tpu.stamp
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m "tpu_compile $(if $(SLOW),,and not slow)" $(ARGS)

# The same of the NVIDIA compiler. Autotuning would run kernels on the GPU that is not there.
test-gpu: .venv-gpu/stamp
	JAX_PLATFORMS=cpu XLA_FLAGS=--xla_gpu_autotune_level=0 \
	  .venv-gpu/bin/python -m pytest -m "gpu_compile $(if $(SLOW),,and not slow)" $(ARGS)

# An environment of its own: where CUDA's plugin is installed, every program looks for a GPU and
# says on stderr that there is none.
.venv-gpu/stamp: pyproject.toml
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --editable ".[dev,cuda-compile]"
	@touch $@

# The variable stops the pyright wrapper from asking the network for a newer version.
lint: .venv/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

BENCH_TPU := benchmarks/decode_bytes.py benchmarks/tpu_kernels.py

bench: .venv/bench.stamp
	@for script in $(filter-out $(BENCH_TPU),$(sort $(wildcard benchmarks/[!_]*.py))); do \
	  echo "== $$script"; $(BIN)/python $$script $(ARGS) || exit 1; \
	done

# They ask the TPU compiler, and time nothing.
bench-tpu: .venv/dev,tpu.stamp
	@for script in $(BENCH_TPU); do echo "== $$script"; $(BIN)/python $$script $(ARGS) || exit 1; done

# `touch` comes last, so an installation that was interrupted is done again.
.venv/%.stamp: pyproject.toml hatch_build.py $(wildcard kernels/mpjax_kernels/native/*)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("mpjax needs Python 3.11 \
	or newer, but $(PYTHON) is %d.%d: choose another with PYTHON=" % sys.version_info[:2])'
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	@touch $@
