"""Shared by all tests: `import tiny` works, and `--golden` names a folder for tests/parity."""

import logging
import os
import sys
from pathlib import Path

# Models of a few thousand parameters lose time on a second thread; set before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Without a GPU, tests/kernels runs in Triton's interpreter. Triton reads this when something imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser):
    parser.addoption("--golden", type=Path, default=None, help="golden folder to compare with (parity)")


# transformers' assisted decoding says this of its own call of the assistant.
SAID_OF_THEMSELVES = ("Passing `generation_config` together with generation-related arguments",)


class RefuseDeprecated(logging.Handler):
    """Turns what a library logs of its own old names, a call of ours, into an error."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecated" in message and not message.startswith(SAID_OF_THEMSELVES):
            raise DeprecationWarning(f"{record.name}: {message}")


@pytest.fixture(autouse=True, scope="session")
def _no_deprecated_calls():
    """transformers and diffusers log most of their deprecations instead of warning, each once a process."""
    handler = RefuseDeprecated()
    names = ("transformers", "diffusers")
    for name in names:
        logging.getLogger(name).addHandler(handler)
    yield
    for name in names:
        logging.getLogger(name).removeHandler(handler)
