# Measurements. Everything that must hold before a change lands is in .ci/run.
PYTHON ?= python

.PHONY: compat bench bench-quick bench-gpu plots

# The lowest, the pinned and the newest libraries that pyproject.toml allows, each in an environment of its own.
compat:
	$(PYTHON) .ci/compat.py

# All parts on the CPU, one thread, under ten minutes on an idle machine (parts for which time gets short run
# in small, which their results say); results and plots are kept.
bench:
	OMP_NUM_THREADS=1 $(PYTHON) -m benchmarks all --minutes 9 --output benchmarks/results
	$(PYTHON) -m benchmarks plot

# The same in small, nothing kept.
bench-quick:
	OMP_NUM_THREADS=1 $(PYTHON) -m benchmarks all --quick

# All parts at published sizes on a GPU, under ten minutes.
bench-gpu:
	$(PYTHON) -m benchmarks all --device cuda --minutes 9 --output benchmarks/results

plots:
	$(PYTHON) -m benchmarks plot
