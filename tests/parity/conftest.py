"""`pytest tests/parity --golden DIR`: which golden folder is compared, and the line that sums it up."""

from pathlib import Path

import pytest
from golden import Golden

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared" / "reference" / "golden-a"
CARRIED = HERE / "data" / "golden-subset"


def golden_folder(config) -> Path:
    chosen = config.getoption("--golden")
    if chosen is not None:
        return chosen
    return SHARED if SHARED.is_dir() else CARRIED


@pytest.fixture(scope="session")
def golden(request) -> Golden:
    return request.config.stash[GOLDEN]


GOLDEN = pytest.StashKey[Golden]()


def pytest_configure(config):
    config.stash[GOLDEN] = Golden(golden_folder(config))


def pytest_generate_tests(metafunc):
    if "output_key" in metafunc.fixturenames:
        metafunc.parametrize("output_key", metafunc.config.stash[GOLDEN].output_keys)


def pytest_terminal_summary(terminalreporter, config):
    golden = config.stash[GOLDEN]
    if not golden.asked:
        return
    missing = [key for key in golden.output_keys if key not in golden.compared]
    for key in missing:
        terminalreporter.write_line(f"golden: not compared: {key}")
    terminalreporter.write_line(
        f"golden: compared {len(golden.compared)} of {len(golden.output_keys)} outputs"
    )
