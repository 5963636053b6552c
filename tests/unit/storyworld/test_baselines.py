"""Trivial predictors answer what a model is asked, and are scored by the same scorer."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mm_interleaved.cli import evaluate
from mm_interleaved.cli.main import run
from mm_interleaved.documents.document import Image, Text
from mm_interleaved.storyworld import baselines
from mm_interleaved.storyworld.exports import write_storyworld
from mm_interleaved.storyworld.tasks import TASKS, document, part_pixels


@pytest.fixture(autouse=True, scope="module")
def few_examples():
    """Two hundred training documents a task, made once; the rules are the same."""
    kept = (baselines._task_examples, baselines._examples, baselines._constant_target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "NUM_EXAMPLES", 200)
        for cached in kept:
            cached.cache_clear()
        yield
    for cached in kept:
        cached.cache_clear()


def question(task: str, index: int = 0):
    asked = document("test", 4, index, task)
    visible = {name: asked.meta[name] for name in ("task", "candidates") if name in asked.meta}
    return replace(asked, target=(), meta=visible)


def kinds(parts):
    return "".join("T" if isinstance(part, Text) else "I" for part in parts)


@pytest.mark.parametrize("predictor", ["text-only", "nearest"])
def test_a_training_document_is_answered_as_it_was(predictor):
    """Whoever knows a document by heart finds it again by its words, or by its image."""
    for task in ("draw", "story_last"):
        made = document("train", 1, 7, task)
        parts, _ = baselines.PREDICTORS[predictor](replace(made, target=(), meta={"task": task}))
        assert [part.load().tobytes() for part in parts] == [part.load().tobytes() for part in made.target]


def test_the_nearest_image_answers_a_caption():
    made = document("train", 1, 11, "caption")
    [answer], _ = baselines.nearest(replace(made, target=(), meta={"task": "caption"}))
    assert answer.text == made.target[0].text


@pytest.mark.parametrize("task", sorted(TASKS))
@pytest.mark.parametrize("predictor", ["text-only", "nearest"])
def test_answers_have_the_layout_that_was_asked_for(task, predictor):
    asked = question(task)
    parts, _ = baselines.PREDICTORS[predictor](asked)
    assert kinds(parts) == asked.layout.replace(" ", "")


def test_words_alone_give_the_commonest_answer_to_the_same_question():
    asked = replace(question("vqa"), parts=(Text("Which time of day is it?", role="user"),))
    [answer], _ = baselines.text_only(asked)
    same = [
        made.target[0].text
        for made in (document("train", 1, index, "vqa") for index in range(200))
        if made.meta["question"] == "Which time of day is it?"
    ]
    assert same.count(answer.text) == max(map(same.count, same))


def test_a_constant_is_the_same_whatever_is_asked():
    answers = {baselines.constant(question("vqa", index))[0][0].text for index in range(5)}
    assert len(answers) == 1


def test_candidates_are_all_ranked():
    asked = question("dialogue", 2)
    for predictor in ("constant", "text-only", "nearest"):
        _, ranking = baselines.PREDICTORS[predictor](asked)
        assert sorted(ranking) == list(range(len(asked.meta["candidates"]))), predictor


def test_training_documents_without_an_image_are_near_none(monkeypatch):
    """The nearest is the nearest of those that have an image, wherever the others stand among them."""
    asked = question("caption")
    seen = part_pixels(asked.images[-1])
    images = [None, 255 - seen, None, seen, None]
    members = [
        baselines.Example("caption", index, "the same words", "the same words", image)
        for index, image in enumerate(images)
    ]
    for kept, nearest in ((members, 3), (members[::2], 0)):
        monkeypatch.setattr(baselines, "_examples", lambda task, layout: None)
        monkeypatch.setattr(baselines, "_alike", lambda asked, examples, kept=kept: (kept, True))
        [answer], _ = baselines.nearest(asked)
        assert answer.text == document("train", 1, nearest, "caption").target[0].text


def test_the_help_names_the_predictors_that_there_are():
    assert tuple(baselines.PREDICTORS) == evaluate.PREDICTOR_NAMES


def test_copying_gives_what_was_given_last():
    asked = question("story_last")
    [answer], _ = baselines.copy(asked)
    assert isinstance(answer, Image) and answer.load().tobytes() == asked.images[-1].load().tobytes()


def test_the_command_scores_a_predictor(tmp_path, capsys):
    data = write_storyworld(tmp_path / "gold", 20, 3, "test").parent
    out = tmp_path / "out"
    assert run(["evaluate", "storyworld", "--data", str(data), "-o", str(out), "--predictor", "copy"]) == 0
    scores = json.loads((out / "scores.json").read_text())
    # A last image that is the one before keeps some badges; a story that stands still keeps nobody.
    assert 0 < scores["story.badge_kept"] < 0.5 and scores["vqa.accuracy"] == 0
    told = run(["evaluate", "storyworld", "--data", str(data), "-o", str(out), "--predictor", "guess"])
    assert told == 2 and "expected one of constant" in capsys.readouterr().err


def test_a_predictor_never_sees_answers_or_scenes(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setitem(baselines.PREDICTORS, "copy", lambda asked: (seen.append(asked), ((), None))[1])
    baselines.write_predictions("copy", [document("test", 4, 0, "dialogue")], tmp_path)
    assert seen[0].target == () and set(seen[0].meta) == {"task", "candidates"}
