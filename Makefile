# What to run while working. Everything that must hold before a change lands is in .ci/run; `make check` runs it all,
# the single targets run its steps in the environment that is active (see CONTRIBUTING.md).
PYTHON ?= python

.PHONY: help check quick lint types test unit parity apart test-gpu compat bench bench-quick bench-gpu plots hooks

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

## make check        what CI runs, from an empty environment (25 minutes on two cores)
check:
	.ci/run

## make quick        lint, laws, types and unit tests, here (six minutes)
quick:
	.ci/run lint laws types unit

## make lint         style, formatting, spelling
lint:
	.ci/run lint

## make types        pyright
types:
	.ci/run types

## make test         all tests that need no GPU
test:
	.ci/run tests parity

## make unit         the tests of single files
unit:
	.ci/run unit

## make parity       the golden tensors
parity:
	.ci/run parity

## make apart        lmms-eval, VLMEvalKit, Ray on two nodes: what CI's half hour has no room for (installs Ray here)
apart:
	.ci/run harnesses ray

## make test-gpu     the fused kernel and whatever else needs a GPU; says so where there is none
test-gpu:
	$(PYTHON) -c "import sys, torch; torch.cuda.is_available() or sys.exit('test-gpu: torch finds no CUDA device, expected one; the kernels are tested in an interpreter by: make test')"
	$(PYTHON) -m pytest -q -n 0 tests/kernels
	$(PYTHON) -m pytest -q -n 0 -m gpu --ignore=tests/kernels

## make hooks        lint and laws before every commit (pre-commit)
hooks:
	pre-commit install

## make compat       the lowest, the pinned and the newest libraries, each in an environment of its own
compat:
	$(PYTHON) .ci/compat.py

# All parts on the CPU, one thread, under ten minutes on an idle machine (parts for which time gets short run
# in small, which their results say); results and plots are kept.
## make bench        all benchmarks on the CPU (ten minutes)
bench:
	OMP_NUM_THREADS=1 $(PYTHON) -m benchmarks all --minutes 9 --output benchmarks/results
	$(PYTHON) -m benchmarks plot

## make bench-quick  the same in small, nothing kept
bench-quick:
	OMP_NUM_THREADS=1 $(PYTHON) -m benchmarks all --quick

## make bench-gpu    all parts at published sizes on a GPU (ten minutes)
bench-gpu:
	$(PYTHON) -m benchmarks all --device cuda --minutes 9 --output benchmarks/results

plots:
	$(PYTHON) -m benchmarks plot
