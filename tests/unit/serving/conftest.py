"""One server a file of tests, and a client that talks to it."""

from __future__ import annotations

import httpx2
import pytest

from stub_serving import running_server


@pytest.fixture(scope="module")
def served():
    with running_server() as running:
        yield running


@pytest.fixture
def engine(served):
    served.engine.documents.clear()
    served.engine.settings.clear()
    return served.engine


@pytest.fixture(scope="module")
def client(served):
    with httpx2.Client(base_url=served.url, timeout=20) as found:
        yield found
