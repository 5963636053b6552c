"""Shared by all tests: `import tiny` works, and `--golden` names a folder for tests/parity."""

import os
import sys
from pathlib import Path

# Models of a few thousand parameters lose time on a second thread; set before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Without a GPU, tests/kernels runs in Triton's interpreter. Triton reads this when something imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser):
    parser.addoption("--golden", type=Path, default=None, help="golden folder to compare with (parity)")
