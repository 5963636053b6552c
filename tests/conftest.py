"""Shared by all tests: the tiny model's module is importable by name; `--golden` names a folder for
tests/parity.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser):
    parser.addoption("--golden", type=Path, default=None, help="golden folder to compare with (tests/parity)")
