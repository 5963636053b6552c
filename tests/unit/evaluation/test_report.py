"""The page of an evaluation: what is best and worst, what is lost, and text that stays text."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.evaluation.cases import cases_of, document_score, extremes
from mm_interleaved.evaluation.pages.markup import parts_markup
from mm_interleaved.evaluation.pages.report import MAX_DOCUMENTS, report_page
from mm_interleaved.evaluation.registry import make_task
from mm_interleaved.evaluation.report import write_report
from mm_interleaved.evaluation.task import Task, TaskOptions, each_alone
from mm_interleaved.evaluation.tasks.storyworld import STORYWORLD
from mm_interleaved.storyworld.tasks import TASKS, document

ATTACK = '<script>alert(1)</script>"><img src=x onerror=1>'


def storyworld(per_task=2):
    gold = [
        document("test", 7, 20 * place + n, task) for place, task in enumerate(TASKS) for n in range(per_task)
    ]
    return gold, [replace(each, parts=each.target, target=(), meta={}) for each in gold]


def judged(values):
    """A task whose documents have these values, and its gold documents."""
    gold = [Document(id=str(n), parts=(Text("?"),), meta={"value": value}) for n, value in enumerate(values)]

    def score(predictions, gold):
        return {"t.value": sum(one.meta["value"] for one in gold) / len(gold), "t.fid": 3.0}

    return Task(name="t", read_gold=lambda path: gold, score=score, cases=each_alone(score, "value")), gold


def test_scores_are_means_over_cases():
    gold, answers = storyworld()
    answers = answers[3:]
    scores = STORYWORLD.score(answers, gold)
    found = {}
    for own in cases_of(STORYWORLD, answers, gold):
        for name, values in own.items():
            found.setdefault(name, []).extend(values)
    assert {name: pytest.approx(sum(values) / len(values)) for name, values in found.items()} == scores


def test_best_median_and_worst_are_those_of_the_values():
    task, gold = judged([0.1, 0.9, 0.5, 0.9, 0.4, 0.2, 0.6])
    [found] = extremes(task, gold, cases_of(task, [], gold), 2).values()
    assert (found.best, found.median, found.worst) == ((1, 3), (6, 2), (0, 5))
    [found] = extremes(task, gold[:3], cases_of(task, [], gold[:3]), 2).values()
    assert (found.best, found.median, found.worst) == ((1,), (), (0, 2))


@pytest.mark.parametrize("number", range(1, 9))
def test_nothing_is_shown_twice_however_few_there_are(number):
    task, gold = judged([n / 10 for n in range(number)])
    [found] = extremes(task, gold, cases_of(task, [], gold), 2).values()
    shown = (*found.best, *found.median, *found.worst)
    assert len(set(shown)) == len(shown) == min(number, 6)


def test_what_is_no_virtue_does_not_count_for_a_document():
    cases = {"t.accuracy": [1.0], "t.copy_rate": [0.9], "layout.correct": [0.0], "held_out.t.accuracy": [0.0]}
    assert document_score(cases) == 1.0 and document_score({"layout.correct": [1.0]}) is None


def test_a_task_knows_by_what_it_was_made():
    options = TaskOptions(compat="released")
    task = make_task("vqav2", options)
    assert (task.name, task.options) == ("vqav2", options) and STORYWORLD.name == "storyworld"


def test_files_of_an_evaluation_say_what_the_page_shows(tmp_path):
    gold, answers = storyworld(6)
    answers = [answer for answer in answers if answer.id != gold[0].id]
    write_report(
        tmp_path, STORYWORLD, STORYWORLD.score(answers, gold), answers, gold, errors={gold[0].id: "broken"}
    )
    assert all(
        isinstance(value, float) for value in json.loads((tmp_path / "scores.json").read_text()).values()
    )
    tables = json.loads((tmp_path / "confusion.json").read_text())["tables"]
    [place] = [one for one in tables if (one["task"], one["attribute"]) == ("caption", "place")]
    assert place["cases"] == 6 and place["lost"] == pytest.approx(1 / 6, abs=1e-6)
    assert sum(map(sum, place["counts"])) == 6 and place["read"][-1] == "(missing)"
    chosen = json.loads((tmp_path / "gallery.json").read_text())
    assert chosen["caption"]["worst"][0] == {"id": gold[0].id, "score": 0.0}
    page = (tmp_path / "report.html").read_text()
    assert "not finished: broken" in page and "caption.attributes" in page
    assert "caption: 12 of 12 attributes with losses" in page and "17 %" in page


def test_text_of_users_is_escaped_everywhere():
    task, gold = judged([0.5])
    asked = (Text(ATTACK, role=ATTACK), Text(ATTACK))
    gold = [
        replace(gold[0], id=ATTACK, parts=asked, target=(Text(ATTACK),), meta={"value": 1.0, "task": ATTACK})
    ]
    answers = [Document(id=ATTACK, parts=(Text(ATTACK),))]
    chosen = extremes(task, gold, cases_of(task, answers, gold), 2)
    page = report_page(
        replace(task, name=ATTACK), ATTACK, {ATTACK: 0.5}, answers, gold,
        cases=[{ATTACK: [0.5]}], chosen=chosen, errors={},
    ).decode()  # fmt: skip
    assert "<script" not in page and "<img" not in page and page.count("&lt;script&gt;") > 10
    failed = report_page(task, "x", {}, [], gold, errors={ATTACK: ATTACK}).decode()
    assert "<script" not in failed and "not finished: &lt;script" in failed


def test_a_page_asks_for_nothing_and_images_have_a_text():
    gold, answers = storyworld()
    page = report_page(STORYWORLD, "x", {"a.b": 0.5}, answers, gold).decode()
    sources = re.findall(r'(?:src|href|url|srcset|action)\s*[=(]\s*"?([^">)]{0,12})', page)
    assert sources and all(source.startswith(("data:image/", "#")) for source in sources)
    images = re.findall(r"<img [^>]*>", page)
    assert images and all(
        re.search(r'alt="(what was asked|the answer|the truth), image \d"', one) for one in images
    )
    assert page.count("<th scope=") == page.count("<th ") and "default-src 'none'" in page


def test_a_page_of_many_documents_is_bounded():
    task, gold = judged([0.5] * (MAX_DOCUMENTS + 5))
    assert "5 more stand in predictions.jsonl" in report_page(task, "x", {"t.value": 0.5}, [], gold).decode()


def test_images_stand_with_their_texts():
    image = Image(PILImage.new("RGB", (4, 4)))

    def captions(*parts):
        return re.findall(r"<figcaption>(\w)|<p>(\w)|<img", parts_markup(parts, "x"))

    assert captions(Text("a"), image, Text("b")) == [("", ""), ("a", ""), ("", "b")]
    assert captions(image, Text("a"), image, Text("b")) == [("", ""), ("a", ""), ("", ""), ("b", "")]
    asked = (Image(image.source, role="user"), Text("a", role="user"))
    assert "figcaption" not in parts_markup(asked, "x")
