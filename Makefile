# make train   trains the default network on the embedded digits
# make test    proves every part correct
# Both make .venv where it is missing and install what they need, at the versions of constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt
# What runs on a device, or on its simulator.
CUDA_TESTS := $(filter-out tests/test_cuda_ptx.py tests/test_cuda_driver.py tests/test_cuda_absent.py, $(wildcard tests/test_cuda_*.py))
SOURCES := pyproject.toml .ci/constraints.txt

WIDTH_TESTS := tests/test_parity.py tests/test_direct_convolution.py tests/test_any_convolution.py \
	tests/test_lists.py -k "(same or every_pass or by_) and float32"

.PHONY: train test test-bounds test-widths test-cuda test-gpu lint bench clean

train: .venv/.installed
	$(BIN)/fastcnn train

test: .venv/.installed-test
	$(BIN)/python -m pytest

# The same tests with every array index of the kernels checked.
test-bounds: .venv/.installed-test
	NUMBA_BOUNDSCHECK=1 $(BIN)/python -m pytest tests/test_parity.py

# And every kernel's results with the vectors of processors that have none of 512 bits.
test-widths: .venv/.installed-test
	FASTCNN_VECTOR_BITS=256 $(BIN)/python -m pytest $(WIDTH_TESTS)
	FASTCNN_VECTOR_BITS=128 $(BIN)/python -m pytest $(WIDTH_TESTS)

# The CUDA kernels without a GPU: their results on Numba's simulator, and what the compiler makes of each.
test-cuda: .venv/.installed-cuda
	NUMBA_ENABLE_CUDASIM=1 $(BIN)/python -m pytest $(CUDA_TESTS)
	$(BIN)/python -m pytest tests/test_cuda_ptx.py tests/test_cuda_driver.py

# And on the GPU of this machine.
test-gpu: .venv/.installed-cuda
	FASTCNN_TEST_GPU=1 $(BIN)/python -m pytest $(CUDA_TESTS)

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python $(SOURCES)
	$(PIP) --editable .
	touch $@

.venv/.installed-test: .venv/.installed
	$(PIP) --editable '.[test]'
	touch $@

.venv/.installed-cuda: .venv/.installed-test
	$(PIP) --editable '.[test,cuda]'
	touch $@

.venv/.installed-dev: .venv/.installed-test
	$(PIP) --editable '.[dev]'
	touch $@

# The quick asv suites, in this environment; benchmarks/README.md tells the rest.
bench: .venv/.installed-bench
	cd benchmarks && ../$(BIN)/asv machine --yes
	cd benchmarks && ../$(BIN)/asv run -E existing --quick --show-stderr --bench "layers|networks\..*\('(emotion|mnist-prelu)'|start.Imports|space.*new_buffers\('(emotion|cifar-b)"

.venv/.installed-bench: .venv/.installed-test
	$(PIP) --editable '.[bench]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
