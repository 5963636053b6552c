"""An evaluation by several ranks: each document once, the same scores, whoever dies on the way."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from echo_generator import EchoGenerator, load_echo
from echo_runs import contents, echo_model, echo_request, nothing

from faults.filesystem import KILLED, every_event, killed_at
from mm_interleaved.evaluation.runner import evaluate_model
from mm_interleaved.evaluation.tasks.storyworld import STORYWORLD
from mm_interleaved.runs import generate
from mm_interleaved.runs.engine import ModelChoice
from mm_interleaved.runs.generate import RunRequest, run_documents
from mm_interleaved.storyworld.exports import write_storyworld

sys.path.append(str(Path(__file__).parents[1] / "training"))
from ranks import run_ranks

NUM_DOCUMENTS, BATCH_SIZE = 23, 3
FILES = ("predictions.jsonl", "scores.json")


class Answering(EchoGenerator):
    """Likes the longest candidate best."""

    def score_options(self, document, options):
        return [float(len(option)) for option in options]


@pytest.fixture(scope="module")
def request_(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    data = write_storyworld(folder / "data", NUM_DOCUMENTS, 3, "test")
    model = ModelChoice(name=str(echo_model(folder)), device="cpu")
    return data, RunRequest(documents=(), output=folder / "one", model=model, batch_size=BATCH_SIZE)


@pytest.fixture(scope="module")
def alone(request_, quick_disk):
    """The folder that one process writes."""
    evaluate(request_)
    return request_[1].output


def evaluate(request_, out=None, ranks=None, on_event=nothing):
    data, request = request_
    request = request if out is None else replace(request, output=out)
    return evaluate_model(STORYWORLD, data, request, on_event, load=lambda *_, **__: Answering(), ranks=ranks)


def assert_same(folder, alone):
    for name in FILES:
        assert (folder / name).read_bytes() == (alone / name).read_bytes(), name
    assert contents(folder / "run") == contents(alone / "run")


def in_any_order(folder):
    """A kill while the files are put into order may leave the hashes in the old one, which nothing minds."""
    found = contents(folder)
    return found | {"hashes.jsonl": sorted(found["hashes.jsonl"].splitlines())}


def test_any_number_of_ranks_gives_the_same_files(request_, alone, tmp_path):
    """Documents do not divide by batches, nor batches by ranks; the last rank of nine has none."""
    ids = [json.loads(line)["id"] for line in (alone / "predictions.jsonl").read_text().splitlines()]
    assert len(set(ids)) == len(ids) == NUM_DOCUMENTS
    rankings = [json.loads(line).get("meta") for line in (alone / "predictions.jsonl").open()]
    assert any(rankings) and not all(rankings)
    for size in (2, 3, 9):
        out = tmp_path / str(size)

        def work(ranks, out=out):
            finished = []
            scores, failed = evaluate(request_, out, ranks, lambda document, event: finished.append(event))
            assert bool(scores) == ranks.is_first and failed == 0
            counts = ranks.gather(finished.count("finished"))
            assert sum(counts) == NUM_DOCUMENTS and counts[0] < NUM_DOCUMENTS

        assert run_ranks(size, tmp_path / "store", work) == [0] * size
        assert_same(out, alone)


@pytest.mark.parametrize("dying", [0, 1])
@pytest.mark.parametrize("size", [1, 2, 3], ids=lambda size: f"finished by {size}")
def test_what_a_dead_rank_and_its_survivors_finished_is_not_made_again(
    request_, alone, tmp_path, dying, size
):
    out = tmp_path / "out"

    def work(ranks):
        done = 0

        def on_event(document, event):
            nonlocal done
            done += event == "finished"
            if ranks.rank == dying and done == 4:
                os._exit(9)

        try:
            evaluate(request_, out, ranks, on_event)
        except RuntimeError as error:
            assert "gloo" in str(error)
            os._exit(6)

    codes = run_ranks(2, tmp_path / "store", work)
    assert codes == [9, 6] if dying == 0 else codes == [6, 9]
    assert not (out / "scores.json").exists()

    def finish(ranks):
        made = []
        evaluate(request_, out, None if size == 1 else ranks, lambda d, event: made.append(event))
        # The dying rank had finished 4, the other all of its share, 11 or 12.
        assert sum(ranks.gather(made.count("finished"))) <= NUM_DOCUMENTS - 4 - 11

    assert run_ranks(size, tmp_path / "store", finish) == [0] * size
    assert_same(out, alone)


def test_a_first_rank_that_is_killed_at_any_moment_of_taking_over_loses_nothing(tmp_path):
    """The others' folders are taken over and removed; whenever that stops, the next start goes on."""
    request = replace(echo_request(tmp_path, echo_model(tmp_path)), batch_size=1)
    whole = replace(request, output=tmp_path / "whole")
    run_documents(whole, nothing, load=load_echo)
    torn = replace(request, output=tmp_path / "torn")

    def stop(ranks):
        if ranks.is_first:
            generate.take_over_shares = lambda run, **_: os._exit(9) if run.finished else None
        run_documents(torn, nothing, load=load_echo, ranks=ranks)

    assert 9 in run_ranks(2, tmp_path / "store", stop)
    assert list((torn.output / "shares").iterdir())
    made = []

    def attempt(number):
        shutil.copytree(torn.output, tmp_path / str(number))
        again = replace(request, output=tmp_path / str(number))
        return killed_at(number, lambda: run_documents(again, nothing, load=load_echo), again.output)

    for number, code in every_event(attempt, least=30):
        assert code == KILLED
        again = replace(request, output=tmp_path / str(number))
        run_documents(again, lambda document, event: made.append(event), load=load_echo)
        assert not made, f"event {number}: something was made again"
        assert in_any_order(again.output) == in_any_order(whole.output)


def test_what_is_wrong_for_the_first_rank_is_raised_on_all(request_, alone, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(alone, out)
    data, request = request_
    other = data, replace(request, flags={"seed": 5})

    assert run_ranks(2, tmp_path / "store", lambda ranks: evaluate(other, out, ranks)) == [2, 2]
    assert_same(out, alone)
