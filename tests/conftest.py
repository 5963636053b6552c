"""Shared by all tests: `import tiny` works, and `--golden` names a folder for tests/parity."""

import os
import sys
from pathlib import Path

# Models of a few thousand parameters lose time on a second thread; set before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser):
    parser.addoption("--golden", type=Path, default=None, help="golden folder to compare with (parity)")
