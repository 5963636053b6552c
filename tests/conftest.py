"""Shared by all tests: `import tiny` works, `--golden` names a folder for tests/parity, and how many
processes share the work.
"""

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


MAX_PROCESSES = 8
"""Each loads the libraries and keeps models of its own."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config) -> int:
    """A process a core; none beside this one for a single file, whose tests stay together."""
    files = {argument.split("::")[0] for argument in config.args}
    num_files = len(files) if all(map(os.path.isfile, files)) else MAX_PROCESSES
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_processes = min(num_files, num_cores, MAX_PROCESSES)
    return num_processes if num_processes > 1 else 0


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
