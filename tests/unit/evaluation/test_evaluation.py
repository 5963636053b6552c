"""An evaluation refuses gold documents that it cannot score before a model runs for nothing."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from echo_generator import EchoGenerator

from mm_interleaved.documents.document import Document, Text
from mm_interleaved.errors import InputError, TooLongError
from mm_interleaved.evaluation import runner
from mm_interleaved.evaluation.answering import Ranking
from mm_interleaved.evaluation.predictions import read_predictions
from mm_interleaved.evaluation.runner import evaluate_model, evaluate_predictions
from mm_interleaved.evaluation.tasks.storyworld import STORYWORLD
from mm_interleaved.files import make_folder
from mm_interleaved.generation.loading import AS_IT_IS, Acceleration
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.runs.engine import ModelChoice
from mm_interleaved.runs.generate import RunRequest
from mm_interleaved.storyworld.exports import write_storyworld
from tiny import tiny_config


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """A record of each task, by task, and the folder with their images."""
    path = write_storyworld(tmp_path_factory.mktemp("data") / "gold", 60, 3, "test")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return path.parent, {record["meta"]["task"]: record for record in records}


def read(lines, record):
    folder, _ = lines
    path = folder / "changed.jsonl"
    path.write_text(json.dumps(record) + "\n")
    return STORYWORLD.read_gold(path)


def test_what_data_storyworld_writes_is_taken(lines):
    assert len(STORYWORLD.read_gold(lines[0])) == 60


@pytest.mark.parametrize(
    ("task", "field", "value"),
    [
        ("caption", "task", "cooking"),
        ("caption", "scenes", []),
        ("caption", "scenes", [{"place": "moon"}]),
        ("draw", "scenes", ["a scene"]),
        ("vqa", "is_fine_detail", None),
        ("dialogue", "candidates", [1, 2]),
        ("dialogue", "candidates", None),
        ("dialogue", "gold_index", 10),
    ],
)
def test_damaged_gold_documents_are_refused_by_field(lines, task, field, value):
    record = lines[1][task]
    damaged = {**record, "meta": {**record["meta"], field: value}}
    with pytest.raises(InputError, match=rf"document '{record['id']}': meta\.{field}.*: found "):
        read(lines, damaged)


def test_a_word_of_another_world_is_named(lines):
    record = json.loads(json.dumps(lines[1]["segmentation"]))
    record["meta"]["scenes"][0]["figures"][0]["species"] = "unicorn"
    with pytest.raises(InputError, match=r"meta\.scenes\[0\].*species: found 'unicorn'"):
        read(lines, record)


def test_a_gold_answer_without_a_box_is_refused(lines):
    record = {**lines[1]["ground"], "target": [{"type": "text", "text": "there"}]}
    with pytest.raises(InputError, match=r"target: found 'there', expected a box"):
        read(lines, record)


def test_candidates_that_do_not_fit_count_as_wrong_and_stop_nothing(caplog):
    class Full(EchoGenerator):
        def score_options(self, document, options):
            raise TooLongError("an option has 99 tokens, expected at most 3")

    document = Document(id="d", parts=(Text("x"),), meta={"candidates": ["a"]})
    events = list(Ranking().answer(Full(), [document], [GenerationSettings(layout="T")], 1))
    assert events[-1][1].document.meta["ranking"] == []
    assert "99 tokens" in caplog.text and "'d'" in caplog.text
    [(place, failed)] = Ranking(is_answer=True).answer(Full(), [document], [GenerationSettings()], 1)
    assert place == 0 and "99 tokens" in str(failed.error)


def test_a_model_that_answers_and_ranks_is_loaded_once(lines, tmp_path, monkeypatch):
    """The ranking comes from the very model that answered, in few bits too."""
    loaded = []

    class Ranking(EchoGenerator):
        def score_options(self, document, options):
            return list(range(len(options)))

    def load(folder, *, device, dtype, acceleration=AS_IT_IS):
        loaded.append(acceleration)
        return Ranking()

    monkeypatch.setattr(runner, "load_generator", load)
    model = tmp_path / "model"
    make_folder(model)
    (model / "config.json").write_text(tiny_config().to_json_string(use_diff=False))
    data = lines[0] / "dialogue.jsonl"
    data.write_text(json.dumps(lines[1]["dialogue"]) + "\n")
    chosen = ModelChoice(name=str(model), device="cpu", acceleration=Acceleration(channels_last=True))
    request = RunRequest(documents=(), output=tmp_path / "out", model=chosen)
    evaluate_model(STORYWORLD, data, request, lambda document, event: None)
    assert loaded == [chosen.acceleration]
    [prediction] = map(json.loads, (tmp_path / "out" / "predictions.jsonl").read_text().splitlines())
    count = len(lines[1]["dialogue"]["meta"]["candidates"])
    assert prediction["meta"]["ranking"] == list(range(count))[::-1]


def test_documents_with_held_out_looks_are_scored_once_more(lines):
    gold = STORYWORLD.read_gold(lines[0])
    answers = [replace(document, parts=document.target, target=()) for document in gold]
    wrong = next(document for document in gold if document.meta["is_held_out"] and document.target)
    answers = [answer for answer in answers if answer.id != wrong.id]
    scores = STORYWORLD.score(answers, gold)
    assert 0 < scores["held_out.layout.correct"] < scores["layout.correct"] < 1
    everything = STORYWORLD.score([], [d for d in gold if not d.meta["is_held_out"]])
    assert not any(name.startswith("held_out.") for name in everything)


def answered(lines, tmp_path, change):
    """A file of predictions for three documents, changed."""
    gold = lines[0] / "three.jsonl"
    records = [lines[1][task] for task in ("caption", "vqa", "paragraph")]
    gold.write_text("".join(json.dumps(record) + "\n" for record in records))
    given = [{"id": record["id"], "content": record["target"]} for record in records]
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in change(given)))
    return gold, path


def scored(lines, tmp_path, change):
    gold, path = answered(lines, tmp_path, change)
    return evaluate_predictions(STORYWORLD, gold, path, tmp_path / "out")


def test_answers_that_are_wrong_or_failed_or_empty_are_scored(lines, tmp_path):
    error = {"code": "image", "field": None, "message": "x"}
    scores = scored(
        lines,
        tmp_path,
        lambda given: [given[0], {"id": given[1]["id"], "error": error}, {**given[2], "content": []}],
    )
    assert scores["caption.attributes"] == 1 and scores["vqa.accuracy"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda given: given[:2],
            r"predictions\.jsonl: id '{2}' is missing, expected a line for each",
        ),
        (lambda given: given[1:2], r"2 ids \('{0}', '{2}'\) are missing"),
        (lambda given: [], r"3 ids .* are missing"),
        (lambda given: [*given, given[0]], r"predictions\.jsonl:4: id '{0}' occurs twice, first at .*:1"),
        (
            lambda given: [*given, {"id": given[0]["id"], "error": {"code": "x"}}],
            r":4: id '{0}' occurs twice, first at .*:1",
        ),
        (
            lambda given: [*given, {**given[0], "content": [], "id": "x"}],
            r":4: id 'x' is not among the task's 3 documents, such as '{0}'",
        ),
        (lambda given: [*given[:2], [1]], r":3: found a list, expected an object"),
        (
            lambda given: [*given, *({**given[0], "id": f"x{number}"} for number in range(12))],
            r":4: 12 ids \('x0', .*'x9' and 2 more\) are not among",
        ),
        (lambda given: [*given[:2], {"error": {"code": "x"}}], r":3: id: missing"),
        (lambda given: [*given[:2], {"id": 3, "content": []}], r":3: id: found the number 3"),
    ],
)
def test_ids_that_are_missing_doubled_or_unknown_are_named(lines, tmp_path, change, message):
    ids = [lines[1][task]["id"] for task in ("caption", "vqa", "paragraph")]
    for number, name in enumerate(ids):
        message = message.replace(f"{{{number}}}", re.escape(name))
    with pytest.raises(InputError, match=message) as refused:
        scored(lines, tmp_path, change)
    assert refused.value.exit_code == 3 and not (tmp_path / "out").exists()


def test_a_ranking_holds_every_candidate_once(tmp_path):
    gold = [Document(id="a", parts=(Text("who?"),), meta={"candidates": ["x", "y", "z"]})]

    def read(ranking):
        line = {"id": "a", "content": [{"type": "text", "text": "x"}], "meta": {"ranking": ranking}}
        (tmp_path / "p.jsonl").write_text(json.dumps(line))
        return read_predictions(tmp_path / "p.jsonl", gold)

    for ranking in ([0, 1, 1], [1, 2, 3], [2, 1], ["0", 1, 2], [True, 0, 2], [0.0, 1, 2], "012", None, {}):
        with pytest.raises(
            InputError, match=r"p\.jsonl:1: meta\.ranking: found .*, expected the candidates 0 to 2"
        ):
            read(ranking)
    # An empty one says that they were not ranked.
    assert [read(ranking)[0].meta["ranking"] for ranking in ([2, 0, 1], [])] == [[2, 0, 1], []]


def test_an_image_that_cannot_be_read_is_named_before_a_model_runs(tmp_path):
    path = write_storyworld(tmp_path / "gold", 20, 3, "test")
    image = sorted((path.parent / "images").glob("*.png"))[0]
    image.write_bytes(image.read_bytes()[:40])

    def load(*arguments, **settings):
        raise AssertionError("no model may be loaded")

    request = RunRequest(documents=(), output=tmp_path / "out", model=ModelChoice())
    with pytest.raises(InputError, match=rf"document '.+': .*{image.name}"):
        evaluate_model(STORYWORLD, path, request, lambda document, event: None, load=load)
    assert not (tmp_path / "out").exists()
