"""A run on a cluster of two nodes: a driver that is killed, a node that is killed; every document once.

The nodes are two raylets of this machine; what a node keeps is its own, and its processes die with it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
from echo_runs import contents, echo_model, echo_request, nothing, run
from slow_echo import HANGING, LOG, load_slow_echo

from mm_interleaved.documents.document_files import read_documents, write_documents
from mm_interleaved.runs.generate import run_documents
from mm_interleaved.runs.ray_engine import RayEngine

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]
TESTS = Path(__file__).parents[1]
COPIES = 5
"""Of the four documents of `echo_request`: ten batches of two."""
DRIVER = """
import sys, time
from dataclasses import replace
from pathlib import Path
from echo_runs import echo_request
from slow_echo import load_slow_echo
from mm_interleaved.documents.document_files import read_documents
from mm_interleaved.runs.generate import run_documents
from mm_interleaved.runs.ray_engine import RayEngine

root, address, output = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
request = replace(
    echo_request(root, root / "model"), documents=read_documents(root / "documents.jsonl"), output=output,
    batch_size=2, engine=RayEngine(address=address, num_actors=1),
)
run_documents(request, lambda document, event: time.sleep(3600), load=load_slow_echo)
"""


@pytest.fixture(scope="module")
def cluster():
    """A head with one CPU, where drivers connect; nodes are added by tests."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        paths = [str(TESTS / "unit"), str(TESTS / "faults"), str(TESTS), str(TESTS.parent)]
        patch.setenv("PYTHONPATH", os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        yield nodes
        nodes.shutdown()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The model, the input, and what a run in one process makes of it."""
    root = tmp_path_factory.mktemp("ray")
    request = echo_request(root, echo_model(root))
    documents = [
        replace(each, id=f"{each.id}-{copy}") for copy in range(COPIES) for each in request.documents
    ]
    write_documents(root / "documents.jsonl", documents)
    run(request_in(root, "single", None))
    return root


def request_in(root, name, engine):
    documents = read_documents(root / "documents.jsonl")
    request = replace(
        echo_request(root, root / "model"), documents=documents, output=root / name, batch_size=2
    )
    return request if engine is None else replace(request, engine=engine)


def continued(root):
    """(node, ids) of each batch that was begun, whatever became of it."""
    lines = (root / "model" / LOG).read_text().splitlines() if (root / "model" / LOG).exists() else []
    return [(line.split()[0], line.split()[1:]) for line in lines]


def assert_is_whole(root, name):
    """What a run in one process makes, each document once, and nothing left of Ray."""
    records = [json.loads(line) for line in (root / name / "results.jsonl").read_text().splitlines()]
    ids = [record["id"] for record in records]
    assert len(ids) == len(set(ids)) == 4 * COPIES
    assert contents(root / name) == contents(root / "single")
    assert not list((root / name).glob(".r*"))


def test_what_a_killed_driver_left_is_taken_up_and_not_made_again(cluster, root):
    arguments = [str(root), cluster.address, str(root / "driver")]
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, *arguments])
    try:
        # Its progress stops at the first document, so nothing more is committed; Ray goes on.
        deadline = time.monotonic() + 240
        while len(checkpointed := list((root / "driver").glob(".ray-*/checkpoint/*.parquet"))) < 4:
            assert driver.poll() is None and time.monotonic() < deadline, "Ray makes nothing"
            time.sleep(0.1)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert not (root / "driver" / "index.html").exists()
    # Ray may have finished more by now; what it says is done is.
    time.sleep(2)
    checkpointed = list((root / "driver").glob(".ray-*/checkpoint/*.parquet"))
    before = len(continued(root))
    request = request_in(root, "driver", RayEngine(address=cluster.address, num_actors=1))
    outcome = run_documents(request, nothing, load=load_slow_echo)
    assert_is_whole(root, "driver")
    assert outcome.num_failed == COPIES
    assert len(continued(root)) - before == 2 * COPIES - len(checkpointed)
    # Once more there is nothing to do, and no cluster is asked.
    again = run_documents(
        replace(request, engine=RayEngine(address="nowhere:1")), nothing, load=load_slow_echo
    )
    assert again.num_already_finished == 4 * COPIES


def test_a_node_that_is_killed_in_the_middle_costs_nothing_but_time(cluster, root):
    second = cluster.add_node(num_cpus=1)
    (root / "model" / HANGING).write_text(second.node_id)
    before = len(continued(root))

    def kill_at_work():
        while second.node_id not in {node for node, _ in continued(root)[before:]}:
            time.sleep(0.1)
        cluster.remove_node(second, allow_graceful=False)

    killer = Thread(target=kill_at_work, daemon=True)
    killer.start()
    request = request_in(root, "node", RayEngine(address=cluster.address, num_actors=2))
    run_documents(request, nothing, load=load_slow_echo)
    killer.join(1)
    assert not killer.is_alive(), "the second node took no part"
    assert_is_whole(root, "node")
    # What it was at was begun again elsewhere.
    lost = [ids for node, ids in continued(root)[before:] if node == second.node_id]
    again = [ids for node, ids in continued(root)[before:] if node != second.node_id]
    assert lost and all(ids in again for ids in lost) and len(again) == 2 * COPIES
