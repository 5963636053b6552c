"""One thread, as forks of several would hang; and the generator without a model of the unit tests.

Nobody cuts the power here: a kill leaves what was written whether it was synced or not. So nothing waits for
the disk, which would be most of the time of these tests.
"""

import os
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from mm_interleaved.runs import provenance

sys.path.append(str(Path(__file__).parents[1] / "unit"))


@pytest.fixture(scope="module", autouse=True)
def quick_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        # Reads the metadata of the same packages in every run.
        patch.setattr(provenance, "installed_version", cache(provenance.installed_version))
        yield


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
