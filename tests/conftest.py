"""Shared by all tests: the tiny model's module is importable by name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
