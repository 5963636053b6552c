"""`pytest tests/parity --golden DIR`: which golden folder is compared."""

from pathlib import Path

import pytest
from golden import Golden
from summary import Summary

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared" / "reference" / "golden-a"
CARRIED = HERE / "data" / "golden-subset"
GOLDEN = pytest.StashKey[Golden]()


def pytest_configure(config):
    golden = Golden(golden_folder(config))
    if golden.missing_files:
        raise pytest.UsageError(f"--golden {golden.folder}: found no {', '.join(golden.missing_files)}")
    config.stash[GOLDEN] = golden
    config.pluginmanager.register(Summary(golden))


def golden_folder(config) -> Path:
    chosen = config.getoption("--golden")
    if chosen is not None:
        return chosen
    return SHARED if SHARED.is_dir() else CARRIED


@pytest.fixture(scope="session")
def golden(request) -> Golden:
    return request.config.stash[GOLDEN]


def pytest_generate_tests(metafunc):
    """One test an output. Outputs that are made from one another go to one process."""
    if "output_key" in metafunc.fixturenames:
        metafunc.parametrize(
            "output_key",
            [
                pytest.param(key, marks=pytest.mark.xdist_group(f"golden {key.split('.')[0]}"))
                for key in metafunc.config.stash[GOLDEN].output_keys
            ],
        )
