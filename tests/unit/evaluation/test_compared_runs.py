"""Evaluations that can be compared are compared; others are refused in one sentence."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest
from PIL import Image as PILImage

from mm_interleaved.cli.compare import named_folders
from mm_interleaved.documents.document import Document, Text
from mm_interleaved.documents.document_files import write_documents
from mm_interleaved.errors import InputError, UsageError
from mm_interleaved.evaluation.comparison import compare, comparison_record, differ
from mm_interleaved.evaluation.pages.comparison import comparison_page
from mm_interleaved.evaluation.pages.plots import is_plotted, plot
from mm_interleaved.evaluation.registry import make_task
from mm_interleaved.evaluation.runner import evaluate_predictions
from mm_interleaved.evaluation.tasks.storyworld import STORYWORLD
from mm_interleaved.storyworld.exports import write_storyworld
from mm_interleaved.storyworld.tasks import document

ATTACK = '<script>alert(1)</script>"><img src=x onerror=1>'


def evaluated(data, out, change=lambda answers: answers):
    """An evaluation of the gold answers, changed."""
    gold = STORYWORLD.read_gold(data)
    answers = change([replace(one, parts=one.target, target=(), meta={}) for one in gold])
    out.mkdir()
    write_documents(out / "predictions.jsonl", answers)
    evaluate_predictions(STORYWORLD, data, out / "predictions.jsonl", out)
    return out


def wrong_answers(answers):
    """Of every second question, and of every third caption."""
    return [
        replace(one, parts=(Text("seven"),)) if number % 2 and len(one.parts) == 1 else one
        for number, one in enumerate(answers)
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("compared")
    data = write_storyworld(root / "data", 60, 3, "test").parent
    runs = {"right": evaluated(data, root / "a"), "wrong": evaluated(data, root / "b", wrong_answers)}
    return data, runs


@pytest.fixture(scope="module")
def comparison(folders):
    return compare(folders[1])


def test_values_are_those_of_the_evaluations_and_differences_theirs(folders, comparison):
    scores = [json.loads((folder / "scores.json").read_text()) for folder in folders[1].values()]
    for row in comparison.rows:
        assert list(row.values) == [one[row.metric] for one in scores]
        if row.num_documents > 1:
            first, second = row.intervals
            assert first.low <= row.values[0] <= first.high and second.low <= row.values[1] <= second.high
            assert row.differences[1].mean == pytest.approx(row.values[1] - row.values[0])
    assert {row.metric for row in comparison.rows} == scores[0].keys()


def test_a_difference_is_that_of_the_same_documents(comparison):
    [row] = [row for row in comparison.rows if row.metric == "vqa.accuracy"]
    places = [n for n, one in enumerate(comparison.gold) if one.meta["task"] == "vqa"]
    values = [[fmean(run.cases[n]["vqa.accuracy"]) for n in places] for run in comparison.runs]
    drawn = np.random.default_rng(9).integers(0, len(places), size=(4000, len(places)))
    by_hand = (np.array(values[1]) - np.array(values[0]))[drawn].mean(1)
    expected = np.quantile(by_hand, [0.025, 0.975])
    assert row.num_documents == len(places)
    # The quantiles of so few documents lie on a grid of 1 / documents.
    found = row.differences[1]
    assert np.allclose([found.low, found.high], expected, atol=1.01 / len(places))
    assert found.high < 0


def test_documents_differ_where_their_scores_do(comparison):
    differing = {n for n in range(len(comparison.gold)) if differ(comparison, n)}
    right, wrong = comparison.runs
    assert differing == {n for n, own in enumerate(right.cases) if own != wrong.cases[n]}
    assert 0 < len(differing) < len(comparison.gold)


def test_the_page_shows_every_run_and_marks_what_differs(comparison):
    page = comparison_page(comparison).decode()
    shown = page.count('class="case differing') + page.count('class="case same')
    assert 40 < shown <= 60 and f"{shown} of 60 documents, of each task first" in page
    assert "right" in page and "wrong" in page and "\N{BLACK DOWN-POINTING TRIANGLE}" in page
    assert "body:has(#only-differing:checked) .case.same" in page and "<script" not in page
    assert page.count('<svg role="img"') == sum(
        not row.metric.startswith("held_out.") for row in comparison.rows
    )
    assert "vqa: badge" in page


def test_names_and_texts_of_users_are_escaped(tmp_path):
    gold = document("test", 3, 0, "caption")
    asked = (gold.parts[0], Text(ATTACK, role="user"))
    write_documents(tmp_path / "documents.jsonl", [replace(gold, id=ATTACK, parts=asked)])

    def attack(answers):
        return [replace(one, parts=(Text(ATTACK),)) for one in answers]

    runs = {ATTACK: evaluated(tmp_path, tmp_path / "a", attack), "b": evaluated(tmp_path, tmp_path / "b")}
    page = comparison_page(compare(runs)).decode()
    assert "<script" not in page and "<img src=x" not in page and page.count("&lt;script&gt;") > 5


def test_numbers_are_written_as_json(comparison):
    record = json.loads(json.dumps(comparison_record(comparison)))
    found = record["metrics"]["vqa.accuracy"]
    assert found["values"][0] == 1.0 and found["intervals"][0] == [1.0, 1.0]
    assert found["differences"][1] == pytest.approx(found["values"][1] - 1)
    assert found["difference_intervals"][0] is None and record["documents"] == 60


def broken(folders, tmp_path, change):
    """A copy of the second evaluation, changed."""
    out = shutil.copytree(folders[1]["wrong"], tmp_path / "c")
    change(out)
    return {"right": folders[1]["right"], "broken": out}


def edited(name, change):
    def edit(out):
        value = json.loads((out / name).read_text())
        change(value)
        (out / name).write_text(json.dumps(value))

    return edit


RECORD = "evaluation.json"
DAMAGES = {
    "no record": (lambda out: (out / RECORD).unlink(), r"evaluation\.json: there is no such file, expected"),
    "torn scores": (lambda out: (out / "scores.json").write_text("[1"), r"scores\.json"),
    "no answers": (lambda out: (out / "predictions.jsonl").unlink(), r"predictions\.jsonl: there is no such"),
    "no task": (edited(RECORD, lambda r: r.pop("task")), r"evaluation\.json: task: missing"),
    "no such task": (edited(RECORD, lambda r: r.update(task="cooking")), r"task: found the string 'cooking'"),
    "no hash": (edited(RECORD, lambda r: r["data"].update(sha256=3)), r"data\.sha256: found the number 3"),
    "no run": (edited(RECORD, lambda r: r.update(run="run/manifest.json")), r"manifest\.json: there is no"),
    "other scores": (
        edited("scores.json", lambda r: r.update({"vqa.accuracy": 0.5})), r"vqa\.accuracy: found 0\.5, its"
    ),
    "no number": (
        edited("scores.json", lambda r: r.update({"vqa.accuracy": True})), r"vqa\.accuracy: found true"
    ),
}  # fmt: skip
UNLIKE = {
    "task": (edited(RECORD, lambda r: r.update(task="coco")), r"evaluated 'coco', expected 'storyworld'"),
    "data": (edited(RECORD, lambda r: r["data"].update(sha256="00")), r"only evaluations of the same"),
    "compat": (edited(RECORD, lambda r: r["options"].update(compat="released")), r"compat=released"),
}


@pytest.mark.parametrize("name", [*DAMAGES, *UNLIKE])
def test_damaged_and_unlike_evaluations_are_refused_in_one_sentence(folders, tmp_path, name):
    change, message = (DAMAGES | UNLIKE)[name]
    error = InputError if name in DAMAGES else UsageError
    with pytest.raises(error, match=message) as refused:
        compare(broken(folders, tmp_path, change))
    assert "\n" not in str(refused.value)


def test_documents_that_moved_are_named_and_those_that_changed_are_refused(folders, tmp_path):
    data = tmp_path / "data"
    write_storyworld(data, 20, 4, "test")
    runs = {"a": evaluated(data, tmp_path / "a"), "b": evaluated(data, tmp_path / "b")}
    moved = data.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"there are no documents of storyworld; --data says"):
        compare(runs)
    assert len(compare(runs, moved).gold) == 20
    with pytest.raises(InputError, match=r"found 60 documents with hash \w+, expected 20"):
        compare(runs, folders[0])


def test_scores_of_the_whole_set_get_intervals_if_they_are_scored_anew(tmp_path):
    lines = [
        {"question_id": n, "image": "x.png", "text": f"Is it {n}?", "label": "yes" if n % 3 else "no"}
        for n in range(12)
    ]
    data = tmp_path / "data"
    data.mkdir()
    (data / "coco_pope_random.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    PILImage.new("RGB", (4, 4)).save(data / "x.png")
    task = make_task("pope")
    gold = task.read_gold(data)
    runs = {}
    for name, said in (("yes", "yes"), ("no", "no")):
        out = tmp_path / name
        out.mkdir()
        write_documents(out / "p.jsonl", [Document(id=one.id, parts=(Text(said),)) for one in gold])
        evaluate_predictions(task, data, out / "p.jsonl", out)
        runs[name] = out
    plain = {row.metric: row for row in compare(runs).rows}
    assert plain["pope.accuracy"].intervals[0] is not None and plain["pope.precision"].intervals[0] is None
    done = []
    anew = {row.metric: row for row in compare(runs, rescored=40, on_done=done.append).rows}
    precision = anew["pope.precision"].intervals[0]
    assert precision.mean == pytest.approx(8 / 12) and precision.low < 8 / 12 < precision.high
    assert anew["pope.accuracy"] == plain["pope.accuracy"] and len(done) == 2 * (12 + 40)
    page = comparison_page(compare(runs)).decode()
    assert "pope" in page and "What is lost" not in page


def test_runs_have_names(tmp_path):
    (tmp_path / "a=b").mkdir()
    assert named_folders([str(tmp_path / "x"), "y=out/z", str(tmp_path / "a=b")]).keys() == {"x", "y", "a=b"}
    with pytest.raises(UsageError, match="two runs are called 'x'"):
        named_folders(["p/x", "q/x"])
    with pytest.raises(UsageError, match="expected two evaluations or more, found 1"):
        compare({"a": tmp_path})


def test_plots_hold_what_lies_between_0_and_1():
    assert is_plotted([0.0, None, 1.0]) and not is_plotted([0.5, 7.2]) and not is_plotted([None])
    drawn = plot([("m", [0.25, None], [None, None])], ["a", "<b>"])
    assert 'x="26.00%"' in drawn and "a 0.250" in drawn and "<b>" not in drawn.replace("&lt;b&gt;", "")
