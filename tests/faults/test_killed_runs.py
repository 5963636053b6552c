"""A run that was killed at any moment, or whose last line was torn, is finished by the same command."""

import os
from dataclasses import replace

import pytest
from echo_runs import contents, echo_model, echo_request, run

from faults.filesystem import KILLED, killed_at


@pytest.fixture
def request_(tmp_path):
    return echo_request(tmp_path, echo_model(tmp_path))


def test_killed_at_every_event_then_finished(request_, monkeypatch):
    """SIGKILL before every change of the file system; the rerun gives what an uninterrupted run gives."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nobody cuts the power here
    whole = replace(request_, output=request_.output.with_name("whole"))
    run(whole)
    wanted = contents(whole.output)
    num_events = 0
    while True:
        again = replace(request_, output=request_.output.with_name(f"out{num_events}"))
        if killed_at(num_events, lambda again=again: run(again), again.output) != KILLED:
            break
        run(again)
        assert contents(again.output) == wanted, f"killed at event {num_events}"
        num_events += 1
    assert num_events >= 25


def test_torn_tail_is_repaired(request_):
    """The results cut at many places of their last line: the rest is kept, the torn document made again."""
    run(request_)
    wanted = contents(request_.output)
    whole = (request_.output / "results.jsonl").read_bytes()
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    for length in range(start, len(whole), 9):
        (request_.output / "results.jsonl").write_bytes(whole[:length])
        run(request_)
        assert contents(request_.output) == wanted, f"cut at byte {length}"
